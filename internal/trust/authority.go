package trust

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/durable"
)

// Authority is a master's folder, unlocked. Its methods may be called from many goroutines.
type Authority struct {
	*Registry
	signer   signer
	identity *age.HybridIdentity // opens what is sealed
	life     time.Duration       // of nodes' certificates
}

// Plan is what a master's authority is made of.
type Plan struct {
	Name      string
	Listen    string   // address for nodes to connect to
	Addresses []string // HOST:PORT by which nodes reach it, told in tokens; may be empty, then each token names them
	// What opens the sealed keys is kept either in a file of its own, which is made if it is not there, or sealed with a
	// passphrase.
	KeyFile    string
	Passphrase string
}

// guessing is how hard it is to try a passphrase: about a second, as the power of two that age counts in.
var guessing = 18

const (
	factsVersion  = 1
	maxSealed     = 64 << 10 // bytes of a sealed key
	minPassphrase = 12       // bytes
)

// Create makes a master's authority in a folder that must not be there yet. It is there in full or not at all.
func Create(dir string, plan Plan) error {
	if err := plan.validate(); err != nil {
		return fmt.Errorf("make authority: %w", err)
	}
	if _, err := os.Lstat(dir); err == nil {
		return refuse("make authority: %s is there already: nothing was changed", dir)
	}
	part := dir + ".new"
	if err := os.RemoveAll(part); err != nil { // of a Create that was cut off
		return fmt.Errorf("make authority: %w", err)
	}
	if err := errors.Join(os.Mkdir(part, 0o700), os.Mkdir(filepath.Join(part, dirCustomers), 0o700)); err != nil {
		return fmt.Errorf("make authority: %w", err)
	}
	if err := fill(part, plan); err != nil {
		return errors.Join(fmt.Errorf("make authority: %w", err), os.RemoveAll(part))
	}
	if err := errors.Join(durable.Sync(part), os.Rename(part, dir), durable.Sync(filepath.Dir(dir))); err != nil {
		return fmt.Errorf("make authority: %w", err)
	}
	return nil
}

func (p Plan) validate() error {
	if err := dr.ValidateLabel("master", p.Name); err != nil {
		return err
	}
	if len(p.Addresses) > 0 {
		if err := validateMasters(p.Addresses); err != nil {
			return err
		}
	}
	switch {
	case p.KeyFile == "" && p.Passphrase == "":
		return errors.New("its keys are sealed with a key file or a passphrase: give one")
	case p.KeyFile != "" && p.Passphrase != "":
		return errors.New("its keys are sealed with a key file or a passphrase: give one of them")
	case p.Passphrase != "" && len(p.Passphrase) < minPassphrase:
		return fmt.Errorf("the passphrase is too short: use at least %d characters", minPassphrase)
	}
	return nil
}

// fill writes the files of an authority.
func fill(dir string, plan Plan) error {
	now := time.Now().UTC().Truncate(time.Second)
	identity, err := makeIdentity(dir, plan)
	if err != nil {
		return err
	}
	s, err := newSigner(plan.Name, now)
	if err != nil {
		return err
	}
	key, err := encodeKey(s.key)
	if err != nil {
		return err
	}
	sealed, err := seal([]byte(key), identity.Recipient())
	if err != nil {
		return err
	}
	if near, err := filepath.Rel(filepath.Dir(dir), plan.KeyFile); err == nil && near == filepath.Base(plan.KeyFile) {
		plan.KeyFile = filepath.Join("..", near) // the folders may be moved together
	}
	about, err := json.MarshalIndent(facts{Version: factsVersion, Name: plan.Name, Listen: plan.Listen, Addresses: plan.Addresses,
		KeyFile: plan.KeyFile, Created: now}, "", " ")
	if err != nil {
		return err
	}
	for _, file := range []struct {
		name    string
		content []byte
	}{{fileKey, sealed}, {fileAuthority, []byte(encodeCert(s.cert))}, {fileFacts, append(about, '\n')}} {
		if err := durable.WriteFile(filepath.Join(dir, file.name), file.content, 0o600); err != nil {
			return err
		}
	}
	return (&book{Version: bookVersion}).write(filepath.Join(dir, fileBook))
}

// makeIdentity makes what opens the sealed keys, or takes what is in the key file.
func makeIdentity(dir string, plan Plan) (*age.HybridIdentity, error) {
	if plan.KeyFile != "" {
		if _, err := os.Lstat(plan.KeyFile); err == nil {
			return readIdentity(plan.KeyFile)
		}
	}
	identity, err := age.GenerateHybridIdentity()
	if err != nil {
		return nil, err
	}
	text := []byte("# Opens the sealed keys of a Muster master, also by hand: age -d -i THIS_FILE FILE.age\n" + identity.String() + "\n")
	if plan.KeyFile != "" {
		return identity, durable.WriteFile(plan.KeyFile, text, 0o600)
	}
	recipient, err := age.NewScryptRecipient(plan.Passphrase)
	if err != nil {
		return nil, err
	}
	recipient.SetWorkFactor(guessing)
	sealed, err := seal(text, recipient)
	if err != nil {
		return nil, err
	}
	return identity, durable.WriteFile(filepath.Join(dir, fileUnlock), sealed, 0o600)
}

// readIdentity reads a key file, which nobody else may be able to read.
func readIdentity(path string) (*age.HybridIdentity, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read the master's key file: %w; put the copy you kept of it back there", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("read the master's key file: others may read %s: 'chmod 600' it, and think about who has read it", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the master's key file: %w", err)
	}
	defer f.Close()
	return parseIdentityFile(path, io.LimitReader(f, maxSealed))
}

func parseIdentityFile(path string, r io.Reader) (*age.HybridIdentity, error) {
	all, err := age.ParseIdentities(r)
	if err != nil {
		return nil, fmt.Errorf("read the master's key %s: %w", path, err)
	}
	identity, ok := all[0].(*age.HybridIdentity)
	if !ok || len(all) != 1 {
		return nil, fmt.Errorf("read the master's key %s: it has to hold one identity AGE-SECRET-KEY-PQ-1…", path)
	}
	return identity, nil
}

// Open unlocks the authority in a folder. passphrase is asked only if that is what it was sealed with.
func Open(dir string, passphrase func() (string, error)) (*Authority, error) {
	r, err := OpenRegistry(dir)
	if err != nil {
		return nil, err
	}
	a := &Authority{Registry: r, life: Life}
	if a.identity, err = r.unlock(passphrase); err != nil {
		return nil, err
	}
	if a.signer.cert, err = r.authority(); err != nil {
		return nil, err
	}
	key, err := a.unseal(fileKey)
	if err != nil {
		return nil, err
	}
	if a.signer.key, err = decodeKey(string(key)); err != nil {
		return nil, fmt.Errorf("read %s: %w", r.path(fileKey), err)
	}
	if public, ok := a.signer.cert.PublicKey.(ed25519.PublicKey); !ok || !public.Equal(a.signer.key.Public()) {
		return nil, fmt.Errorf("open authority %s: its key does not belong to its certificate: put both back from one backup", dir)
	}
	return a, nil
}

func (r *Registry) unlock(passphrase func() (string, error)) (*age.HybridIdentity, error) {
	if r.facts.KeyFile != "" {
		if !filepath.IsAbs(r.facts.KeyFile) {
			return readIdentity(r.path(r.facts.KeyFile))
		}
		return readIdentity(r.facts.KeyFile)
	}
	word, err := passphrase()
	if err != nil {
		return nil, fmt.Errorf("unlock authority: %w", err)
	}
	identity, err := age.NewScryptIdentity(word)
	if err != nil {
		return nil, fmt.Errorf("unlock authority: %w", err)
	}
	text, err := openSealed(r.path(fileUnlock), identity)
	var wrong *age.NoIdentityMatchError
	if errors.As(err, &wrong) {
		return nil, errors.New("unlock authority: the passphrase is wrong")
	}
	if err != nil {
		return nil, fmt.Errorf("unlock authority: %w", err)
	}
	return parseIdentityFile(r.path(fileUnlock), bytes.NewReader(text))
}

// CustomerKey gives a customer's key. It opens the customer's far store, and no other customer's. One that is not here is an error and
// not made: another copy of this folder may have it, and what is sealed with a second one could never be read with the first.
func (a *Authority) CustomerKey(customer string) (string, error) {
	if err := dr.ValidateLabel("customer", customer); err != nil {
		return "", err
	}
	key, err := a.unseal(filepath.Join(dirCustomers, customer+".key.age"))
	if errors.Is(err, os.ErrNotExist) {
		return "", refuse("the key of customer %s is not here: add the customer with 'muster master customer add %s', or put its key back into %s", customer, customer, a.path(dirCustomers))
	}
	return strings.TrimSpace(string(key)), err
}

// MakeCustomerKey gives a customer's key, which is made if there is none.
func (a *Authority) MakeCustomerKey(customer string) (key string, err error) {
	if err := dr.ValidateLabel("customer", customer); err != nil {
		return "", err
	}
	name := filepath.Join(dirCustomers, customer+".key.age")
	err = a.update(func(*book) error { // under the book's lock, so that two that make it at once get the same
		have, err := a.unseal(name)
		if !errors.Is(err, os.ErrNotExist) {
			key = strings.TrimSpace(string(have))
			return err
		}
		key = base64.RawURLEncoding.EncodeToString(random(32))
		sealed, err := seal([]byte(key), a.identity.Recipient())
		if err != nil {
			return err
		}
		return durable.WriteFile(a.path(name), sealed, 0o600)
	})
	if err != nil {
		return "", fmt.Errorf("make the key of customer %s: %w", customer, err)
	}
	return key, nil
}

// GiveCustomerKey makes a key that of a customer: of a far store that is there already. One that has another key is refused, because
// what was captured with it could not be read any more.
func (a *Authority) GiveCustomerKey(customer, key string) error {
	if err := dr.ValidateLabel("customer", customer); err != nil {
		return err
	}
	name := filepath.Join(dirCustomers, customer+".key.age")
	err := a.update(func(*book) error {
		have, err := a.unseal(name)
		switch {
		case errors.Is(err, os.ErrNotExist):
		case err != nil:
			return err
		case strings.TrimSpace(string(have)) == key:
			return nil
		default:
			return refuse("customer %s has another key already: take a customer of which no appliance has joined", customer)
		}
		sealed, err := seal([]byte(key), a.identity.Recipient())
		if err != nil {
			return err
		}
		return durable.WriteFile(a.path(name), sealed, 0o600)
	})
	if err != nil {
		return fmt.Errorf("give customer %s its key: %w", customer, err)
	}
	return nil
}

// EraseCustomerKey destroys a customer's key: without another copy of it nobody reads the customer's far store any more. It is refused
// while an appliance of the customer may still connect. One that is not here is no error.
func (a *Authority) EraseCustomerKey(customer string) error {
	if err := dr.ValidateLabel("customer", customer); err != nil {
		return err
	}
	err := a.update(func(b *book) error {
		for _, e := range b.Nodes {
			if e.Role == Appliance && e.Customer == customer && e.Revoked == nil {
				return refuse("appliance %s of customer %s may still connect: take that back with 'muster master revoke %s'", e.Name, customer, e.Name)
			}
		}
		err := os.Remove(a.path(filepath.Join(dirCustomers, customer+".key.age")))
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return errors.Join(err, durable.Sync(a.path(dirCustomers)))
	})
	if err != nil {
		return fmt.Errorf("erase the key of customer %s: %w", customer, err)
	}
	return nil
}

func (a *Authority) unseal(name string) ([]byte, error) {
	return openSealed(a.path(name), a.identity)
}

func seal(content []byte, to age.Recipient) ([]byte, error) {
	var out bytes.Buffer
	w, err := age.Encrypt(&out, to)
	if err == nil {
		_, err = w.Write(content)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	return out.Bytes(), nil
}

func openSealed(path string, identity age.Identity) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read a sealed key: %w", err)
	}
	defer f.Close()
	r, err := age.Decrypt(io.LimitReader(f, maxSealed), identity)
	if err == nil {
		var content []byte
		if content, err = io.ReadAll(r); err == nil {
			return content, nil
		}
	}
	var wrong *age.NoIdentityMatchError
	if errors.As(err, &wrong) {
		return nil, fmt.Errorf("open %s: the key file or passphrase is not the one it was sealed with: %w", path, err)
	}
	return nil, fmt.Errorf("open %s: %w", path, err)
}

// certify issues a certificate for a node, or for the master.
func (a *Authority) certify(who Peer, public any) (*x509.Certificate, error) {
	return a.signer.issue(who, public, a.now(), a.life)
}
