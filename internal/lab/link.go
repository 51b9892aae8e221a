package lab

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/silo"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/remote"
	"github.com/musterdr/muster/internal/trust"
)

// Link is a silo's real line to its master: it has joined with a token, dials out over TLS, answers the master on that connection,
// and reads the master's store over it with the key that comes with each lease.
type Link struct {
	Node *trust.Node
	hub  *trust.Hub
}

// Connect gives a silo a real line, in the place of the lab's own. The node's process has to be started again.
func (l *Lab) Connect(t testing.TB, name string) *Link {
	t.Helper()
	dir := l.path("trust")
	err := trust.Create(dir, trust.Plan{Name: "hq", Listen: "127.0.0.1:0", KeyFile: l.path("master.key")})
	if err != nil {
		t.Fatal(err)
	}
	authority, err := trust.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := remote.NewServer(func(r *http.Request) (store.Driver, remote.Rights, error) {
		if peer, ok := trust.PeerOf(r.Context()); !ok || peer.Role != trust.Silo {
			return nil, remote.None, errors.New("only silos read this store")
		}
		drv, err := l.driverAt(storesAt + "/" + remote.NameOf(r))
		return drv, remote.Append, err
	})
	hub := trust.NewHub(authority, quiet)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- hub.Serve(ctx, listener, map[string]http.Handler{storesAt + "/": served.Named(storesAt)})
	}()
	t.Cleanup(func() {
		l.Nodes[name].Kill()
		cancel()
		if err := errors.Join(<-ended, served.Close(context.Background())); err != nil {
			t.Error(err)
		}
	})
	token, err := authority.Enrol(trust.Peer{Role: trust.Silo, Name: name}, time.Hour, []string{listener.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	node, err := trust.Join(t.Context(), filepath.Join(l.Nodes[name].dir(), "node"), token)
	if err != nil {
		t.Fatal(err)
	}
	node.Log = quiet
	return &Link{Node: node, hub: hub}
}

func (k *Link) silo(name string) api.Silo {
	return api.RemoteSilo(&http.Client{Transport: asked{k.hub, name}}, "https://"+name)
}

// asked asks a node for as long as it is there.
type asked struct {
	hub  *trust.Hub
	name string
}

func (a asked) RoundTrip(r *http.Request) (*http.Response, error) {
	c, err := a.hub.Client(trust.Silo, a.name)
	if err != nil {
		return nil, err
	}
	return c.Transport.RoundTrip(r)
}

func (k *Link) stores() silo.Stores {
	return &silo.Leased{Driver: func(place string) (store.Driver, error) {
		return remote.New(k.Node.Client(), "https://master"+place), nil
	}}
}
