package cable

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestALongCableOnlyTakesItsTime(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs root and /dev/net/tun: set MUSTER_REAL=1")
	}
	const delay = 50 * time.Millisecond
	c, err := Lay("mcable0", "mcable1", Line{Delay: delay})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	space := fmt.Sprintf("mcable%d", os.Getpid())
	sh := func(line string) {
		t.Helper()
		if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
	}
	sh("ip netns add " + space)
	defer sh("ip netns del " + space)
	sh("ip link set mcable1 netns " + space + " && ip addr add 10.213.81.1/30 dev mcable0 && ip link set mcable0 up")
	sh("ip -n " + space + " addr add 10.213.81.2/30 dev mcable1 && ip -n " + space + " link set mcable1 up")
	connect := func() time.Duration {
		began := time.Now()
		conn, err := net.DialTimeout("tcp", "10.213.81.2:9", 5*time.Second)
		if err == nil {
			conn.Close()
			t.Fatal("nobody listens there, and somebody answered")
		}
		var d net.Error
		if errors.As(err, &d) && d.Timeout() {
			t.Fatal("nothing comes through")
		}
		return time.Since(began)
	}
	connect() // they learn each other's addresses
	if took := connect(); took < 2*delay || took > 3*delay {
		t.Errorf("a round trip over a cable of %s one way took %s", delay, took)
	}
	c.Set(Line{})
	if took := connect(); took > delay {
		t.Errorf("a round trip over a short cable took %s", took)
	}
	if in, out := c.Carried(); in == 0 || out == 0 {
		t.Errorf("carried %d and %d bytes", in, out)
	}
}
