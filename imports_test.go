// Package muster_test keeps the arrows of docs/architecture.md honest: which part may import which, and what a program
// may link. Every failure says why the arrow is wrong.
package muster_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/musterdr/muster/"

// The levels, lowest first. A part imports only parts of lower levels.
var levels = [][]string{
	{"dr", "database", "durable", "fileset"},
	{"image", "store", "vm", "trust", "engine", "catalog", "api", "probe", "signs", "guestfish", "backup"},
	{"capture", "prerecover", "boottest", "invoke", "files", "doctor"},
	{"agent", "appliance", "master", "silo"},
	{"portal", "metrics"},
	{"lab"},
}

// levelWhy says what an arrow that goes sideways or up breaks, by the level of the part that imports.
var levelWhy = []string{
	"dr is nouns and pure rules, database and durable are what things are kept in, fileset describes files: they know nothing else of Muster",
	"ground is ideas without policy: each stands alone over dr",
	"a stage is one verb: stages meet in the roles, through images and records",
	"roles never import roles: they meet through api, engine and store",
	"faces are clients of api",
	"lab wires everything for tests; nothing is above it",
}

// arrow is an import; either end may be "" for any.
type arrow struct{ from, to string }

// Exceptions, each with its reason. One that is not used any more fails the test.
var exceptions = map[arrow]string{
	{"store", "image"}:                                  "what a store opens is an image.Image",
	{"vm/libvirt", "probe"}:                             "both ends name the guest's port by the same constant",
	{"agent", "capture/linux/files"}:                    "the same: files one by one",
	{"agent", "capture/linux/track"}:                    "the same: where the kernel notes what is written",
	{"agent", "capture/linux/hooks"}:                    "the same: how its applications come to rest",
	{"agent", "capture/linux"}:                          "the agent is the Linux way of capturing, made a program",
	{"agent", "capture/view"}:                           "a disk at one instant is put together the same way on every system",
	{"capture/linux", "capture/view"}:                   "a disk at one instant is put together the same way on every system",
	{"capture/windows", "capture/view"}:                 "a disk at one instant is put together the same way on every system",
	{"agent", "capture/wire"}:                           "both ends of the conversation are written against its one description",
	{"capture", "capture/wire"}:                         "both ends of the conversation are written against its one description",
	{"capture/ssh", "capture/wire"}:                     "both ends of the conversation are written against its one description",
	{"capture/linux/track/cost", "capture/linux/track"}: "what tracking costs is measured on tracking itself",
	{"boottest/guest", "capture/linux"}:                 "a booted image is compared with the inventory: both are read by the same code",
}

// What a part must never lead to, over however many steps: a part of ours, or the start of a foreign import path.
var never = []struct {
	from string // below internal/ or cmd/
	to   []string
	why  string
}{
	{"cmd/muster-agent", heavy, "the agent runs as root on customers' servers: it must be small enough to audit"},
	{"cmd/muster-guest", heavy, "the test agent is put into customers' images: it must be small and start anywhere"},
	{"api", []string{"image", "store", "vm", "engine", "catalog"}, "a contract knows dr and nothing that carries it out"},
	{"master", []string{"vm", "capture", "prerecover", "boottest", "files"}, "the master decides and remembers; it cannot touch a disk or a machine"},
	{"silo", []string{"catalog", "engine", "capture"}, "a silo is told what to do; it cannot touch the master's memory"},
	{"appliance", []string{"catalog", "vm", "prerecover", "boottest"}, "the appliance has never heard of a virtual machine"},
	{"portal", []string{"catalog", "engine", "store", "image", "vm"}, "the portal is a client of the operators' API"},
	{"metrics", []string{"catalog", "engine", "store", "image", "vm", "master"}, "metrics are a form of what the API says"},
}

var heavy = []string{"store", "image", "vm", "engine", "catalog", "api", "master", "silo", "appliance", "prerecover",
	"github.com/kopia/", "github.com/dbos-inc/", "github.com/uptrace/bun", "github.com/pressly/goose", "modernc.org/sqlite",
	"github.com/danielgtaylor/huma", "github.com/digitalocean/go-libvirt", "libvirt.org/"}

// pkg is what go list says of a package.
type pkg struct {
	ImportPath, Dir string
	GoFiles         []string
	Imports, Deps   []string
}

// name is the path below internal/, or from cmd/ on.
func (p pkg) name() string { return short(p.ImportPath) }

func short(path string) string {
	return strings.TrimPrefix(strings.TrimPrefix(path, module), "internal/")
}

func packages(t *testing.T) []pkg {
	t.Helper()
	var stderr bytes.Buffer
	// -e: what does not build is the compiler's to tell.
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,GoFiles,Imports,Deps", "./...")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var all []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) < 10 {
		t.Fatalf("go list found %d packages: run the test in the repository", len(all))
	}
	return all
}

// levelOf gives the level of a first-level part, -1 if it has none.
func levelOf(part string) int {
	return slices.IndexFunc(levels, func(l []string) bool { return slices.Contains(l, part) })
}

// wrong says what is wrong with an arrow between two parts of ours, "" if nothing.
func wrong(from, to string) string {
	fromTop, fromRest, _ := strings.Cut(from, "/")
	toTop, toRest, _ := strings.Cut(to, "/")
	switch {
	case toTop == "cmd":
		return "a program is not a library"
	case fromTop == "cmd" || fromTop == "lab":
		return "" // they wire
	case toTop == "lab":
		return "lab is the whole platform for tests; nothing imports it"
	case levelOf(fromTop) < 0:
		return fmt.Sprintf("internal/%s has no place: give it one in docs/architecture.md and in the table of this test", fromTop)
	case levelOf(toTop) < 0:
		return fmt.Sprintf("internal/%s has no place: give it one in docs/architecture.md and in the table of this test", toTop)
	case toRest != "":
		return "level two is one way of doing it: only cmd, lab and tests choose a way"
	case fromTop == toTop && fromRest != "":
		return "" // a way of doing it is written against the idea
	case levelOf(fromTop) <= levelOf(toTop):
		return levelWhy[levelOf(fromTop)]
	}
	return ""
}

func TestImportsGoDown(t *testing.T) {
	used := map[arrow]bool{}
	checked := 0
	for _, p := range packages(t) {
		if !strings.HasPrefix(p.ImportPath, module) {
			continue // the module's root has only this test
		}
		for _, path := range p.Imports {
			if !strings.HasPrefix(path, module) {
				continue
			}
			checked++
			a := arrow{p.name(), short(path)}
			why := wrong(a.from, a.to)
			if why == "" {
				continue
			}
			if _, ok := exceptions[a]; !ok {
				a.from, _, _ = strings.Cut(a.from, "/") // what an idea may know, its ways may
			}
			if _, ok := exceptions[a]; ok {
				used[a] = true
				continue
			}
			t.Errorf("%s imports %s: %s", p.name(), a.to, why)
		}
	}
	if checked == 0 {
		t.Fatal("no import was checked")
	}
	for a, reason := range exceptions {
		if !used[a] {
			t.Errorf("nothing needs the exception %s → %s (%s) any more: remove it", a.from, a.to, reason)
		}
	}
}

func TestNothingLinksWhatItMustNotKnow(t *testing.T) {
	all := packages(t)
	for _, rule := range never {
		i := slices.IndexFunc(all, func(p pkg) bool { return p.name() == rule.from })
		if i < 0 {
			continue // later releases
		}
		for _, dep := range all[i].Deps {
			for _, bad := range rule.to {
				if name := short(dep); name == bad || strings.HasPrefix(name, strings.TrimSuffix(bad, "/")+"/") {
					t.Errorf("%s leads to %s: %s (go mod why, or: go list -deps ./... , shows the way)", rule.from, name, rule.why)
				}
			}
		}
	}
}

// What only these may lead to, over however many steps.
var only = []struct {
	what string
	from []string
	why  string
}{
	{"lab/cable", []string{"cmd/muster-bench"}, "it is a cable for tests and measurements"},
	{"database/pgserver", []string{"cmd/muster-bench"}, "it starts a PostgreSQL for tests and measurements; an installation is given one that somebody looks after"},
}

func TestOnlyWhoMayLeadsThere(t *testing.T) {
	all := packages(t)
	for _, rule := range only {
		for _, who := range append(rule.from, rule.what) {
			if !slices.ContainsFunc(all, func(p pkg) bool { return p.name() == who }) {
				t.Errorf("there is no %s any more: mend the rule about %s", who, rule.what)
			}
		}
		for _, p := range all {
			if slices.Contains(p.Deps, module+"internal/"+rule.what) && !slices.Contains(rule.from, p.name()) {
				t.Errorf("%s leads to %s: %s", p.name(), rule.what, rule.why)
			}
		}
	}
}

var knows = regexp.MustCompile(`(?s)\n\nKnows: .+\nMust not know: .+\.\s*$`)

func TestEveryPartSaysWhatItKnows(t *testing.T) {
	for _, p := range packages(t) {
		if !strings.HasPrefix(p.ImportPath, module+"internal/") || strings.Contains(p.name(), "/") || len(p.GoFiles) == 0 {
			continue
		}
		var docs []string
		for _, file := range p.GoFiles {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if f.Doc != nil {
				docs = append(docs, f.Doc.Text())
			}
		}
		switch {
		case len(docs) != 1:
			t.Errorf("internal/%s has %d package comments: write one", p.name(), len(docs))
		case !knows.MatchString(docs[0]):
			t.Errorf("the package comment of internal/%s does not end with the lines \"Knows: …\" and \"Must not know: …\"", p.name())
		}
	}
}

// The table itself has to be able to fail.
func TestWrongArrowsAreFound(t *testing.T) {
	for _, a := range []arrow{
		{"dr", "store"}, {"vm", "store"}, {"api", "engine"}, {"boottest", "prerecover"}, {"master", "silo"}, {"store", "capture"},
		{"silo", "vm/libvirt"}, {"vm/libvirt", "vm/sim"}, {"portal", "lab"}, {"attic", "dr"}, {"silo", "attic"}, {"silo", "cmd/muster"},
	} {
		if wrong(a.from, a.to) == "" {
			t.Errorf("%s → %s was taken for right", a.from, a.to)
		}
	}
	for _, a := range []arrow{
		{"store", "dr"}, {"silo", "vm"}, {"vm/libvirt", "vm"}, {"vm/libvirt", "dr"}, {"cmd/muster", "vm/libvirt"}, {"lab", "vm/sim"}, {"portal", "api"},
	} {
		if why := wrong(a.from, a.to); why != "" {
			t.Errorf("%s → %s was taken for wrong: %s", a.from, a.to, why)
		}
	}
}
