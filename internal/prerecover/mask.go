package prerecover

import (
	"path"
	"regexp"
	"slices"
	"strings"
)

// unitDirs are where services are installed, as systemd looks for them.
var unitDirs = []string{"/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

// maskUnits keeps services from starting, whatever starts the system. Names may hold * and ?.
func (p *planner) maskUnits(s Step) error {
	switch p.Facts.Init {
	case "systemd":
		return p.maskSystemd(s.Units)
	case "openrc":
		return p.unlinkServices(p.runlevels(), s.Units, func(n string) string { return n })
	case "sysv":
		return p.unlinkServices(sysvLevels(p.View), s.Units, sysvName)
	}
	return nil
}

// maskSystemd points the unit at nothing. Only what is installed is masked, so that the list of edits stays readable.
func (p *planner) maskSystemd(globs []string) error {
	for _, unit := range p.installedUnits(globs) {
		name := "/etc/systemd/system/" + unit
		if e := p.View.entries[name]; e != nil && e.isLink && !e.exists {
			continue // masked, or dangling: either way it does not start
		}
		if err := p.link(name, "/dev/null", unit+": "+strings.TrimSpace(p.overlay.Reason)); err != nil {
			return err
		}
	}
	return nil
}

// installedUnits are the units that match and that systemd would find, among them those it makes of init scripts.
func (p *planner) installedUnits(globs []string) []string {
	var units []string
	add := func(unit string) {
		if plainName(unit) && matchUnit(globs, unit) {
			units = append(units, unit)
		}
	}
	for _, dir := range unitDirs {
		for _, n := range p.View.names(dir) {
			if strings.HasSuffix(n, ".service") || strings.HasSuffix(n, ".timer") || strings.HasSuffix(n, ".path") || strings.HasSuffix(n, ".socket") {
				add(n)
			}
		}
	}
	for _, n := range p.View.names("/etc/init.d") {
		add(n + ".service")
	}
	slices.Sort(units)
	return slices.Compact(units)
}

// matchUnit compares a unit with globs that may leave out ".service".
func matchUnit(globs []string, unit string) bool {
	return slices.ContainsFunc(globs, func(g string) bool {
		if path.Ext(g) == "" || !slices.Contains([]string{".service", ".timer", ".path", ".socket"}, path.Ext(g)) {
			g += ".service"
		}
		ok, _ := path.Match(g, unit)
		return ok
	})
}

func (p *planner) runlevels() []string {
	var dirs []string
	for _, l := range p.View.names("/etc/runlevels") {
		dirs = append(dirs, "/etc/runlevels/"+l)
	}
	return dirs
}

// sysvLevels are the folders of start links.
func sysvLevels(v *View) []string {
	var dirs []string
	for _, l := range "S0123456" {
		for _, d := range []string{"/etc/rc" + string(l) + ".d", "/etc/rc.d/rc" + string(l) + ".d"} {
			if v.isFolder(d) && !v.entries[d].isLink {
				dirs = append(dirs, d)
			}
		}
	}
	return dirs
}

var sysvRE = regexp.MustCompile(`^S[0-9]{2}(.+)$`)

// sysvName is the service a start link starts.
func sysvName(link string) string {
	if m := sysvRE.FindStringSubmatch(link); m != nil {
		return m[1]
	}
	return ""
}

// unlinkServices removes the links that start a service.
func (p *planner) unlinkServices(dirs, globs []string, service func(link string) string) error {
	for _, dir := range dirs {
		for _, n := range slices.Clone(p.View.names(dir)) {
			name := service(n)
			if !plainName(n) || name == "" || !matchUnit(globs, name+".service") {
				continue
			}
			link := dir + "/" + n
			if p.View.entries[link] == nil {
				p.View.entries[link] = &entry{isLink: true} // it was listed, so it is there
			}
			if err := p.remove(link, name+": "+strings.TrimSpace(p.overlay.Reason)); err != nil {
				return err
			}
		}
	}
	return nil
}
