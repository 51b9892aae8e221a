package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/trust"
)

// Times of a console.
const (
	consoleEvery = 10 * time.Second // between looks at how things stand
	consoleAsk   = 5 * time.Second  // for the appliance to say how it stands
	maxNotice    = 4096             // bytes of a notice that are shown
)

// standing is how an appliance's machine stands, as its console shows it.
type standing struct {
	network hostNetwork
	node    *trust.Node     // nil: it has not joined
	status  *api.SiteStatus // nil: 'muster appliance serve' does not answer
	notice  string          // what is told beside: why it has not joined
}

func applianceConsoleCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "console", Short: "Show on this screen how the appliance stands, and take a token", Args: cobra.NoArgs,
		Long: `Show how this appliance stands and what is to be done next, again and again, until interrupted: for a screen beside the box. It asks for nobody's
password and starts no shell. As long as the appliance has not joined a master, a token that is typed, pasted or scanned here joins it; nothing else
that is typed does anything.`,
		Example: "  muster appliance console\n  muster appliance console --once"}
	once := cmd.Flags().Bool("once", false, "show it once")
	notice := cmd.Flags().String("notice", "", "file whose text is shown as well, until the appliance has joined")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c := console{install: installation(cmd), out: cmd.OutOrStdout(), notice: *notice}
		if f, ok := c.out.(*os.File); ok && !*once {
			c.screen = term.IsTerminal(int(f.Fd()))
		}
		if *once {
			c.show(cmd.Context())
			return nil
		}
		return c.run(cmd.Context(), cmd.InOrStdin())
	}
	return cmd
}

// console is a screen and who types before it.
type console struct {
	install install
	out     io.Writer
	screen  bool   // it can be wiped
	notice  string // a file
	told    string // what became of the last token
	shown   string
}

func (c *console) run(ctx context.Context, in io.Reader) error {
	typed := make(chan string)
	go func() { // it ends with the process: a terminal cannot be made to stop reading
		lines := bufio.NewScanner(in)
		lines.Buffer(nil, maxTokenFile)
		for lines.Scan() {
			typed <- lines.Text()
		}
	}()
	look := time.NewTicker(consoleEvery)
	defer look.Stop()
	for {
		c.show(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
		case line := <-typed:
			c.shown = "" // what was typed has moved the picture
			c.take(ctx, line)
		}
	}
}

// take joins with a token, if that is what was typed and the appliance has not joined.
func (c *console) take(ctx context.Context, line string) {
	if _, err := trust.OpenNode(c.install.nodeDir()); !errors.Is(err, trust.ErrNone) || strings.TrimSpace(line) == "" {
		return
	}
	fmt.Fprintln(c.out, "\nJoining ...")
	node, err := c.install.join(ctx, trust.Appliance, line)
	c.told = "Joined."
	if err != nil {
		c.told = "That did not work: " + err.Error()
	} else if !node.Expires().After(time.Now()) {
		c.told = "Joined, with a certificate that has expired by this machine's clock: the clock is wrong."
	}
}

// show draws the picture, if it is another one than before.
func (c *console) show(ctx context.Context) {
	var b strings.Builder
	c.install.standing(ctx, c.notice).print(&b, c.told)
	if b.String() == c.shown {
		return
	}
	c.shown = b.String()
	if c.screen {
		fmt.Fprint(c.out, "\033[H\033[2J\033[3J")
	}
	fmt.Fprint(c.out, c.shown)
}

func (i install) standing(ctx context.Context, notice string) (s standing) {
	s.network = readNetwork("/")
	node, err := trust.OpenNode(i.nodeDir())
	switch {
	case err == nil:
		s.node = node
	case !errors.Is(err, trust.ErrNone):
		s.notice = err.Error()
		return s
	default:
		if f, err := os.Open(notice); notice != "" && err == nil {
			raw, _ := io.ReadAll(io.LimitReader(f, maxNotice)) // what can be read of it
			s.notice = strings.TrimSpace(string(raw))
			f.Close()
		}
		return s
	}
	limited, cancel := context.WithTimeout(ctx, consoleAsk)
	defer cancel()
	if status, err := api.DialSite(apiSocket(i)).Status(limited); err == nil {
		s.status = &status
	}
	return s
}

func (s standing) print(out io.Writer, told string) {
	fmt.Fprintf(out, "\nMUSTER APPLIANCE                                             release %s\n\n", version)
	if s.node == nil {
		fmt.Fprintln(out, "joined       no")
	} else {
		fmt.Fprintf(out, "joined       as %s, on master %s; certificate until %s, renews itself\n", s.node.Peer(), s.node.Master(), when(s.node.Expires()))
	}
	s.network.print(out)
	if s.status != nil {
		printSite(out, *s.status)
	}
	for _, line := range []string{s.notice, told} {
		if line != "" {
			fmt.Fprintf(out, "\n%s\n", tameLines(line))
		}
	}
	fmt.Fprintf(out, "\nNEXT         %s\n", s.next())
	if s.node == nil {
		fmt.Fprint(out, "\nToken> ")
	}
}

// next says what whoever stands before the box is to do.
func (s standing) next() string {
	switch {
	case !s.network.addressed():
		return "it has no address. Plug in a cable to a network that gives addresses by DHCP, or\n             write network.txt on a USB stick called MUSTER and plug that in."
	case s.node == nil:
		return "it has not joined a master. Put muster-token.txt on a USB stick called MUSTER and\n             plug that in; or scan or paste the token here and press Enter."
	case s.status == nil:
		return "wait: 'muster appliance serve' does not answer yet. Its first start needs the master."
	case s.status.Link != "connected":
		return "the master is not reached. Let this machine out to it by TCP; nothing has to be let in."
	case len(s.status.Hello.Problems) > 0:
		return "see the problems above; the master has tickets about them."
	case len(s.status.Hello.Servers) == 0:
		return "nothing has to be done here. On the master: 'muster appliance key " + s.status.Name + "'\n             gives the line that lets it log in on servers; then 'muster server add'."
	}
	for _, one := range s.status.Hello.Servers {
		if one.Replicated.IsZero() {
			return "nothing has to be done here. Of " + tame(one.Name) + " nothing has arrived at the master yet: see what it is doing."
		}
	}
	return "nothing has to be done here. It works."
}

// tameLines makes text from elsewhere safe for a terminal, line by line.
func tameLines(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = tame(lines[i])
	}
	return strings.Join(lines, "\n")
}
