package hooks

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Keeper is the agent's side of a process that holds the server's applications. It is used by one goroutine: Begin, Ready, then Lock
// and Unlock in turn, then End and Last. Close lets everything go at any time.
type Keeper struct {
	cmd   *exec.Cmd
	to    io.WriteCloser
	from  chan string // its lines; closed at their end
	thaw  *os.File
	limit time.Duration
}

// Limits of the agent's patience: those of the keeper, and some.
const (
	patience    = 30 * time.Second
	closingTime = 2 * time.Second
)

// Start starts a keeper; command is the program and arguments that run Keep with descriptor 3 as the end of the thaw.
func Start(command []string) (*Keeper, error) {
	k := &Keeper{cmd: exec.Command(command[0], command[1:]...), from: make(chan string, 8)}
	ends, thaw, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start the keeper of applications: %w", err)
	}
	defer ends.Close()
	k.thaw = thaw
	k.cmd.ExtraFiles = []*os.File{ends}
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	k.cmd.Dir = "/"
	// No standard error: a keeper that outlives the agent must not keep the agent's connection open.
	var out io.ReadCloser
	if k.to, err = k.cmd.StdinPipe(); err == nil {
		out, err = k.cmd.StdoutPipe()
	}
	if err == nil {
		err = k.cmd.Start()
	}
	if err != nil {
		thaw.Close()
		return nil, fmt.Errorf("start the keeper of applications: %w", err)
	}
	go func() {
		defer close(k.from)
		lines := bufio.NewScanner(out)
		for lines.Buffer(nil, 1<<20); lines.Scan(); {
			k.from <- lines.Text()
		}
	}()
	go func() {
		for _, err := k.to.Write([]byte("\n")); err == nil; _, err = k.to.Write([]byte("\n")) {
			<-time.After(tickEvery)
		}
	}()
	return k, nil
}

// Thaw is to be kept open by whoever freezes file systems, until it has thawed them: after an agent that is gone no hook is
// run with "post" before.
func (k *Keeper) Thaw() *os.File { return k.thaw }

// Begin finds the databases and does what is slow and holds nobody up; limit is that of one hook.
func (k *Keeper) Begin(ctx context.Context, limit time.Duration) (Report, error) {
	k.limit = limit
	return k.ask(ctx, command{Do: "begin", Limit: limit}, limit)
}

// Ready runs the server's own hooks with "pre".
func (k *Keeper) Ready(ctx context.Context) (Report, error) {
	return k.ask(ctx, command{Do: "ready"}, maxScripts*k.limit)
}

// Lock lets nobody write any more in the databases, for limit at most.
func (k *Keeper) Lock(ctx context.Context, limit time.Duration) (Report, error) {
	return k.ask(ctx, command{Do: "lock", Limit: limit}, lockLimit)
}

// Unlock ends that.
func (k *Keeper) Unlock() (Report, error) {
	return k.ask(context.Background(), command{Do: "unlock"}, unlockLimit)
}

// End lets everything go. It does not wait for it: Last does.
func (k *Keeper) End() error { return k.say(command{Do: "end"}) }

// Last gives the last report, once everything was let go after End.
func (k *Keeper) Last(ctx context.Context) (Report, error) {
	return k.hear(ctx, (maxScripts+1)*k.limit)
}

func (k *Keeper) ask(ctx context.Context, c command, limit time.Duration) (Report, error) {
	if err := k.say(c); err != nil {
		return Report{}, err
	}
	return k.hear(ctx, limit)
}

var errKeeper = errors.New("the keeper of the applications is gone: something has killed it; databases are free, a hook of the server's own may have to be run with 'post' by hand")

func (k *Keeper) say(c command) error {
	b, err := json.Marshal(c)
	if err == nil {
		_, err = k.to.Write(append(b, '\n'))
	}
	if err != nil {
		return errKeeper
	}
	return nil
}

func (k *Keeper) hear(ctx context.Context, limit time.Duration) (Report, error) {
	limited := time.NewTimer(limit + patience)
	defer limited.Stop()
	var r Report
	select {
	case line, ok := <-k.from:
		if !ok {
			return r, errKeeper
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			return r, fmt.Errorf("hear from the keeper of the applications: %w", err)
		}
		return r, nil
	case <-ctx.Done():
		return r, context.Cause(ctx)
	case <-limited.C:
		return r, errors.New("the keeper of the applications does not answer")
	}
}

// Close ends the keeper. It lets go of whatever it holds, by itself and longer than we wait for it if it has to.
func (k *Keeper) Close() {
	k.to.Close()
	k.thaw.Close()
	ended := make(chan struct{})
	go func() {
		_ = k.cmd.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(closingTime):
	}
}

// Rested says whether a capture that has reported so is consistent for every application that was found.
func (r Report) Rested() bool {
	return len(r.Applications) > 0 && !slices.ContainsFunc(r.Applications, func(a Application) bool { return !a.AtRest })
}

// Failed gives the first application whose hook failed; "" if none did.
func (r Report) Failed() string {
	for _, a := range r.Applications {
		if a.Reason != "" && !a.Uncovered {
			return a.Name + ": " + a.Reason
		}
	}
	return ""
}

// All gives the applications as a snapshot names them.
func (r Report) All() (out []dr.Application) {
	for _, a := range r.Applications {
		out = append(out, a.Application)
	}
	return out
}
