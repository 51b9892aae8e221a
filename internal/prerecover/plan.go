package prerecover

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/musterdr/muster/internal/dr"
)

// PlannedEdit is an edit with all that is needed to make it.
type PlannedEdit struct {
	dr.Edit
	Content []byte      // write, replace, copy: the whole new content
	Target  string      // link: where it leads
	Mode    fs.FileMode // mkdir, write of a new file, chmod
	Fresh   bool        // write: whatever is at the path is removed first
	Label   string      // SELinux label of what is new, "" to leave it
}

// PlanInput is all that a plan follows from.
type PlanInput struct {
	Facts     dr.Facts
	View      *View
	Inventory dr.Inventory
	NICs      []dr.HWNIC // of the chosen hardware
	Overlays  []Overlay  // in the order in which they are applied
	Agent     []byte     // the test agent, a static program
	Variables Variables  // for templates; what is missing is taken from the facts
}

// Plan is what is to be done to a guest.
type Plan struct {
	Edits   []PlannedEdit
	Applied []string // "name@version", also of overlays that found nothing to change
	Notes   []dr.Decision
}

// Limits of a plan.
const (
	maxEdits   = 2000
	maxPlanned = 256 << 20 // bytes of all new contents
	maxAgent   = 64 << 20
)

// PlanEdits works out what the overlays change. It is a function of its arguments: it reads nothing, and the same input
// gives the same plan. Each edit sees what those before it have changed.
func PlanEdits(in PlanInput) (Plan, error) {
	p := &planner{PlanInput: in}
	p.View = in.View.clone()
	p.fillVariables()
	for _, o := range in.Overlays {
		if !p.applies(o) {
			continue
		}
		p.overlay = o
		p.plan.Applied = append(p.plan.Applied, o.ID())
		for i, s := range o.Edits {
			p.step = s
			if err := p.run(s); err != nil {
				return Plan{}, fmt.Errorf("plan overlay %s: edit %d (%s): %w", o.ID(), i+1, s.Action, err)
			}
		}
		if len(p.plan.Edits) > maxEdits || p.bytes > maxPlanned {
			return Plan{}, fmt.Errorf("plan overlay %s: more than %d edits or %d bytes", o.ID(), maxEdits, maxPlanned)
		}
	}
	return p.plan, nil
}

type planner struct {
	PlanInput // View is a working copy: what is planned has happened there
	plan      Plan
	overlay   Overlay
	step      Step
	bytes     int64
}

func (p *planner) fillVariables() {
	values := Variables{
		"hostname": p.Facts.Hostname, "distro": p.Facts.Distro.ID, "version": p.Facts.Distro.Version, "kernel": p.Facts.Default,
		"root_uuid": p.Facts.UUIDs[p.Facts.RootDevice], "server": "", "snapshot": "", "machine_uuid": p.Inventory.SMBIOS.UUID,
	}
	for k, v := range p.Variables {
		values[k] = v
	}
	p.Variables = values
}

func (p *planner) note(what, chosen, format string, args ...any) {
	p.plan.Notes = append(p.plan.Notes, dr.Decision{What: what, Chosen: chosen, Reason: fmt.Sprintf(format, args...)})
}

func (p *planner) applies(o Overlay) bool {
	return p.holds(o.When) && (o.Unless.empty() || !p.holds(o.Unless))
}

func (p *planner) holds(w When) bool {
	one := func(list []string, values ...string) bool {
		return len(list) == 0 || slices.ContainsFunc(list, func(want string) bool { return slices.Contains(values, want) })
	}
	major, _, _ := strings.Cut(p.Facts.Distro.Version, ".")
	return one(w.Distro, append([]string{p.Facts.Distro.ID}, p.Facts.Distro.Like...)...) &&
		one(w.Version, p.Facts.Distro.Version, major) &&
		one(w.Init, p.Facts.Init) &&
		one(w.Firmware, string(p.Facts.Firmware)) &&
		one(w.Network, p.Facts.Network) &&
		one(w.SELinux, p.Facts.SELinux) &&
		one(w.Hostname, p.Facts.Hostname) &&
		(len(w.Exists) == 0 || slices.ContainsFunc(w.Exists, p.View.exists))
}

// run plans one step.
func (p *planner) run(s Step) error {
	switch s.Action {
	case "write":
		return p.stepWrite(s)
	case "replace":
		return p.stepReplace(s)
	case "remove":
		return p.remove(s.Path, "")
	case "link":
		return p.link(s.Path, s.Target, "")
	case "mkdir":
		return p.mkdir(s.Path, "")
	case "copy":
		return p.copy(s.Path, s.Target, "")
	case "move":
		if !p.View.exists(s.Path) {
			return nil
		}
		if err := p.copy(s.Path, s.Target, ""); err != nil {
			return err
		}
		return p.remove(s.Path, "")
	case "chmod":
		return p.stepChmod(s)
	}
	builtin, ok := builtins[s.Action]
	if !ok {
		return fmt.Errorf("there is no action %q", s.Action)
	}
	return builtin(p, s)
}

// builtins are the actions that work out their edits themselves.
var builtins map[string]func(*planner, Step) error

func init() {
	builtins = map[string]func(*planner, Step) error{
		"fstab-by-uuid": (*planner).fstabByUUID, "crypttab-by-uuid": (*planner).crypttabByUUID, "cmdline-by-uuid": (*planner).cmdlineByUUID,
		"fstab-absent-nofail": (*planner).fstabAbsent, "pin-nics": (*planner).pinNICs, "esp-fallback": (*planner).espFallback,
		"mask-units": (*planner).maskUnits, "kernel-args": (*planner).kernelArgs, "install-agent": (*planner).installAgent,
	}
}

func (p *planner) stepWrite(s Step) error {
	text := s.Content
	if s.Template != "" {
		var err error
		if text, err = expand(s.Template, p.Variables); err != nil {
			return err
		}
	}
	if s.Create != nil && !*s.Create && !p.View.exists(s.Path) {
		return nil
	}
	mode, err := s.mode(0o644)
	if err != nil {
		return err
	}
	return p.write("write", s.Path, []byte(text), mode, "")
}

func (p *planner) stepReplace(s Step) error {
	if !p.View.exists(s.Path) {
		return nil
	}
	before, ok := p.View.content(s.Path)
	if !ok {
		return fmt.Errorf("%s is no file of at most %d bytes", s.Path, maxConfig)
	}
	re, err := regexp.Compile("(?m)" + s.Find)
	if err != nil {
		return err
	}
	// A replacement may be longer than what it replaces, and be made often.
	if n := len(re.FindAllIndex(before, -1)); int64(n)*int64(len(s.With)+len(before)/max(n, 1)) > 16*maxConfig {
		return fmt.Errorf("the new content of %s would be too long", s.Path)
	}
	return p.write("replace", s.Path, re.ReplaceAll(before, []byte(s.With)), 0, "")
}

func (p *planner) stepChmod(s Step) error {
	mode, err := s.mode(0)
	if err != nil || !p.View.exists(s.Path) {
		return err
	}
	e := *p.View.entries[s.Path]
	if e.stat.Mode.Perm() == mode {
		return nil
	}
	edit := p.edit("chmod", s.Path, "")
	edit.Diff = fmt.Sprintf("-%04o\n+%04o\n", e.stat.Mode.Perm(), mode)
	edit.Mode = mode
	e.stat.Mode = e.stat.Mode.Type() | mode
	p.View.entries[s.Path] = &e
	p.plan.Edits = append(p.plan.Edits, edit)
	return nil
}

// edit begins an edit of the present overlay.
func (p *planner) edit(action, name, reason string) PlannedEdit {
	for _, r := range []string{p.step.Reason, p.overlay.Reason} {
		if reason == "" {
			reason = strings.TrimSpace(r)
		}
	}
	return PlannedEdit{Edit: dr.Edit{Overlay: p.overlay.ID(), Action: action, Path: name, Reason: reason, Reverse: strings.TrimSpace(p.overlay.Reverse)}}
}

// write plans a new content. One that is there already plans nothing.
func (p *planner) write(action, name string, content []byte, mode fs.FileMode, reason string) error {
	before := p.View.entries[name]
	edit := p.edit(action, name, reason)
	next := &entry{exists: true, stat: Stat{Mode: mode.Perm(), Size: int64(len(content))}, content: content, loaded: true}
	switch {
	case before == nil || !before.exists:
		edit.Fresh = before != nil && before.isLink // a link to nowhere gives way
		edit.Mode = mode
		if err := p.mkdir(path.Dir(name), reason); err != nil {
			return err
		}
		edit.Label = p.labelFor(name)
		edit.Diff = diffText(nil, content)
		p.addName(name)
	case before.stat.Mode.IsDir():
		return fmt.Errorf("%s is a folder", name)
	case !before.stat.Mode.IsRegular():
		return fmt.Errorf("%s is no regular file", name)
	case !before.loaded:
		return fmt.Errorf("%s is longer than what an overlay may change (%d bytes)", name, maxConfig)
	case bytes.Equal(before.content, content):
		return nil
	default:
		edit.Before = sum(before.content)
		next.stat.Mode, next.isLink = before.stat.Mode, before.isLink
		if before.stat.Mode&0o004 == 0 {
			edit.Diff = fmt.Sprintf("(not readable by everyone: %d bytes became %d)\n", len(before.content), len(content))
		} else {
			edit.Diff = diffText(before.content, content)
		}
	}
	edit.After, edit.Content = sum(content), content
	p.bytes += int64(len(content))
	p.View.entries[name] = next
	p.plan.Edits = append(p.plan.Edits, edit)
	return nil
}

func (p *planner) addName(name string) {
	dir := path.Dir(name)
	e := p.View.entries[dir]
	if e == nil {
		return
	}
	if i, found := slices.BinarySearch(e.names, path.Base(name)); !found {
		c := *e
		c.names = slices.Insert(slices.Clone(e.names), i, path.Base(name))
		p.View.entries[dir] = &c
	}
}

func (p *planner) remove(name, reason string) error {
	before := p.View.entries[name]
	if before == nil || !before.exists && !before.isLink {
		return nil
	}
	if before.exists && before.stat.Mode.IsDir() && !before.isLink {
		return fmt.Errorf("%s is a folder; only files and links are removed", name)
	}
	edit := p.edit("remove", name, reason)
	if before.loaded {
		edit.Before = sum(before.content)
		edit.Diff = fmt.Sprintf("(%d bytes removed)\n", len(before.content))
	}
	p.View.entries[name] = &entry{}
	if dir := p.View.entries[path.Dir(name)]; dir != nil {
		c := *dir
		c.names = slices.DeleteFunc(slices.Clone(dir.names), func(n string) bool { return n == path.Base(name) })
		p.View.entries[path.Dir(name)] = &c
	}
	p.plan.Edits = append(p.plan.Edits, edit)
	return nil
}

func (p *planner) link(name, target, reason string) error {
	before := p.View.entries[name]
	edit := p.edit("link", name, reason)
	edit.Target = target
	edit.After = sum([]byte(target))
	edit.Diff = "+" + name + " → " + target + "\n"
	switch {
	case before == nil || !before.exists && !before.isLink:
		if err := p.mkdir(path.Dir(name), reason); err != nil {
			return err
		}
	case before.exists && before.stat.Mode.IsDir() && !before.isLink:
		return fmt.Errorf("%s is a folder", name)
	case before.loaded:
		edit.Before = sum(before.content)
		edit.Diff = fmt.Sprintf("(%d bytes replaced by a link)\n", len(before.content)) + edit.Diff
	}
	edit.Label = p.labelFor(name)
	p.View.entries[name] = &entry{isLink: true, exists: p.View.exists(target), stat: Stat{Mode: 0o644}}
	p.addName(name)
	p.plan.Edits = append(p.plan.Edits, edit)
	return nil
}

// mkdir plans a folder and those above it that are missing.
func (p *planner) mkdir(name, reason string) error {
	if name == "/" || p.View.isFolder(name) {
		return nil
	}
	if p.View.exists(name) {
		return fmt.Errorf("%s is no folder", name)
	}
	if err := p.mkdir(path.Dir(name), reason); err != nil {
		return err
	}
	edit := p.edit("mkdir", name, reason)
	edit.Mode = 0o755
	if edit.Reason == "" || p.step.Action != "mkdir" {
		edit.Reason = "holds what is added below it"
	} else if m, err := p.step.mode(0o755); err == nil {
		edit.Mode = m
	}
	edit.Label = p.labelFor(name)
	p.View.entries[name] = &entry{exists: true, stat: Stat{Mode: fs.ModeDir | 0o755}, label: edit.Label}
	p.addName(name)
	p.plan.Edits = append(p.plan.Edits, edit)
	return nil
}

func (p *planner) copy(from, to, reason string) error {
	if !p.View.exists(from) {
		return nil
	}
	content, ok := p.View.content(from)
	if !ok {
		return fmt.Errorf("%s is no file that was read", from)
	}
	return p.write("copy", to, content, p.View.entries[from].stat.Mode.Perm(), reason)
}

// labelFor is the SELinux label of something new: that of the folder it lies in, as the kernel itself would give it,
// but for programs of ours. "" if the system does not use labels.
func (p *planner) labelFor(name string) string {
	if p.Facts.SELinux == "" || p.Facts.SELinux == "disabled" {
		return ""
	}
	for at := range p.View.Mounts {
		if d, ok := p.View.device(p.View.Mounts[at]); ok && d.Type == "vfat" && strings.HasPrefix(name, at+"/") {
			return "" // vfat has no attributes
		}
	}
	if name == agentPath {
		return "system_u:object_r:bin_t:s0"
	}
	for dir := path.Dir(name); ; dir = path.Dir(dir) {
		if e := p.View.entries[dir]; e != nil && e.label != "" {
			return e.label
		}
		if dir == "/" {
			return ""
		}
	}
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// wanted lists the paths the overlays name: they are read before anything is planned.
func wanted(overlays []Overlay) []string {
	var out []string
	for _, o := range overlays {
		out = append(append(out, o.When.Exists...), o.Unless.Exists...)
		for _, s := range o.Edits {
			for _, p := range []string{s.Path, s.Target} {
				if strings.HasPrefix(p, "/") && checkOverlayPath(p) == nil {
					out = append(out, p)
				}
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

var errNoAgent = errors.New("there is no test agent to install: give Request.Agent")
