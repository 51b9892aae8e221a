package main

import (
	"bytes"
	"context"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/trust"
)

func TestAConsoleTellsWhereTheMachineListens(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"proc/net/tcp": `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 3900580A:C350 0100580A:1D13 01 00000000:00000000 00:00000000 00000000     0        0 2 1
`,
		"proc/net/tcp6":   "   0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A\n   1: torn\n",
		"proc/net/udp":    "   0: 3900580A:0044 00000000:0000 07\n   1: 3900580A:0044 00000000:0000 07\n   2: ZZ:0044 00000000:0000 07\n",
		"proc/net/route":  "Iface\tDestination\tGateway \tFlags\nens3\t00000000\t0100580A\t0003\nens3\t0000580A\t00000000\t0001\n",
		"etc/resolv.conf": "# made by hand\nnameserver 10.88.0.1\n",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n := readNetwork(root)
	if want := []string{"tcp 127.0.0.1:22", "tcp [::]:8080", "udp 10.88.0.57:68"}; !slices.Equal(n.listens, want) {
		t.Errorf("it listens on %q; want %q", n.listens, want)
	}
	var out bytes.Buffer
	n.print(&out)
	for _, line := range []string{"router       10.88.0.1\n", "name server  10.88.0.1\n", "listens      tcp 127.0.0.1:22, tcp [::]:8080, udp 10.88.0.57:68\n"} {
		if !strings.Contains(out.String(), line) {
			t.Errorf("no line %q in\n%s", line, out.String())
		}
	}
	out.Reset()
	hostNetwork{}.print(&out)
	if !strings.Contains(out.String(), "listens      nowhere\n") {
		t.Error(out.String())
	}
}

// Who types before a box that has not joined gets an answer, and no box is joined by what is no token.
func TestAConsoleTakesNothingButATokenAndStartsNothing(t *testing.T) {
	dir := t.TempDir()
	notice := filepath.Join(dir, "notice")
	if err := os.WriteFile(notice, []byte("why it has not \033[2Jjoined"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	c := console{install: install{Dir: filepath.Join(dir, "box"), Run: dir}, out: &out, notice: notice}
	ctx, cancel := context.WithCancel(t.Context())
	typed, keyboard := io.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- c.run(ctx, typed) }()
	for _, line := range []string{"root\n", "\n", "muster1.appliance.acme.office.1.A.B@h:1/wrong\n", "; reboot\n"} {
		if _, err := io.WriteString(keyboard, line); err != nil {
			t.Fatal(err)
		}
	}
	_ = keyboard.Close()
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(out.String(), "That did not work: read token: it is no token of Muster"); got < 1 {
		t.Errorf("nothing was said of what is no token:\n%s", out.String())
	}
	if strings.Contains(out.String(), "\033[2J") || !strings.Contains(out.String(), "why it has not") {
		t.Errorf("the notice is not shown, or is not tame:\n%q", out.String())
	}
	if _, err := os.Stat(c.install.nodeDir()); !os.IsNotExist(err) {
		t.Errorf("a folder was made: %v", err)
	}
}

func TestAConsoleSaysWhatIsToDoNext(t *testing.T) {
	there := hostNetwork{cards: []card{{name: "ens3", addresses: []netip.Prefix{netip.MustParsePrefix("10.88.0.57/24")}}}}
	joined := &trust.Node{}
	with := func(link string, servers ...api.SiteServer) *api.SiteStatus {
		return &api.SiteStatus{Name: "office", Link: link, Hello: api.Hello{Servers: servers}}
	}
	for want, s := range map[string]standing{
		"it has no address":           {network: hostNetwork{cards: []card{{name: "ens3"}}}, node: joined},
		"it has not joined":           {network: there},
		"wait":                        {network: there, node: joined},
		"the master is not reached":   {network: there, node: joined, status: with("away: refused")},
		"muster appliance key office": {network: there, node: joined, status: with("connected")},
		"It works":                    {network: there, node: joined, status: with("connected", api.SiteServer{Name: "till", Replicated: time.Now()})},
		"nothing has arrived":         {network: there, node: joined, status: with("connected", api.SiteServer{Name: "till"})},
	} {
		if next := s.next(); !strings.Contains(next, want) {
			t.Errorf("it says %q; want %q", next, want)
		}
	}
}

func TestAnInstallationMakesItsSSHKeyOnce(t *testing.T) {
	i := install{Dir: t.TempDir()}
	first, err := i.makeSSHKey("office")
	if err != nil {
		t.Fatal(err)
	}
	again, err := i.makeSSHKey("office")
	if err != nil || again != first {
		t.Errorf("%q, then %q: %v", first, again, err)
	}
	if _, _, _, _, err := ssh.ParseAuthorizedKey([]byte(first)); err != nil {
		t.Errorf("%q: %v", first, err)
	}
	if info, err := os.Stat(i.sshKey()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
	if err := os.WriteFile(i.sshKey(), []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := i.makeSSHKey("office"); err == nil {
		t.Error("a key that cannot be read was made anew: servers know the old one")
	}
}
