package linux

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// rack is a row of file systems that write down what is done to them.
type rack struct {
	mu   sync.Mutex
	done []string
}

type fakeSystem struct {
	rack *rack
	name string
	err  error
	hang chan struct{} // if not nil, freezing waits for it
}

func (f *fakeSystem) freeze() error {
	if f.hang != nil {
		<-f.hang
	}
	return f.log("freeze", f.err)
}

func (f *fakeSystem) thaw() error { return f.log("thaw", nil) }

func (f *fakeSystem) log(verb string, err error) error {
	f.rack.mu.Lock()
	defer f.rack.mu.Unlock()
	if err == nil {
		f.rack.done = append(f.rack.done, verb+" "+f.name)
	}
	return err
}

func (r *rack) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.done, ", ")
}

// talk runs a watchdog and gives the two ends of its pipes.
func talk(t *testing.T, systems ...frozenSystem) (say func(string), hear func() string, hangUp func(), ended chan error) {
	t.Helper()
	w := &watchdog{systems: systems, holds: make([]bool, len(systems))}
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	ended = make(chan error, 1)
	answers := bufio.NewReader(outR)
	go func() {
		err := w.serve(inR, outW)
		outW.Close()
		ended <- err
	}()
	say = func(s string) { fmt.Fprintln(inW, s) }
	hear = func() string {
		line, _ := answers.ReadString('\n')
		return strings.TrimSpace(line)
	}
	if got := hear(); got != "ready null" {
		t.Fatalf("the watchdog began with %q", got)
	}
	return say, hear, func() { inW.Close() }, ended
}

func TestTheWatchdogFreezesInOrderAndThawsInReverse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &rack{}
		say, hear, hangUp, ended := talk(t, &fakeSystem{rack: r, name: "inner"}, &fakeSystem{rack: r, name: "esp", err: unix.EOPNOTSUPP}, &fakeSystem{rack: r, name: "root"})
		say("arm 30000000000")
		hear()
		say("freeze")
		if got := hear(); got != `frozen {"unsupported":[1],"failed":-1}` {
			t.Errorf("freeze: %s", got)
		}
		time.Sleep(3 * time.Second)
		say("thaw")
		if got := hear(); got != `thawed {"failed":-1,"frozen":3000000000}` {
			t.Errorf("thaw: %s", got)
		}
		hangUp()
		<-ended
		if r.String() != "freeze inner, freeze root, thaw root, thaw inner" {
			t.Errorf("order: %s", r)
		}
	})
}

func TestTheWatchdogThawsAtItsDeadlineAndSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &rack{}
		say, hear, hangUp, ended := talk(t, &fakeSystem{rack: r, name: "root"})
		say("arm 5000000000")
		hear()
		say("freeze")
		hear()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if r.String() != "freeze root, thaw root" {
			t.Errorf("at the deadline: %s", r)
		}
		say("thaw")
		if got := hear(); !strings.Contains(got, `"expired":true`) {
			t.Errorf("thaw after the deadline: %s", got)
		}
		hangUp()
		<-ended
	})
}

func TestTheWatchdogThawsWhenItsMasterIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &rack{}
		say, hear, hangUp, ended := talk(t, &fakeSystem{rack: r, name: "root"})
		say("arm 30000000000")
		hear()
		say("freeze")
		hear()
		hangUp()
		if err := <-ended; err != nil || r.String() != "freeze root, thaw root" {
			t.Errorf("%s, %v", r, err)
		}
	})
}

func TestAFreezeThatComesThroughTooLateIsUndoneAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, hang := &rack{}, make(chan struct{})
		say, hear, hangUp, ended := talk(t, &fakeSystem{rack: r, name: "inner"}, &fakeSystem{rack: r, name: "root", hang: hang})
		say("arm 5000000000")
		hear()
		say("freeze")
		synctest.Wait()
		hangUp() // the agent is killed while the second freeze hangs
		synctest.Wait()
		if r.String() != "freeze inner, thaw inner" {
			t.Errorf("while the other freeze hangs: %s", r)
		}
		close(hang)
		hear()
		<-ended
		if r.String() != "freeze inner, thaw inner, freeze root, thaw root" {
			t.Errorf("after the late freeze: %s", r)
		}
	})
}

func TestAFreezeThatFailsLeavesNothingFrozen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &rack{}
		say, hear, hangUp, ended := talk(t, &fakeSystem{rack: r, name: "inner"}, &fakeSystem{rack: r, name: "root", err: unix.EBUSY})
		say("arm 5000000000")
		hear()
		say("freeze")
		if got := hear(); !strings.Contains(got, `"failed":1`) || !strings.Contains(got, `"busy":true`) {
			t.Errorf("freeze: %s", got)
		}
		if r.String() != "freeze inner, thaw inner" {
			t.Errorf("after the failure: %s", r)
		}
		hangUp()
		<-ended
	})
}

func TestNothingIsFrozenWithoutADeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &rack{}
		say, _, _, ended := talk(t, &fakeSystem{rack: r, name: "root"})
		say("freeze")
		if err := <-ended; err == nil || r.String() != "" {
			t.Errorf("%s, %v", r, err)
		}
	})
}
