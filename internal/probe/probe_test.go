package probe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/musterdr/muster/internal/dr"
)

func TestReaderFindsAnswersAmongGarbage(t *testing.T) {
	good := `{"answer":"hello","challenge":"c","hello":{"boot_id":"b"}}`
	for name, in := range map[string]string{
		"alone":                 good + "\n",
		"after a boot log":      "[    0.000000] Linux version 6.1\r\nSeaBIOS\r\n" + good + "\n",
		"after half a line":     "[    0.0" + good + "\n",
		"after a blank":         "\n\n  \n" + good + "\r\n",
		"after another object":  "{}\n{\"answer\":7}\n" + good + "\n",
		"after an endless line": strings.Repeat("x", 3*MaxLine) + "\n" + good + "\n",
		"after too many items":  `{"answer":"x","status":{"processes":[` + strings.Repeat(`"",`, maxCommas) + `""]}}` + "\n" + good + "\n",
		"after raw bytes":       "\xff\xfe\x00\x1b[2J\n" + good + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			r := NewReader(strings.NewReader(in), MaxGarbage)
			a, err := r.Answer()
			if err != nil || a.Hello == nil || a.Hello.BootID != "b" {
				t.Fatalf("got %+v, %v", a, err)
			}
			if _, err := r.Answer(); !errors.Is(err, io.EOF) {
				t.Fatalf("after the last message: %v", err)
			}
		})
	}
}

func TestReaderGivesUpAFlood(t *testing.T) {
	for name, piece := range map[string]string{
		"endless line":    "AAAAAAAAAAAAAAAA",
		"endless lines":   "no message\n",
		"endless objects": "{\"a\":1}\n",
	} {
		t.Run(name, func(t *testing.T) {
			flood := &endless{piece: []byte(piece)}
			const limit = 2 << 20
			r := NewReader(flood, limit)
			if _, err := r.Answer(); !errors.Is(err, ErrGarbage) {
				t.Fatalf("got %v", err)
			}
			if flood.given > limit+2*MaxLine {
				t.Fatalf("it read %d bytes before it gave up", flood.given)
			}
		})
	}
}

// endless repeats a piece for ever.
type endless struct {
	piece []byte
	given int
}

func (e *endless) Read(p []byte) (int, error) {
	n := 0
	for n+len(e.piece) <= len(p) {
		n += copy(p[n:], e.piece)
	}
	e.given += n
	return n, nil
}

func TestAnswersAreTamed(t *testing.T) {
	line := `{"answer":"status","challenge":"c","status":{"jobs":-5,"load1":-1,"uptime":-1,"hostname":"a\u001b]0;x\u0007\nb\u202e\u009b",` +
		`"kernel":"` + strings.Repeat("é", MaxText) + `","processes":[` + strings.TrimSuffix(strings.Repeat(`"p",`, MaxItems+10), ",") + `]}}` + "\n"
	a, err := NewReader(strings.NewReader(line), 0).Answer()
	if err != nil {
		t.Fatal(err)
	}
	s := a.Status
	if s.Hostname != "a?]0;x? b?" {
		t.Errorf("host name %q", s.Hostname)
	}
	if len(s.Kernel) > MaxText || !strings.HasSuffix(s.Kernel, "é…") || !utf8.ValidString(s.Kernel) {
		t.Errorf("a text of %d bytes, ending %q", len(s.Kernel), s.Kernel[len(s.Kernel)-10:])
	}
	if len(s.Processes) != MaxItems {
		t.Errorf("a list of %d", len(s.Processes))
	}
	if s.Jobs != 0 || s.Load1 != 0 || s.Uptime != 0 {
		t.Errorf("impossible numbers stay: %d %g %s", s.Jobs, s.Load1, s.Uptime)
	}
}

func TestWriteRefusesWhatNoReaderTakes(t *testing.T) {
	var out bytes.Buffer
	err := Write(&out, Answer{Answer: AskStatus, Error: strings.Repeat("x", MaxLine)})
	if err == nil || out.Len() > 0 {
		t.Fatalf("wrote %d bytes, %v", out.Len(), err)
	}
}

// guest answers like an honest agent; the hooks make it dishonest.
type guest struct {
	ch    net.Conn
	hears func(Ask) []Answer
}

func (g guest) run() {
	in := NewReader(g.ch, 0)
	for {
		ask, err := in.Ask()
		if err != nil {
			return
		}
		for _, a := range g.hears(ask) {
			if Write(g.ch, a) != nil {
				return
			}
		}
	}
}

func honest(ask Ask) []Answer {
	a := Answer{Answer: ask.Ask, Challenge: ask.Challenge, ID: ask.ID}
	switch ask.Ask {
	case AskHello:
		a.Hello = &Hello{Agent: "one", BootID: "boot"}
	case AskStatus:
		a.Status = &Status{Hostname: "shop"}
	case AskCheck:
		a.Result = &dr.CheckResult{Name: ask.Check.Name, State: dr.CheckPass}
	}
	return []Answer{a}
}

// plug gives an Open whose guest's ends go to the function, one after the other.
func plug(serve func(n int, ch net.Conn)) Open {
	n := 0
	return func(context.Context) (Channel, error) {
		host, inside := net.Pipe()
		go serve(n, inside)
		n++
		return host, nil
	}
}

func TestNothingIsSaidBeforeTheKernelRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		heard := make(chan byte, 1)
		c := Dial(t.Context(), plug(func(_ int, ch net.Conn) {
			b := make([]byte, 1)
			for {
				if _, err := ch.Read(b); err != nil {
					return
				}
				select {
				case heard <- b[0]:
				default:
				}
			}
		}))
		defer c.Close()
		time.Sleep(time.Hour)
		select {
		case b := <-heard:
			t.Fatalf("a boot loader would have taken %q for a key", b)
		default:
		}
		c.Wake()
		synctest.Wait()
		<-heard
	})
}

func TestAReadyAgentIsAskedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := Dial(t.Context(), plug(func(_ int, ch net.Conn) {
			_ = Write(ch, Answer{Answer: SayReady, Hello: &Hello{Agent: "one"}})
			guest{ch, honest}.run()
		}))
		defer c.Close()
		began := time.Now()
		hello, err := c.Hello(t.Context())
		if err != nil || hello.BootID != "boot" {
			t.Fatalf("%+v, %v", hello, err)
		}
		if d := time.Since(began); d > 0 {
			t.Errorf("it took %s", d)
		}
		a, err := c.Ask(t.Context(), Ask{Ask: AskStatus})
		if err != nil || a.Status.Hostname != "shop" {
			t.Fatalf("%+v, %v", a, err)
		}
	})
}

func TestTheFirstPortToAnswerIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		closed := make(chan struct{})
		silent := plug(func(_ int, ch net.Conn) {
			_, _ = io.Copy(io.Discard, ch)
			close(closed)
		})
		c := Dial(t.Context(), silent, plug(func(_ int, ch net.Conn) { guest{ch, honest}.run() }))
		defer c.Close()
		c.Wake()
		if _, err := c.Hello(t.Context()); err != nil {
			t.Fatal(err)
		}
		<-closed
	})
}

func TestOldAndForeignAnswersAreSkipped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := Dial(t.Context(), plug(func(_ int, ch net.Conn) {
			guest{ch, func(ask Ask) []Answer {
				old := honest(ask)[0]
				old.Challenge = "00112233445566778899aabbccddeeff"
				if old.Hello != nil {
					old.Hello = &Hello{BootID: "yesterday"}
				}
				early := honest(ask)[0]
				early.ID += 1000
				wrong := Answer{Answer: AskCheck, Challenge: ask.Challenge, ID: ask.ID, Result: &dr.CheckResult{}}
				empty := Answer{Answer: ask.Ask, Challenge: ask.Challenge, ID: ask.ID}
				return append([]Answer{old, wrong, empty}, append(honest(ask), early)...)
			}}.run()
		}))
		defer c.Close()
		c.Wake()
		hello, err := c.Hello(t.Context())
		if err != nil || hello.BootID != "boot" {
			t.Fatalf("%+v, %v", hello, err)
		}
		a, err := c.Ask(t.Context(), Ask{Ask: AskStatus})
		if err != nil || a.Status.Hostname != "shop" {
			t.Fatalf("%+v, %v", a, err)
		}
		synctest.Wait()
		if c.Garbage() == 0 {
			t.Error("nothing of it was counted")
		}
	})
}

func TestALostChannelIsOpenedAgainAndTheQuestionRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := Dial(t.Context(), plug(func(n int, ch net.Conn) {
			guest{ch, func(ask Ask) []Answer {
				if ask.Ask == AskStatus && n < 3 {
					_ = ch.Close() // in the middle of the question
				}
				return honest(ask)
			}}.run()
		}))
		defer c.Close()
		c.Wake()
		if _, err := c.Hello(t.Context()); err != nil {
			t.Fatal(err)
		}
		a, err := c.Ask(t.Context(), Ask{Ask: AskStatus})
		if err != nil || a.Status == nil {
			t.Fatalf("%+v, %v", a, err)
		}
	})
}

func TestAnAgentThatStartedAgainEndsTheConversation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := Dial(t.Context(), plug(func(_ int, ch net.Conn) {
			guest{ch, func(ask Ask) []Answer {
				if ask.Ask == AskStatus {
					return []Answer{{Answer: SayReady, Hello: &Hello{Agent: "two"}}}
				}
				return append(honest(ask), Answer{Answer: SayReady, Hello: &Hello{Agent: "one"}})
			}}.run()
		}))
		defer c.Close()
		c.Wake()
		if _, err := c.Hello(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Ask(t.Context(), Ask{Ask: AskStatus}); !errors.Is(err, ErrRestarted) {
			t.Fatalf("got %v", err)
		}
	})
}

func TestAFloodedConversationIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := Dial(t.Context(), plug(func(_ int, ch net.Conn) {
			chunk := bytes.Repeat([]byte("garbage\n"), 8<<10)
			for {
				if _, err := ch.Write(chunk); err != nil {
					return
				}
			}
		}))
		defer c.Close()
		if _, err := c.Hello(t.Context()); !errors.Is(err, ErrGarbage) {
			t.Fatalf("got %v", err)
		}
		if n := c.Garbage(); n > MaxGarbage+2*MaxLine {
			t.Errorf("it took %d bytes", n)
		}
	})
}

func TestASlowDribbleOnlyCostsItsQuestionTheTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := Dial(t.Context(), plug(func(_ int, ch net.Conn) {
			guest{ch, func(ask Ask) []Answer {
				if ask.Ask != AskStatus {
					return honest(ask)
				}
				for {
					if _, err := ch.Write([]byte("{")); err != nil {
						return nil
					}
					time.Sleep(time.Second)
				}
			}}.run()
		}))
		defer c.Close()
		c.Wake()
		if _, err := c.Hello(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := c.Ask(ctx, Ask{Ask: AskStatus}); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
		c.Close()
		time.Sleep(2 * time.Second) // the guest notices at its next byte
	})
}

func TestAPortThatCannotBeOpenedIsNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := Dial(t.Context(), func(context.Context) (Channel, error) { return nil, fmt.Errorf("no such socket") })
		defer c.Close()
		time.Sleep(time.Second)
		if up, why := c.Connected(); up || why == nil || why.Error() != "no such socket" {
			t.Fatalf("%v, %v", up, why)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"answer":"hello","challenge":"c","hello":{"boot_id":"b"}}` + "\n"))
	f.Add([]byte(`x{"answer":"status","status":{"mounts":[{"device":"\u001b[2J"}],"now":"2026-01-01T00:00:00Z"}}` + "\n"))
	f.Add([]byte("{\"answer\":\"check\",\"result\":{\"state\":\"pass\",\"got\":\"\xff\"}}\n{{{\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := NewReader(bytes.NewReader(in), MaxGarbage)
		for {
			a, err := r.Answer()
			if err != nil {
				break
			}
			var out bytes.Buffer
			if err := Write(&out, a); err != nil {
				continue // an escape may be longer than what it stands for
			}
			for _, c := range out.String()[1 : out.Len()-1] {
				if c == utf8.RuneError || unicode.IsControl(c) {
					t.Fatalf("%q reached the outside in %q", c, out.String())
				}
			}
			again, err := NewReader(&out, 0).Answer()
			if err != nil || again.Answer != a.Answer || again.Challenge != a.Challenge {
				t.Fatalf("%+v became %+v, %v", a, again, err)
			}
		}
		if n := r.Garbage(); n > int64(len(in)) {
			t.Fatalf("%d bytes of garbage in %d", n, len(in))
		}
	})
}

func FuzzClean(f *testing.F) {
	f.Add("é\x1b[0m\u202e", 3)
	f.Fuzz(func(t *testing.T, in string, limit int) {
		if limit < 0 || limit > 1<<16 {
			return
		}
		out := Clean(in, limit)
		if len(out) > limit && len(in) > limit || !utf8.ValidString(out) {
			t.Fatalf("%q", out)
		}
		if again := Clean(out, limit); again != out {
			t.Fatalf("%q became %q", out, again)
		}
	})
}
