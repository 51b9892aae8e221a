package prerecover

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"

	"github.com/musterdr/muster/internal/dr"
)

// Overlay is a named, versioned, reversible set of edits. It is data: it can say what is to be changed, never run
// anything. docs/formats/overlay.md describes the file.
type Overlay struct {
	Name    string `yaml:"name"`
	Version int    `yaml:"version"`
	Reason  string `yaml:"reason"` // why, for people: it is shown with every edit
	When    When   `yaml:"when"`   // all of it must hold
	Unless  When   `yaml:"unless"` // if it says anything and all of it holds, the overlay does not apply
	Edits   []Step `yaml:"edits"`
	Reverse string `yaml:"reverse"` // how failback takes it back

	file string // where it came from, for messages
}

// ID is the name and version, as edits carry it.
func (o Overlay) ID() string { return o.Name + "@" + strconv.Itoa(o.Version) }

// When is a condition on what was found. Each list that is given must hold one of its entries.
type When struct {
	Distro   []string `yaml:"distro"`   // ID or ID_LIKE of os-release
	Version  []string `yaml:"version"`  // VERSION_ID, whole or its first number
	Init     []string `yaml:"init"`     // systemd, openrc, sysv
	Firmware []string `yaml:"firmware"` // bios, uefi
	Network  []string `yaml:"network"`  // ifupdown, netplan, networkd, networkmanager, ifcfg, wicked
	SELinux  []string `yaml:"selinux"`  // enforcing, permissive, disabled
	Hostname []string `yaml:"hostname"`
	Exists   []string `yaml:"exists"` // paths; one is enough
}

// Step is one edit of an overlay, or one built-in action that works out its edits itself.
type Step struct {
	Action   string   `yaml:"action"`
	Path     string   `yaml:"path"`
	Content  string   `yaml:"content"`  // write: as it stands
	Template string   `yaml:"template"` // write: with {{variable}} replaced; see Variables
	Find     string   `yaml:"find"`     // replace: regular expression (RE2), line by line
	With     string   `yaml:"with"`     // replace: what comes in its place; $1 is the first group
	Target   string   `yaml:"target"`   // link: where it leads; copy: where to
	Mode     string   `yaml:"mode"`     // write, mkdir, chmod: octal, at most 0777
	Create   *bool    `yaml:"create"`   // write: false leaves alone what is not there
	Reason   string   `yaml:"reason"`   // of this edit, if it differs from the overlay's
	Units    []string `yaml:"units"`    // mask-units: names of services; * and ? match
	Args     []string `yaml:"args"`     // kernel-args: what to add
}

// Limits of overlays.
const (
	maxOverlayFile = 256 << 10
	maxOverlays    = 128
	maxSteps       = 128
	maxContent     = 128 << 10
	maxNames       = 256 // entries of any list
)

//go:embed overlays/*.yaml
var standardFiles embed.FS

// Standard gives the overlays that come with this release, in the order in which they are applied.
func Standard() []Overlay {
	entries, err := standardFiles.ReadDir("overlays")
	if err != nil {
		panic("prerecover: " + err.Error())
	}
	var all []Overlay
	for _, e := range entries { // sorted by name
		content, err := standardFiles.ReadFile("overlays/" + e.Name())
		if err != nil {
			panic("prerecover: " + err.Error())
		}
		o, err := ParseOverlay(e.Name(), content)
		if err != nil {
			panic("prerecover: " + err.Error())
		}
		all = append(all, o)
	}
	return all
}

// LoadOverlays reads a customer's own overlays, every *.yaml in a folder in the order of their names. A folder that is
// not there is an error; "" is no folder and no overlay.
func LoadOverlays(dir string) ([]Overlay, error) {
	if dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read overlays: %w", err)
	}
	var all []Overlay
	var errs []error
	names := map[string]string{}
	for _, o := range Standard() {
		names[o.Name] = "the standard overlays"
	}
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); ext != ".yaml" && ext != ".yml" || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		file := filepath.Join(dir, e.Name())
		o, err := loadOverlay(file)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if other, taken := names[o.Name]; taken {
			errs = append(errs, fmt.Errorf("%s: the name %s is already taken by %s", file, o.Name, other))
			continue
		}
		names[o.Name] = file
		all = append(all, o)
	}
	if len(all) > maxOverlays {
		errs = append(errs, fmt.Errorf("read overlays: %s holds more than %d", dir, maxOverlays))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return all, nil
}

func loadOverlay(file string) (Overlay, error) {
	info, err := os.Stat(file)
	if err != nil {
		return Overlay{}, fmt.Errorf("read overlay: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxOverlayFile {
		return Overlay{}, fmt.Errorf("%s: an overlay is a file of at most %d bytes", file, maxOverlayFile)
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return Overlay{}, fmt.Errorf("read overlay: %w", err)
	}
	return ParseOverlay(file, content)
}

// ParseOverlay reads one overlay. Errors begin with FILE:LINE:COLUMN.
func ParseOverlay(file string, content []byte) (Overlay, error) {
	if len(content) > maxOverlayFile {
		return Overlay{}, fmt.Errorf("%s: an overlay is at most %d bytes long", file, maxOverlayFile)
	}
	tree, err := parser.ParseBytes(content, 0)
	if err != nil {
		return Overlay{}, yamlError(file, err)
	}
	if len(tree.Docs) != 1 || tree.Docs[0].Body == nil {
		return Overlay{}, fmt.Errorf("%s:1:1: a file holds exactly one overlay", file)
	}
	v := &plainYAML{file: file}
	ast.Walk(v, tree.Docs[0].Body)
	if v.err != nil {
		return Overlay{}, v.err
	}
	var o Overlay
	if err := yaml.NodeToValue(tree.Docs[0].Body, &o, yaml.Strict()); err != nil {
		return Overlay{}, yamlError(file, err)
	}
	o.file = file
	if at, err := o.validate(); err != nil {
		line, column := position(tree, at)
		return Overlay{}, fmt.Errorf("%s:%d:%d: %w", file, line, column, err)
	}
	return o, nil
}

// yamlError puts the place in front of what the YAML library says.
func yamlError(file string, err error) error {
	var y yaml.Error
	if errors.As(err, &y) && y.GetToken() != nil && y.GetToken().Position != nil {
		p := y.GetToken().Position
		return fmt.Errorf("%s:%d:%d: %s", file, p.Line, p.Column, y.GetMessage())
	}
	text, _, _ := strings.Cut(err.Error(), "\n")
	return fmt.Errorf("%s:1:1: %s", file, text)
}

// position finds where in the file a field stands; of one that is missing, where what should hold it begins.
func position(tree *ast.File, at string) (line, column int) {
	for ; at != ""; at = at[:max(strings.LastIndexAny(at, ".["), 0)] {
		p, err := yaml.PathString(at)
		if err != nil {
			break
		}
		node, err := p.FilterFile(tree)
		if err == nil && node != nil && node.GetToken() != nil {
			return node.GetToken().Position.Line, node.GetToken().Position.Column
		}
	}
	return 1, 1
}

// plainYAML refuses what makes a short file long or its meaning surprising: anchors, aliases, merges and tags.
type plainYAML struct {
	file string
	err  error
}

func (v *plainYAML) Visit(n ast.Node) ast.Visitor {
	if v.err != nil {
		return nil
	}
	switch n.(type) {
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode, *ast.TagNode:
		p := n.GetToken().Position
		v.err = fmt.Errorf("%s:%d:%d: anchors, aliases, merges and tags are not allowed in an overlay", v.file, p.Line, p.Column)
		return nil
	}
	return v
}

var (
	overlayNameRE = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$`)
	unitGlobRE    = regexp.MustCompile(`^[A-Za-z0-9@_.*?-]{1,128}$`)
	kernelArgRE   = regexp.MustCompile(`^[A-Za-z0-9_.,:=/+-]{1,128}$`)
)

// validate says what is wrong first, and where: a path as the YAML library writes it.
func (o Overlay) validate() (at string, err error) {
	switch {
	case !overlayNameRE.MatchString(o.Name):
		return "$.name", fmt.Errorf("name %q: use 1 to 64 of a-z, 0-9 and '-'", o.Name)
	case o.Version < 1 || o.Version > 1_000_000:
		return "$.version", fmt.Errorf("version %d: use a whole number from 1", o.Version)
	case strings.TrimSpace(o.Reason) == "" || len(o.Reason) > dr.MaxCheckText:
		return "$.reason", errors.New("reason: say in a sentence why this is changed")
	case strings.TrimSpace(o.Reverse) == "" || len(o.Reverse) > dr.MaxCheckText:
		return "$.reverse", errors.New("reverse: say how failback takes this back")
	case len(o.Edits) == 0 || len(o.Edits) > maxSteps:
		return "$.edits", fmt.Errorf("edits: give 1 to %d", maxSteps)
	}
	if field, err := o.When.validate(); err != nil {
		return "$.when" + field, fmt.Errorf("when%s: %w", field, err)
	}
	if field, err := o.Unless.validate(); err != nil {
		return "$.unless" + field, fmt.Errorf("unless%s: %w", field, err)
	}
	for i, s := range o.Edits {
		if field, err := s.validate(); err != nil {
			return fmt.Sprintf("$.edits[%d].%s", i, field), fmt.Errorf("edit %d: %s: %w", i+1, field, err)
		}
	}
	return "", nil
}

func (w When) lists() map[string][]string {
	return map[string][]string{".distro": w.Distro, ".version": w.Version, ".init": w.Init, ".firmware": w.Firmware,
		".network": w.Network, ".selinux": w.SELinux, ".hostname": w.Hostname, ".exists": w.Exists}
}

var whenValues = map[string][]string{
	".init": {"systemd", "openrc", "sysv"}, ".firmware": {"bios", "uefi"},
	".network": {"ifupdown", "netplan", "networkd", "networkmanager", "ifcfg", "wicked"},
	".selinux": {"enforcing", "permissive", "disabled"},
}

func (w When) validate() (field string, err error) {
	lists := w.lists()
	for _, name := range slices.Sorted(maps.Keys(lists)) {
		list := lists[name]
		if len(list) > maxNames {
			return name, fmt.Errorf("more than %d entries", maxNames)
		}
		for i, v := range list {
			at := fmt.Sprintf("%s[%d]", name, i)
			if allowed := whenValues[name]; allowed != nil && !slices.Contains(allowed, v) {
				return at, fmt.Errorf("%q: use %s", v, strings.Join(allowed, ", "))
			}
			if name == ".exists" {
				if err := checkOverlayPath(v); err != nil {
					return at, err
				}
			}
		}
	}
	return "", nil
}

func (w When) empty() bool {
	for _, list := range w.lists() {
		if len(list) > 0 {
			return false
		}
	}
	return true
}

// fieldsOf says which fields an action uses: those before the bar must be given.
var fieldsOf = map[string]string{
	"write": "path|content,template,mode,create", "replace": "path,find|with", "remove": "path|", "link": "path,target|",
	"mkdir": "path|mode", "copy": "path,target|", "move": "path,target|", "chmod": "path,mode|",
	"mask-units": "units|", "kernel-args": "args|",
	"fstab-by-uuid": "|", "crypttab-by-uuid": "|", "cmdline-by-uuid": "|", "fstab-absent-nofail": "|", "pin-nics": "|",
	"esp-fallback": "|", "install-agent": "|",
}

func (s Step) given() map[string]bool {
	return map[string]bool{"path": s.Path != "", "content": s.Content != "", "template": s.Template != "", "find": s.Find != "",
		"with": s.With != "", "target": s.Target != "", "mode": s.Mode != "", "create": s.Create != nil,
		"units": len(s.Units) > 0, "args": len(s.Args) > 0}
}

func (s Step) validate() (field string, err error) {
	spec, known := fieldsOf[s.Action]
	if !known {
		return "action", fmt.Errorf("%q is none of: %s", s.Action, strings.Join(slices.Sorted(maps.Keys(fieldsOf)), ", "))
	}
	must, may, _ := strings.Cut(spec, "|")
	given := s.given()
	for _, f := range strings.Split(must, ",") {
		if f != "" && !given[f] {
			return f, fmt.Errorf("%s needs it", s.Action)
		}
	}
	for _, f := range slices.Sorted(maps.Keys(given)) {
		if given[f] && !slices.Contains(strings.Split(must+","+may, ","), f) {
			return f, fmt.Errorf("%s does not use it", s.Action)
		}
	}
	if s.Path != "" {
		if err := checkOverlayPath(s.Path); err != nil {
			return "path", err
		}
	}
	return s.validateValues()
}

func (s Step) validateValues() (field string, err error) {
	switch {
	case s.Content != "" && s.Template != "":
		return "template", errors.New("give content or template, not both")
	case len(s.Content) > maxContent || len(s.Template) > maxContent:
		return "content", fmt.Errorf("longer than %d bytes", maxContent)
	case strings.ContainsRune(s.Content+s.Template+s.With, 0):
		return "content", errors.New("it holds a zero byte")
	case len(s.Units) > maxNames || len(s.Args) > maxNames:
		return "units", fmt.Errorf("more than %d entries", maxNames)
	}
	if _, err := expand(s.Template, exampleVariables); err != nil {
		return "template", err
	}
	if _, err := regexp.Compile("(?m)" + s.Find); err != nil || len(s.Find) > dr.MaxCheckText {
		return "find", errors.New("it is not a regular expression of at most 4096 bytes (RE2)")
	}
	if _, err := s.mode(0); err != nil {
		return "mode", err
	}
	if s.Target != "" {
		if s.Action != "link" {
			err = checkOverlayPath(s.Target)
		} else if len(s.Target) > MaxPath || strings.ContainsRune(s.Target, 0) {
			err = errors.New("it is too long or holds a zero byte")
		}
		if err != nil {
			return "target", err
		}
	}
	for i, u := range s.Units {
		if _, err := path.Match(u, ""); err != nil || !unitGlobRE.MatchString(u) {
			return fmt.Sprintf("units[%d]", i), fmt.Errorf("%q is not the name of a service", u)
		}
	}
	for i, a := range s.Args {
		if !kernelArgRE.MatchString(a) {
			return fmt.Sprintf("args[%d]", i), fmt.Errorf("%q is not a plain kernel argument", a)
		}
	}
	return "", nil
}

// mode reads the octal mode, or gives what it is otherwise.
func (s Step) mode(otherwise fs.FileMode) (fs.FileMode, error) {
	if s.Mode == "" {
		return otherwise, nil
	}
	n, err := strconv.ParseUint(s.Mode, 8, 32)
	if err != nil || n > 0o777 {
		return 0, fmt.Errorf("%q: use an octal mode up to 0777, in quotes", s.Mode)
	}
	return fs.FileMode(n), nil
}

// checkOverlayPath accepts absolute, clean paths below the root that name files a boot would not replace anyway.
func checkOverlayPath(p string) error {
	switch {
	case len(p) > MaxPath:
		return fmt.Errorf("a path is at most %d bytes long", MaxPath)
	case !strings.HasPrefix(p, "/") || path.Clean(p) != p || p == "/":
		return fmt.Errorf("%q: use an absolute path without '..', '.' or doubled '/'", p)
	case strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("%q: control characters are not allowed", p)
	}
	for _, dir := range []string{"/proc", "/sys", "/dev", "/run"} {
		if p == dir || strings.HasPrefix(p, dir+"/") {
			return fmt.Errorf("%q: %s is made anew by every boot", p, dir)
		}
	}
	return nil
}
