package trust

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestAnAuthorityIsMadeInFullOrNotAtAll(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "trust")
	plan := Plan{Name: "hq", Listen: ":7443", KeyFile: filepath.Join(base, "no", "such", "folder")}
	if err := Create(dir, plan); err == nil {
		t.Fatal("an authority was made whose key was not written")
	}
	if left, _ := os.ReadDir(base); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := os.MkdirAll(filepath.Join(dir+".new", dirCustomers), 0o700); err != nil { // as a power cut leaves it
		t.Fatal(err)
	}
	plan.KeyFile = filepath.Join(base, "master.key")
	if err := Create(dir, plan); err != nil {
		t.Fatal(err)
	}
	refused(t, Create(dir, plan), "nothing was changed")
	if _, err := Open(dir, nil); err != nil {
		t.Fatal(err)
	}
}

func TestNothingSecretLiesOpenAtRest(t *testing.T) {
	dir := newAuthority(t)
	a, err := Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	customerKey, err := a.MakeCustomerKey("acme")
	if err != nil {
		t.Fatal(err)
	}
	token, err := a.Enrol(office, time.Hour, nil)
	if err != nil {
		t.Fatal(err)
	}
	signing, err := encodeKey(a.signer.key)
	if err != nil {
		t.Fatal(err)
	}
	_, secret, _ := strings.Cut(token.String(), "office.")
	secret, _, _ = strings.Cut(secret, "@")
	secret = secret[strings.LastIndexByte(secret, '.')+1:]
	checked := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("others may look at %s: %v", path, info.Mode())
		}
		if d.IsDir() {
			return nil
		}
		checked++
		raw, err := os.ReadFile(path)
		for name, text := range map[string]string{"customer's key": customerKey, "authority's key": signing, "token's secret": secret} {
			if bytes.Contains(raw, []byte(text)) {
				t.Errorf("%s lies open in %s", name, path)
			}
		}
		return err
	})
	if err != nil || checked < 5 || len(secret) != 43 {
		t.Fatalf("looked at %d files, %v", checked, err)
	}
}

func TestAKeyFileThatOthersMayReadIsNotUsed(t *testing.T) {
	dir := newAuthority(t)
	key := filepath.Join(filepath.Dir(dir), "master.key")
	if err := os.Chmod(key, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, nil); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("got %v", err)
	}
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, nil); err == nil || !strings.Contains(err.Error(), "the copy you kept") {
		t.Errorf("got %v", err)
	}
	other := filepath.Join(t.TempDir(), "trust")
	if err := Create(other, Plan{Name: "other", KeyFile: key}); err != nil { // makes another key there
		t.Fatal(err)
	}
	if _, err := Open(dir, nil); err == nil || !strings.Contains(err.Error(), "not the one it was sealed with") {
		t.Errorf("got %v", err)
	}
}

func TestAPassphraseOpensWhatItSealed(t *testing.T) {
	defer func(was int) { guessing = was }(guessing)
	guessing = 10
	dir := filepath.Join(t.TempDir(), "trust")
	if err := Create(dir, Plan{Name: "hq", Passphrase: "short"}); err == nil {
		t.Error("a short passphrase was taken")
	}
	if err := Create(dir, Plan{Name: "hq", Passphrase: "correct horse battery"}); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, func() (string, error) { return "correct horse batterx", nil }); err == nil || !strings.Contains(err.Error(), "passphrase is wrong") {
		t.Errorf("got %v", err)
	}
	a, err := Open(dir, func() (string, error) { return "correct horse battery", nil })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.MakeCustomerKey("acme"); err != nil {
		t.Error(err)
	}
}

func TestEveryCustomerHasAKeyOfItsOwnForever(t *testing.T) {
	dir := newAuthority(t)
	keys := make([]string, 16)
	var work sync.WaitGroup
	for i := range keys { // several processes at once
		work.Go(func() {
			a, err := Open(dir, nil)
			if err == nil {
				keys[i], err = a.MakeCustomerKey([]string{"acme", "globex"}[i%2])
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	if keys[0] == keys[1] || len(keys[0]) < 43 {
		t.Fatalf("keys %q", keys[:2])
	}
	for i, k := range keys {
		if k != keys[i%2] {
			t.Errorf("key %d is another", i)
		}
	}
	a, err := Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "../acme", "Acme", "a/b"} {
		if _, err := a.MakeCustomerKey(bad); err == nil {
			t.Errorf("customer %q has a key", bad)
		}
	}
	// A key is made when somebody makes it, and not by looking for it: another copy of the folder may have it.
	if _, err := a.CustomerKey("initech"); err == nil || !strings.Contains(err.Error(), "muster master customer add initech") {
		t.Errorf("the key of nobody: %v", err)
	}
	if key, err := a.CustomerKey("acme"); err != nil || key != keys[0] {
		t.Errorf("key %q, %v", key, err)
	}
}

func TestWhatIsNoAuthoritySaysHowToMakeOne(t *testing.T) {
	if _, err := OpenRegistry(t.TempDir()); !errors.Is(err, ErrNone) || !strings.Contains(err.Error(), "muster master init") {
		t.Errorf("got %v", err)
	}
	if _, err := OpenNode(t.TempDir()); !errors.Is(err, ErrNone) || !strings.Contains(err.Error(), "join") {
		t.Errorf("got %v", err)
	}
}
