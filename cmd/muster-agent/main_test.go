package main

import (
	"debug/elf"
	"debug/pe"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/capture/wire"
)

// What runs as root on other people's servers must be small enough to read.
func TestTheAgentLinksNothingThatItDoesNotNeed(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	if len(deps) < 50 {
		t.Fatalf("go list found only %d packages", len(deps))
	}
	allowed := map[string]bool{}
	for _, p := range []string{"agent", "capture/linux", "capture/linux/files", "capture/linux/hooks", "capture/linux/track", "capture/view", "capture/wire", "dr", "fileset", "signs"} {
		allowed["github.com/musterdr/muster/internal/"+p] = true
	}
	for _, dep := range deps {
		if strings.HasPrefix(dep, "github.com/musterdr/muster/internal/") && !allowed[dep] {
			t.Errorf("%s: the agent is to use only its own role, capture/linux, capture/wire, fileset, signs and dr", dep)
		}
		for _, heavy := range []string{"golang.org/x/crypto", "github.com/kopia", "database/sql", "github.com/danielgtaylor/huma", "net/http"} {
			if dep == heavy || strings.HasPrefix(dep, heavy+"/") {
				t.Errorf("%s: not on a protected server", dep)
			}
		}
	}
}

// Nothing here runs on Windows, so what can be said is that it builds.
func TestTheAgentBuildsForWindows(t *testing.T) {
	program := filepath.Join(t.TempDir(), "muster-agent.exe")
	build := exec.Command("go", "build", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=windows", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	f, err := pe.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Machine != pe.IMAGE_FILE_MACHINE_AMD64 {
		t.Errorf("it is for machine %#x", f.Machine)
	}
}

func TestTheAgentIsStaticAndRunsFromMemory(t *testing.T) {
	program := filepath.Join(t.TempDir(), "muster-agent")
	build := exec.Command("go", "build", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	f, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			t.Error("the agent needs a dynamic linker")
		}
	}
	serve := exec.Command(program, "serve")
	in, err := serve.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := serve.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = serve.Process.Kill() }()
	if err := wire.NewReader(out).Greeting(); err != nil {
		t.Fatal(err)
	}
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", serve.Process.Pid)); err != nil || !strings.HasPrefix(exe, "/memfd:") {
		t.Errorf("the agent runs from %s, %v", exe, err)
	}
	in.Close()
	if err := serve.Wait(); err != nil {
		t.Errorf("the agent ended with %v when its input did", err)
	}
}
