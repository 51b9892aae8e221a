package backup

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"
)

// folder is a folder with two files, one of which is left out.
func folder(t *testing.T) Contents {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "master")
	for name, content := range map[string]string{"keys/key": "secret", "left-out": strings.Repeat("x", 1000)} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(content), 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	return Contents{Dir: dir, Release: "1", Kind: "test", Skip: func(name string) bool { return name == "left-out" },
		Copies: []Copy{{Name: "database", Make: func(_ context.Context, path string) error { return os.WriteFile(path, []byte("rows"), 0o600) }}}}
}

func identity(t *testing.T) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestABackupIsTakenOutAsItWasPutIn(t *testing.T) {
	t.Parallel()
	c, id := folder(t), identity(t)
	for name, by := range map[string][]age.Identity{"with a key to read it back": {id}, "without": nil} {
		file := filepath.Join(t.TempDir(), "backup")
		m, err := Write(t.Context(), file, c, []age.Recipient{id.Recipient()}, by)
		if err != nil || len(m.Files) != 2 {
			t.Fatalf("%s: %+v, %v", name, m, err)
		}
		to := filepath.Join(t.TempDir(), "new")
		if _, err := Unpack(file, to, []age.Identity{id}); err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]string{"keys/key": "secret", "database": "rows"} {
			if got, err := os.ReadFile(filepath.Join(to, name)); err != nil || string(got) != want {
				t.Errorf("%s holds %q, %v", name, got, err)
			}
		}
		if info, err := os.Stat(filepath.Join(to, "keys/key")); err != nil || info.Mode().Perm() != 0o640 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
		if _, err := os.Stat(filepath.Join(to, "left-out")); err == nil {
			t.Error("what was to be left out is there")
		}
		if _, err := Write(t.Context(), file, c, []age.Recipient{id.Recipient()}, nil); err == nil {
			t.Error("a backup was overwritten")
		}
	}
	if left, _ := filepath.Glob(filepath.Join(c.Dir, ".backup-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestADamagedBackupIsTakenOutInNoPart(t *testing.T) {
	t.Parallel()
	c, id := folder(t), identity(t)
	file := filepath.Join(t.TempDir(), "backup")
	if _, err := Write(t.Context(), file, c, []age.Recipient{id.Recipient()}, nil); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(t.TempDir(), "new")
	for at := 0; at < len(whole); at += 97 {
		damaged := append([]byte(nil), whole...)
		damaged[at] ^= 1
		for what, content := range map[string][]byte{"flipped": damaged, "cut": whole[:at]} {
			if err := os.WriteFile(file, content, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Unpack(file, to, []age.Identity{id}); err == nil {
				t.Fatalf("%s at byte %d, and taken for whole", what, at)
			}
			if _, err := os.Stat(to); !errors.Is(err, os.ErrNotExist) {
				t.Fatalf("%s at byte %d: something was left: %v", what, at, err)
			}
		}
	}
	if err := os.WriteFile(file, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Unpack(file, to, []age.Identity{identity(t)}); err == nil {
		t.Error("it opened with another key")
	}
}

func TestABackupThatCannotBeMadeLeavesNothing(t *testing.T) {
	t.Parallel()
	c, id := folder(t), identity(t)
	c.Copies[0].Make = func(context.Context, string) error { return errors.New("the database is gone") }
	file := filepath.Join(t.TempDir(), "backup")
	if _, err := Write(t.Context(), file, c, []age.Recipient{id.Recipient()}, nil); err == nil {
		t.Error("it was made")
	}
	if left, _ := filepath.Glob(filepath.Dir(file) + "/*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
