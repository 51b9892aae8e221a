package lab

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/appliance"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/files"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/remote"
)

// Site is an appliance as a process of its own, at the other end of a line to the lab, whose store is its far store. It can be
// crashed and reopened, and its line cut.
type Site struct {
	*appliance.Node
	Near  *store.Store
	Dir   string
	Clock *Clock
	// Fault, if set, is asked at every step of the appliance's work, and its error is the step's; see Lab.Fault.
	Fault func(ctx context.Context, at string) error
	// Config, if set, changes what the node is made of.
	Config func(c *appliance.NodeConfig)

	lab      *Lab
	name     string
	customer string
	farKey   string
	line     *siteLine
	stop     func()
}

// SiteSteps are the places at which a Site asks Fault, in the order of a night.
var SiteSteps = []string{"before open source", "after open source", "before far store", "after far store", "in the middle of sending", "before hello",
	"after hello", "before arrived", "after arrived"}

// siteLine is the way between a site and the lab, both directions.
type siteLine struct {
	cut  atomic.Bool
	down atomic.Pointer[httptest.Server] // the site, as the master reaches it
	up   *httptest.Server                // the master and the far store, as the site reaches them
	home atomic.Pointer[http.Handler]
	// broken, if set, breaks a request off.
	broken atomic.Pointer[func(r *http.Request) error]
}

var errCut = errors.New("the line is cut")

// RoundTrip carries one request over the line.
func (w *siteLine) RoundTrip(r *http.Request) (*http.Response, error) {
	if w.cut.Load() {
		return nil, errCut
	}
	if broken := w.broken.Load(); broken != nil {
		if err := (*broken)(r); err != nil {
			return nil, err
		}
	}
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err == nil && w.cut.Load() {
		resp.Body.Close()
		return nil, errCut
	}
	return resp, err
}

// NewSite makes an appliance of the installation's own, and starts it. The lab learns of it.
func (l *Lab) NewSite(name string) *Site { return l.NewSiteOf("", name) }

// NewSiteOf makes an appliance of a customer that has a far store.
func (l *Lab) NewSiteOf(customer, name string) *Site {
	l.t.Helper()
	s := &Site{lab: l, name: name, customer: customer, Dir: filepath.Join(l.Dir, "site-"+name), Clock: &Clock{}, line: &siteLine{}}
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		l.t.Fatal(err)
	}
	home, err := l.Customers.Of(context.Background(), customer)
	if err != nil {
		l.t.Fatal(err)
	}
	if err := store.CreateLike(context.Background(), s.driver(), "near", home); err != nil {
		l.t.Fatal(err)
	}
	access, _ := l.access(context.Background(), dr.Server{Customer: customer, Appliance: name})
	far := remote.NewServer(func(*http.Request) (store.Driver, remote.Rights, error) {
		drv, err := l.driverAt(access.Place)
		return drv, remote.Append, err
	})
	s.farKey = access.Password
	mux := http.NewServeMux()
	mux.Handle("/store/", http.StripPrefix("/store", far))
	mux.HandleFunc("/home/", func(w http.ResponseWriter, r *http.Request) { (*s.line.home.Load()).ServeHTTP(w, r) })
	s.line.up = httptest.NewServer(mux)
	if l.sites == nil {
		l.sites = map[string]*Site{}
	}
	l.sites[name] = s
	s.atHome()
	s.Open()
	l.t.Cleanup(func() {
		s.Crash()
		s.line.up.Close()
		if err := far.Close(context.Background()); err != nil {
			l.t.Error(err)
		}
	})
	return s
}

// atHome has the present master answer.
func (s *Site) atHome() {
	h := api.HomeHandler(s.lab.Master, func(context.Context) (string, error) { return s.name, nil })
	s.line.home.Store(&h)
}

func (s *Site) driver() folder.Driver { return folder.Driver{Path: filepath.Join(s.Dir, "near")} }

// Cut cuts the line, or mends it.
func (s *Site) Cut(cut bool) {
	s.line.cut.Store(cut)
	if server := s.line.down.Load(); cut && server != nil {
		server.CloseClientConnections()
	}
	if cut {
		s.line.up.CloseClientConnections()
	}
}

// reach gives the site to the master.
func (l *Lab) reach(name string) (api.Site, error) {
	s := l.sites[name]
	if s == nil && l.Reach != nil {
		return l.Reach(name)
	}
	if s == nil || s.line.cut.Load() || s.line.down.Load() == nil {
		return nil, errCut
	}
	return api.RemoteSite(&http.Client{Transport: s.line}, s.line.down.Load().URL, name), nil
}

// Open starts a process of the appliance. It does nothing by itself: tests wake it.
func (s *Site) Open() {
	s.lab.t.Helper()
	if err := s.open(); err != nil {
		s.lab.t.Fatalf("open site: %v", err)
	}
}

func (s *Site) open() error {
	ctx, cancel := context.WithCancel(context.Background())
	var closes []func()
	s.stop = func() {
		cancel()
		for i := len(closes) - 1; i >= 0; i-- {
			closes[i]()
		}
	}
	st, err := store.Open(ctx, s.driver(), "near")
	if err != nil {
		return err
	}
	closes = append(closes, func() { st.Close(context.Background()) })
	browser := files.New(st, nil, filepath.Join(s.Dir, "run"))
	closes = append(closes, func() { browser.Close() })
	eng, err := engine.Open(ctx, engine.Config{DSN: filepath.Join(s.Dir, engineFile), Version: appliance.Shape, Logger: quiet})
	if err != nil {
		return err
	}
	client := &http.Client{Transport: s.line}
	config := appliance.NodeConfig{Appliance: &appliance.Appliance{Store: st, Open: s.openSource, Browser: browser}, Name: s.name, Engine: eng,
		Home: faultyHome{api.RemoteHome(client, s.line.up.URL), s}, Log: quiet, Version: "lab", Now: s.Clock.Now, Reserve: 1}
	config.Far = func(ctx context.Context) (*store.Store, error) {
		return around(ctx, s.Fault, "far store", func() (*store.Store, error) {
			return store.Open(ctx, remote.New(client, s.line.up.URL+"/store"), s.farKey)
		})
	}
	s.line.broken.Store(nil)
	if s.Fault != nil {
		broken := func(r *http.Request) error {
			if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/blobs/p") {
				return s.Fault(ctx, "in the middle of sending")
			}
			return nil
		}
		s.line.broken.Store(&broken)
	}
	if s.Config != nil {
		s.Config(&config)
	}
	s.Near = st
	s.Node, err = appliance.OpenNode(ctx, config)
	if err != nil {
		return err
	}
	node := s.Node
	closes = append(closes, func() { _ = node.Close() }, func() { eng.Close(context.Background()) })
	down := httptest.NewServer(api.SiteHandler(s.Node))
	closes = append(closes, func() {
		s.line.down.Store(nil)
		down.CloseClientConnections()
		down.Close()
	})
	s.line.down.Store(down)
	return s.Node.Start(ctx)
}

// Crash ends the present process: whatever is under way ends where it is.
func (s *Site) Crash() {
	if s.stop != nil {
		s.stop()
		s.stop = nil
	}
}

// Night wakes the appliance and tells the master until nothing is to be done any more.
func (s *Site) Night() {
	s.lab.t.Helper()
	ctx := context.Background()
	for deadline := time.Now().Add(patience); ; {
		s.Wake(ctx)
		_ = s.Hail(ctx) // the line may be cut
		runs, err := s.Engine.List(ctx, engine.Filter{Unfinished: true})
		if err != nil {
			s.lab.t.Fatal(err)
		}
		if len(runs) == 0 {
			s.Wake(ctx)
			if runs, err = s.Engine.List(ctx, engine.Filter{Unfinished: true}); err != nil {
				s.lab.t.Fatal(err)
			}
		}
		if len(runs) == 0 {
			_ = s.Hail(ctx)
			return
		}
		for _, r := range runs {
			limited, cancel := context.WithDeadline(ctx, deadline)
			if _, err := s.Engine.Wait(limited, r.ID); err != nil {
				s.lab.t.Fatalf("run %s: %v", r.ID, err)
			}
			cancel()
		}
	}
}

func (s *Site) openSource(ctx context.Context, source dr.Source) (capture.Source, error) {
	return around(ctx, s.Fault, "open source", func() (capture.Source, error) { return s.lab.openSource(ctx, source) })
}

type faultyHome struct {
	api.Home
	site *Site
}

func (f faultyHome) Hello(ctx context.Context, from string, h api.Hello) (api.Welcome, error) {
	return around(ctx, f.site.Fault, "hello", func() (api.Welcome, error) {
		w, err := f.Home.Hello(ctx, from, h)
		w.Clock = time.Time{} // days pass where a test turns the site's clock, and it would learn that at the master none has
		return w, err
	})
}

func (f faultyHome) Arrived(ctx context.Context, from string, a []api.Arrival) (map[string]string, error) {
	if len(a) == 0 {
		return f.Home.Arrived(ctx, from, a)
	}
	return around(ctx, f.site.Fault, "arrived", func() (map[string]string, error) { return f.Home.Arrived(ctx, from, a) })
}
