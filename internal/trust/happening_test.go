package trust

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
)

// told is what a hub told, in order.
type told struct {
	mu  sync.Mutex
	all []Happening
}

func (w *told) tell(h Happening) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all = append(w.all, h)
}

// of lists what happened to a node, as "joined".
func (w *told) of(name string) (out []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, h := range w.all {
		if h.Peer.Name == name {
			out = append(out, string(h.What))
		}
	}
	return out
}

func TestWhatHappensToANodeIsToldOnceInOrder(t *testing.T) {
	w := &told{}
	m := &testMaster{t: t, dir: newAuthority(t), timing: hasty, tell: w.tell}
	m.start()
	t.Cleanup(func() { m.stop() })
	if _, err := m.MakeCustomerKey(office.Customer); err != nil {
		t.Fatal(err)
	}
	tells := func(want ...string) {
		t.Helper()
		until(t, fmt.Sprint("it is told ", want), func() bool { return slices.Equal(w.of("office"), want) })
	}
	token := m.token(office)
	tells("enrolled")
	n, err := Join(t.Context(), t.TempDir(), token)
	if err != nil {
		t.Fatal(err)
	}
	tells("enrolled", "joined")
	for range 2 { // a second machine with the token, which tries twice
		if _, err := Join(t.Context(), t.TempDir(), token); err == nil {
			t.Fatal("a token was used twice")
		}
	}
	tells("enrolled", "joined", "refused")
	w.mu.Lock()
	why := w.all[len(w.all)-1].Text
	w.mu.Unlock()
	if !strings.Contains(why, "127.0.0.1") || !strings.Contains(why, "used already") {
		t.Errorf("told is %q", why)
	}
	book, err := OpenRegistry(m.dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := book.Revoke("office"); err != nil {
		t.Fatal(err)
	}
	tells("enrolled", "joined", "refused", "revoked")
	for range 2 {
		n.Client().CloseIdleConnections()
		var no *Refusal
		until(t, "it is refused", func() bool {
			_, err := get(n.Client(), baseURL+"/who")
			return errors.As(err, &no)
		})
	}
	tells("enrolled", "joined", "refused", "revoked", "refused")

	// The next process tells the book's part again, with the same times.
	w.mu.Lock()
	revoked := w.all[3]
	w.all = nil
	w.mu.Unlock()
	m.stop()
	m.start()
	until(t, "it is told again", func() bool { return slices.Contains(w.of("office"), "revoked") })
	w.mu.Lock()
	defer w.mu.Unlock()
	if again := w.all[slices.IndexFunc(w.all, func(h Happening) bool { return h.What == WasRevoked })]; again != revoked {
		t.Errorf("told %+v, and before %+v", again, revoked)
	}
}

// Tokens that nobody made would fill the record of whoever listens.
func TestStrangersAreNotTold(t *testing.T) {
	w := &told{}
	m := &testMaster{t: t, dir: newAuthority(t), timing: hasty, tell: w.tell}
	m.start()
	t.Cleanup(func() { m.stop() })
	if _, err := m.MakeCustomerKey(office.Customer); err != nil {
		t.Fatal(err)
	}
	token := m.token(office)
	token.secret = [secretSize]byte(random(secretSize))
	if _, err := Join(t.Context(), t.TempDir(), token); err == nil {
		t.Fatal("a made-up token was taken")
	}
	until(t, "the invitation is told", func() bool { return len(w.of("office")) > 0 })
	if all := w.of("office"); !slices.Equal(all, []string{"enrolled"}) {
		t.Errorf("told is %v", all)
	}
}
