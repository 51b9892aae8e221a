package api

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"github.com/musterdr/muster/internal/dr"
)

// Site is what is asked of an appliance that is a process of its own: by its master, down the connection that the appliance opened,
// and by people on the appliance itself. It goes on without being asked anything.
type Site interface {
	Appliance
	Files
	// Replicate returns once a kept snapshot of a server, the newest for "", is in the far store and the master knows it. Asked again,
	// or while the appliance does it by itself, it waits for that.
	Replicate(ctx context.Context, server, snapshot string, report dr.Progress) (Transfer, error)
	// Look has the appliance say hello at once, because there is something new for it.
	Look(ctx context.Context) error
	Status(ctx context.Context) (SiteStatus, error)
}

// Home is what an appliance tells its master, and asks of it, over its own connection. from names the appliance; the
// master takes it from the certificate of the connection, and RemoteHome leaves it out. Everything may be told again.
type Home interface {
	// Hello says how the appliance stands, and is answered with what it should know.
	Hello(ctx context.Context, from string, hello Hello) (Welcome, error)
	// Arrived tells of snapshots that are in the far store, at most MaxArrivals at once. It is answered for each by its identifier:
	// "" if the master has seen it there, or why it refuses it for good. What is not in the answer is told again.
	Arrived(ctx context.Context, from string, arrivals []Arrival) (map[string]string, error)
}

// MaxArrivals bounds what is told in one call.
const MaxArrivals = 64

// Hello is how an appliance stands. What it has kept is told as it stands, and not as it happened: so nothing has to be told in
// an order, or again.
type Hello struct {
	Version     string        `json:"version"`
	Clock       time.Time     `json:"clock"`
	Started     time.Time     `json:"started"`
	Definitions string        `json:"definitions"`        // the version of the servers' definitions that it has
	Servers     []SiteServer  `json:"servers"`            // that it protects, by name
	Snapshots   int           `json:"snapshots"`          // in its near store
	Owed        int           `json:"owed"`               // of those, the ones that are not in the far store
	Used        int64         `json:"used"`               // bytes of the near store
	Free        int64         `json:"free"`               // bytes free where it lies; -1 unknown
	Problems    []SiteProblem `json:"problems,omitempty"` // that are there now
	SSHKey      string        `json:"ssh_key,omitempty"`  // public half of the key that it has made to log in on servers, as in authorized_keys
}

// SiteProblem is something that keeps an appliance from its work. It is told until it is over.
type SiteProblem struct {
	ServerID string     `json:"server_id,omitempty"` // "": of the appliance
	Problem  dr.Problem `json:"problem"`
	Title    string     `json:"title"`
	Detail   string     `json:"detail,omitempty"`
	Since    time.Time  `json:"since"`
}

// Welcome is what an appliance should know.
type Welcome struct {
	Clock       time.Time         `json:"clock"`
	Definitions string            `json:"definitions"`
	Servers     []dr.Server       `json:"servers,omitempty"` // all of them, if the appliance has another version
	LKG         map[string]string `json:"lkg,omitempty"`     // by server: the snapshot that has to stay
	Rulings     []dr.Ruling       `json:"rulings,omitempty"` // what people said of held snapshots
}

// Arrival is a snapshot that is in the far store: every block that it needs was put there, each was read back there and compared
// before the put was answered, and the snapshot itself was published after all of them.
type Arrival struct {
	Snapshot dr.Snapshot `json:"snapshot"`
	Transfer Transfer    `json:"transfer"`
}

// Transfer is how a snapshot came into the far store.
type Transfer struct {
	Snapshot string        `json:"snapshot"`
	At       time.Time     `json:"at"`
	Sent     int64         `json:"sent"`    // bytes of blobs that crossed the line, those of attempts that broke off too
	Skipped  int64         `json:"skipped"` // bytes that the far store had
	Took     time.Duration `json:"took"`
}

// SiteStatus is how an appliance stands, for people.
type SiteStatus struct {
	Name    string        `json:"name"`
	Hello   Hello         `json:"hello"`
	Link    string        `json:"link"`              // "connected", or what is wrong
	Heard   time.Time     `json:"heard,omitzero"`    // when the master last answered, by this machine's clock
	Skew    time.Duration `json:"skew,omitempty"`    // how far that is ahead of the master's, by which snapshots are dated; 0 if it hardly is
	Reserve int64         `json:"reserve"`           // bytes that are kept free in the near store
	Rate    int64         `json:"rate"`              // bytes a second that may be sent now; 0: no limit, negative: none
	Files   string        `json:"files,omitempty"`   // why no image can be looked into for single files; "": it can
	Working []Operation   `json:"working,omitempty"` // runs that are not over
}

// SiteServer is a server of an appliance and where it stands.
type SiteServer struct {
	ID         string    `json:"id"`
	Name       string    `json:"name"`
	Due        time.Time `json:"due"`
	Kept       time.Time `json:"kept,omitzero"`       // when the newest kept snapshot was taken
	Replicated time.Time `json:"replicated,omitzero"` // when the newest one in the far store was taken
	Snapshots  int       `json:"snapshots"`
	Owed       int       `json:"owed"`
}

type replicate struct {
	Server   string `json:"server"`
	Snapshot string `json:"snapshot"`
}

const (
	procReplicate procedure[replicate, Transfer] = "/appliance/Replicate"
	procLook      procedure[nothing, nothing]    = "/appliance/Look"
	procStatus    procedure[nothing, SiteStatus] = "/appliance/Status"

	procHello   procedure[Hello, Welcome]               = "/home/Hello"
	procArrived procedure[[]Arrival, map[string]string] = "/home/Arrived"
)

// SiteHandler serves an appliance that is a process of its own.
func SiteHandler(s Site) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/appliance/", ApplianceHandler(s))
	procReplicate.serve(mux, func(ctx context.Context, in replicate, report dr.Progress) (Transfer, error) {
		return s.Replicate(ctx, in.Server, in.Snapshot, report)
	})
	procLook.serve(mux, func(ctx context.Context, _ nothing, _ dr.Progress) (nothing, error) { return nothing{}, s.Look(ctx) })
	procStatus.serve(mux, func(ctx context.Context, _ nothing, _ dr.Progress) (SiteStatus, error) { return s.Status(ctx) })
	registerFiles(humago.New(mux, restConfig("")), s)
	return http.MaxBytesHandler(mux, maxMessage)
}

// RemoteSite is the appliance of a name that answers through an HTTP client under a base URL.
func RemoteSite(c *http.Client, base, name string) Site {
	rest := &Client{http: c, base: base, who: "appliance " + name, hint: "appliance " + name + " does not answer: see 'muster appliance list'"}
	return remoteSite{remoteAppliance: remoteAppliance{c, base}, Files: rest}
}

// DialSite gives the appliance that listens on a unix socket of this machine. It does not connect yet.
func DialSite(socket string) Site {
	c := Dial(socket)
	c.who, c.hint = "appliance", "no appliance answers on "+socket+": start it with 'muster appliance serve', or name its folder with --dir"
	return remoteSite{remoteAppliance: remoteAppliance{c.http, c.base}, Files: c}
}

type remoteSite struct {
	remoteAppliance
	Files
}

func (r remoteSite) Replicate(ctx context.Context, server, snapshot string, report dr.Progress) (Transfer, error) {
	return procReplicate.ask(ctx, r.c, r.base, replicate{server, snapshot}, report)
}

func (r remoteSite) Look(ctx context.Context) error {
	_, err := procLook.ask(ctx, r.c, r.base, nothing{}, nil)
	return err
}

func (r remoteSite) Status(ctx context.Context) (SiteStatus, error) {
	return procStatus.ask(ctx, r.c, r.base, nothing{}, nil)
}

// HomeHandler serves a master to its appliances. from says which appliance a request comes from; an error refuses the request.
func HomeHandler(h Home, from func(ctx context.Context) (string, error)) http.Handler {
	mux := http.NewServeMux()
	procHello.serve(mux, func(ctx context.Context, in Hello, _ dr.Progress) (Welcome, error) {
		name, err := from(ctx)
		if err != nil {
			return Welcome{}, err
		}
		return h.Hello(ctx, name, in)
	})
	procArrived.serve(mux, func(ctx context.Context, in []Arrival, _ dr.Progress) (map[string]string, error) {
		name, err := from(ctx)
		if err != nil {
			return nil, err
		}
		if len(in) > MaxArrivals {
			return nil, Errorf(Invalid, "%d arrivals at once: the most is %d", len(in), MaxArrivals)
		}
		return h.Arrived(ctx, name, in)
	})
	return mux
}

// RemoteHome is the master that answers through an HTTP client under a base URL.
func RemoteHome(c *http.Client, base string) Home { return remoteHome{c, base} }

type remoteHome struct {
	c    *http.Client
	base string
}

func (r remoteHome) Hello(ctx context.Context, _ string, hello Hello) (Welcome, error) {
	return procHello.ask(ctx, r.c, r.base, hello, nil)
}

func (r remoteHome) Arrived(ctx context.Context, _ string, arrivals []Arrival) (map[string]string, error) {
	return procArrived.ask(ctx, r.c, r.base, arrivals, nil)
}

// ApplianceStatus is an appliance as its master sees it.
type ApplianceStatus struct {
	Name      string        `json:"name"`
	Connected bool          `json:"connected"`
	Seen      time.Time     `json:"seen,omitzero"` // when it last said hello, by the master's clock
	Skew      time.Duration `json:"skew"`          // how far its clock is ahead
	Servers   []string      `json:"servers"`       // that it is to protect
	Hello     Hello         `json:"hello"`         // the last
}
