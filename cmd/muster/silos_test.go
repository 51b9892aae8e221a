package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/lab"
)

// at gives the command line of a lab.
func at(t *testing.T, l *lab.Lab) func(args ...string) (string, error) {
	t.Helper()
	t.Setenv("MUSTER_DIR", l.Dir)
	root := rootCommand()
	if err := root.ParseFlags(nil); err != nil {
		t.Fatal(err)
	}
	socket := apiSocket(installation(root))
	if err := os.MkdirAll(filepath.Dir(socket), 0o711); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(l.Dir, "api.sock"), socket); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(filepath.Dir(socket)) })
	return func(args ...string) (string, error) {
		cmd := rootCommand()
		var out bytes.Buffer
		cmd.SetOut(&out)
		cmd.SetErr(&out)
		cmd.SetArgs(args)
		err := cmd.ExecuteContext(t.Context())
		return out.String(), err
	}
}

func TestAnOperatorSeesWhatSilosDo(t *testing.T) {
	l := lab.New(t, lab.Healthy, "east", "west")
	disk := filepath.Join(l.Dir, "shop.raw")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	muster := at(t, l)
	if _, err := l.AddServer(t.Context(), dr.Server{Name: "shop", Source: dr.Source{Disks: []string{disk}}, Schedule: dr.Schedule{Every: time.Hour}}); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		args string
		want []string
		code int
	}{
		{"silo list", []string{"SILO", "east", "west", "active", "emulation", "56.0 GiB"}, 0},
		{"snapshot shop", []string{"PASS"}, 0},
		{"server show shop", []string{"at once on   silo ", "ran on ", ", silo "}, 0},
		{"invoke shop --yes --reason fire", []string{"machine", " on silo "}, 0},
		{"silo drain east --reason disks", []string{"Silo east takes no new work."}, 0},
		{"silo drain west", []string{"Silo west takes no new work."}, 0},
		{"silo list", []string{"draining"}, 0},
		{"invocation end shop --abandon --reason off", []string{}, exitRefused},
		{"invocation end shop --discard", []string{"ended"}, 0},
		{"silo show west", []string{"silo         west: draining, connected", "work         none"}, 0},
		{"silo resume west", []string{"Silo west takes work again."}, 0},
		{"silo remove west", []string{}, exitRefused},
		{"silo show north", []string{}, exitNotFound},
	} {
		out, err := muster(strings.Fields(step.args)...)
		t.Logf("muster %s\n%s%v", step.args, out, err)
		code := 0
		if err != nil {
			code = exitCode(err)
		}
		if code != step.code {
			t.Errorf("muster %s: exit code %d, want %d: %v", step.args, code, step.code, err)
		}
		for _, want := range step.want {
			if !strings.Contains(out, want) {
				t.Errorf("muster %s does not say %q:\n%s", step.args, want, out)
			}
		}
	}
}
