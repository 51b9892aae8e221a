package prerecover

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/dr"
)

const goodHead = "name: my-app\nversion: 3\nreason: licences\nreverse: undo\n"

func TestAnErrorInAnOverlayNamesFileLineAndColumn(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"a syntax error", goodHead + "edits:\n  - action: [\n", ":"},
		{"an unknown key", goodHead + "wehn: {}\nedits:\n  - {action: remove, path: /a}\n", `:5:1: unknown field "wehn"`},
		{"an unknown key in an edit", goodHead + "edits:\n  - action: remove\n    paht: /a\n", `:7:5: unknown field "paht"`},
		{"a key given twice", goodHead + "name: again\n", ":5:1: "},
		{"a wrong type", strings.Replace(goodHead, "3", "three", 1), ":2:10: "},
		{"a path that climbs", goodHead + "edits:\n  - action: remove\n    path: /etc/../../x\n", ":7:11: edit 1: path: "},
		{"a path that is relative", goodHead + "edits:\n  - action: remove\n    path: etc/x\n", ":7:11: "},
		{"a path in /proc", goodHead + "edits:\n  - action: remove\n    path: /proc/x\n", ":7:11: "},
		{"a path with a line end", goodHead + "edits:\n  - action: remove\n    path: \"/a\\nb\"\n", ":7:11: "},
		{"no such action", goodHead + "edits:\n  - action: run\n", ":6:13: edit 1: action: \"run\" is none of"},
		{"a field the action does not use", goodHead + "edits:\n  - action: remove\n    path: /a\n    mode: \"0644\"\n", ":8:11: "},
		{"a field that is missing", goodHead + "edits:\n  - action: link\n    path: /a\n", ": edit 1: target: link needs it"},
		{"a mode that is too much", goodHead + "edits:\n  - {action: chmod, path: /a, mode: \"4755\"}\n", ":6:37: "},
		{"an unknown variable", goodHead + "edits:\n  - action: write\n    path: /a\n    template: \"{{ shell }}\"\n", ":8:15: edit 1: template: there is no variable \"shell\""},
		{"a bad expression", goodHead + "edits:\n  - {action: replace, path: /a, find: \"(\"}\n", ":6:39: "},
		{"a bad condition", goodHead + "when:\n  init: [upstart]\nedits:\n  - {action: remove, path: /a}\n", ":6:10: when.init[0]: "},
		{"a bad name", strings.Replace(goodHead, "my-app", "../x", 1), ":1:7: name"},
		{"no version", strings.Replace(goodHead, "version: 3\n", "", 1), ": version 0"},
		{"no reverse", "name: x\nversion: 1\nreason: y\nedits: []\n", ": reverse: say how"},
		{"no edits", goodHead, ": edits: give 1"},
		{"an alias", "name: &a x\nversion: 1\nreason: *a\n", ":1:7: anchors"},
		{"two documents", goodHead + "---\n" + goodHead, ":1:1: a file holds exactly one overlay"},
		{"nothing", "", ":1:1: "},
		{"a kernel argument with a space", goodHead + "edits:\n  - {action: kernel-args, args: [\"a b\"]}\n", ": edit 1: args[0]: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseOverlay("/o/x.yaml", []byte(c.text))
			if err == nil {
				t.Fatal("it was taken")
			}
			if !regexp.MustCompile(`^/o/x\.yaml:\d+:\d+: `).MatchString(err.Error()) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error = %v", err)
			}
		})
	}
}

func TestOverlaysComeFromAFolderInOrder(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	edit := "edits:\n  - {action: remove, path: /a}\n"
	write("20-b.yaml", strings.Replace(goodHead, "my-app", "b", 1)+edit)
	write("10-a.yml", strings.Replace(goodHead, "my-app", "a", 1)+edit)
	write("notes.txt", "not an overlay")
	got, err := LoadOverlays(dir)
	if err != nil || len(got) != 2 || got[0].ID() != "a@3" || got[1].ID() != "b@3" {
		t.Fatalf("overlays = %+v, %v", got, err)
	}
	write("30-c.yaml", strings.Replace(goodHead, "my-app", "a", 1)+edit)
	write("40-d.yaml", strings.Replace(goodHead, "my-app", "fstab-by-uuid", 1)+edit)
	write("50-e.yaml", "name: [")
	_, err = LoadOverlays(dir)
	if err == nil || !strings.Contains(err.Error(), "30-c.yaml: the name a is already taken") || !strings.Contains(err.Error(), "standard overlays") ||
		!strings.Contains(err.Error(), "50-e.yaml:1:") {
		t.Errorf("not every error is told: %v", err)
	}
	if got, err := LoadOverlays(""); err != nil || got != nil {
		t.Errorf("no folder: %v, %v", got, err)
	}
	if _, err := LoadOverlays(filepath.Join(dir, "none")); err == nil {
		t.Error("a folder that is not there is no error")
	}
}

func plan(t *testing.T, v *View, facts dr.Facts, edits string) (Plan, error) {
	t.Helper()
	o, err := ParseOverlay("x.yaml", []byte(goodHead+edits))
	if err != nil {
		t.Fatal(err)
	}
	return PlanEdits(PlanInput{View: v, Facts: facts, Overlays: []Overlay{o}, Agent: []byte("agent")})
}

func TestConditionsDecideWhetherAnOverlayApplies(t *testing.T) {
	v := NewView().WithFile("/etc/app.conf", []byte("x"))
	facts := dr.Facts{Init: "systemd", Firmware: dr.UEFI, Hostname: "shop", Distro: dr.Distro{ID: "rocky", Like: []string{"rhel"}, Version: "9.4"}}
	for when, want := range map[string]bool{
		"when: {distro: [debian, rhel]}": true, "when: {distro: [debian]}": false, "when: {version: [\"9\"]}": true,
		"when: {version: [\"9.4\"]}": true, "when: {version: [\"8\"]}": false, "when: {exists: [/none, /etc/app.conf]}": true,
		"when: {exists: [/none]}": false, "when: {init: [systemd], firmware: [bios]}": false, "unless: {hostname: [shop]}": false,
		"unless: {hostname: [other]}": true, "when: {distro: [rocky]}\nunless: {exists: [/etc/app.conf]}": false,
	} {
		p, err := plan(t, v, facts, when+"\nedits:\n  - {action: write, path: /etc/new, content: x}\n")
		if err != nil || (len(p.Edits) > 0) != want {
			t.Errorf("%s: %d edits, %v", when, len(p.Edits), err)
		}
	}
}

func TestEditsOfACustomersOverlay(t *testing.T) {
	v := NewView().WithFile("/etc/app.conf", []byte("key=old\nother=1\nkey=old2\n")).WithFolder("/etc/dir").WithFolder("/opt")
	facts := dr.Facts{Hostname: "shop"}
	p, err := plan(t, v, facts, `edits:
  - {action: replace, path: /etc/app.conf, find: "^key=(.*)$", with: "key=new-$1"}
  - {action: replace, path: /etc/app.conf, find: "^other=1$", with: "other=2"}
  - {action: write, path: /opt/a/b/motd, template: "on {{ hostname }} {{unknown_braces", mode: "0600"}
  - {action: write, path: /etc/none, content: x, create: false}
  - {action: copy, path: /etc/app.conf, target: /etc/app.copy}
  - {action: chmod, path: /etc/app.conf, mode: "0640"}
  - {action: link, path: /etc/link, target: ../relative}
  - {action: remove, path: /etc/none}
  - {action: mkdir, path: /srv/x, mode: "0700"}
`)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range p.Edits {
		got = append(got, e.Action+" "+e.Path)
	}
	want := "replace /etc/app.conf|replace /etc/app.conf|mkdir /opt/a|mkdir /opt/a/b|write /opt/a/b/motd|copy /etc/app.copy|chmod /etc/app.conf|link /etc/link|mkdir /srv|mkdir /srv/x"
	if strings.Join(got, "|") != want {
		t.Errorf("edits = %s", strings.Join(got, "|"))
	}
	if text := string(p.Edits[1].Content); text != "key=new-old\nother=2\nkey=new-old2\n" || p.Edits[1].Before != p.Edits[0].After {
		t.Errorf("the second edit does not build on the first: %q", text)
	}
	if p.Edits[4].Mode != 0o600 || string(p.Edits[4].Content) != "on shop {{unknown_braces" {
		t.Errorf("template gave %q", p.Edits[4].Content)
	}
	if d := p.Edits[1].Diff; d != "-other=1\n+other=2\n" {
		t.Errorf("diff = %q", d)
	}
	for _, bad := range []string{"{action: write, path: /etc/dir, content: x}", "{action: remove, path: /etc/dir}", "{action: write, path: /etc/app.conf/x, content: x}",
		"{action: replace, path: /etc/dir, find: x}"} {
		if _, err := plan(t, v, facts, "edits:\n  - "+bad+"\n"); err == nil {
			t.Errorf("%s was planned", bad)
		}
	}
}

func TestATemplateCannotBeBrokenOutOf(t *testing.T) {
	o := "edits:\n  - {action: write, path: /etc/new, template: \"name={{hostname}}\"}\n"
	if _, err := plan(t, NewView(), dr.Facts{Hostname: "a\nevil=1"}, o); err == nil {
		t.Error("a value of two lines was put in")
	}
	p, err := plan(t, NewView(), dr.Facts{Hostname: "{{kernel}}$(id)"}, o)
	if err != nil || string(p.Edits[len(p.Edits)-1].Content) != "name={{kernel}}$(id)" {
		t.Errorf("a value was read again: %+v, %v", p.Edits, err)
	}
}

func TestWithoutAnAgentThereIsNoRescueImage(t *testing.T) {
	_, err := PlanEdits(PlanInput{View: NewView(), Overlays: Standard()})
	if !errors.Is(err, errNoAgent) {
		t.Errorf("error = %v", err)
	}
}

func FuzzOverlay(f *testing.F) {
	f.Add([]byte(goodHead + "edits:\n  - {action: write, path: /etc/new, template: \"{{hostname}}\"}\n"))
	f.Add([]byte(goodHead + "when: {exists: [/a]}\nedits:\n  - {action: replace, path: /a, find: \".\", with: \"$0$0\"}\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		o, err := ParseOverlay("f", content)
		if err != nil {
			return
		}
		v := table().WithFile("/etc/fstab", []byte("/dev/sda2 / ext4\n")).WithFile("/a", []byte("content\n"))
		p, err := PlanEdits(PlanInput{View: v, Overlays: []Overlay{o}, Agent: []byte("x")})
		if err != nil {
			return
		}
		for _, e := range p.Edits {
			if checkOverlayPath(e.Path) != nil {
				t.Errorf("edit of %q", e.Path)
			}
		}
	})
}
