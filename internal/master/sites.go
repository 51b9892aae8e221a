package master

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/store"
)

// Limits of what is done with appliances elsewhere.
const (
	DefaultAway    = 15 * time.Minute // an appliance may be silent for so long
	siteSaveEvery  = 10 * time.Minute // how often what an appliance said is written down, unless it matters
	siteWatchEvery = time.Minute
	lookLimit      = 10 * time.Second
	sendLimit      = 7 * 24 * time.Hour // a first copy over a thin line
	maxRulingsTold = 1000
)

// applianceRecord is the kind under which the store keeps what an appliance last said.
const applianceRecord = "appliance"

// siteSeen is an appliance elsewhere, as it last said.
type siteSeen struct {
	Name  string        `json:"name"`
	Seen  time.Time     `json:"seen"` // by our clock
	Skew  time.Duration `json:"skew"` // how far its clock is ahead
	Hello api.Hello     `json:"hello"`

	saved time.Time
}

// loadSites reads what appliances said to earlier processes.
func (m *Master) loadSites(ctx context.Context) error {
	all, err := records[siteSeen](ctx, m.Store, applianceRecord)
	if err != nil {
		return fmt.Errorf("read what appliances last said: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range all {
		m.sites[s.Name] = s
	}
	return nil
}

// site gives the appliance of a name.
func (m *Master) site(name string) (api.Site, error) {
	if m.Sites == nil {
		return nil, api.Errorf(api.Unavailable, "this master has no appliances of its own kind: it serves no link; see docs/operator/appliance-role.md")
	}
	s, err := m.Sites(name)
	if err != nil {
		return nil, api.Errorf(api.Unavailable, "appliance %s is not connected: it goes on by itself, and brings what it captured when it is back; see 'muster appliance list' (%w)", name, err)
	}
	return s, nil
}

// capturer gives the appliance that captures a server: this process, or one elsewhere.
func (m *Master) capturer(appliance string) (api.Appliance, error) {
	if appliance == "" {
		return m.Appliance, nil
	}
	return m.site(appliance)
}

// look tells an appliance that there is something new for it. One that is away asks when it is back.
func (m *Master) look(ctx context.Context, appliance string) {
	if appliance == "" {
		return
	}
	site, err := m.site(appliance)
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookLimit)
	go func() {
		defer cancel()
		_ = site.Look(ctx) // it asks by itself soon
	}()
}

// definitions gives the servers of an appliance, a version of them that changes with every change, and their last-known-goods.
func (m *Master) definitions(ctx context.Context, appliance string) (servers []dr.Server, version string, lkg map[string]string, err error) {
	all, err := m.Catalog.ServersOf(ctx, appliance)
	if err != nil {
		return nil, "", nil, err
	}
	captures := m.capturedBy(appliance)
	lkg = map[string]string{}
	for _, one := range all {
		if !captures(one.Server) {
			continue
		}
		servers = append(servers, one.Server)
		if one.LKG != "" {
			lkg[one.Server.ID] = one.LKG
		}
	}
	raw, err := json.Marshal(servers)
	sum := sha256.Sum256(raw)
	return servers, hex.EncodeToString(sum[:8]), lkg, err
}

// Hello implements api.Home.
func (m *Master) Hello(ctx context.Context, from string, hello api.Hello) (api.Welcome, error) {
	if err := dr.ValidateName(from); err != nil || from == "" {
		return api.Welcome{}, api.Errorf(api.Refused, "the appliance has no name: let it join with a token of this master")
	}
	now := m.Now().UTC()
	servers, version, lkg, err := m.definitions(ctx, from)
	if err != nil {
		return api.Welcome{}, err
	}
	if err := m.heard(ctx, siteSeen{Name: from, Seen: now, Skew: hello.Clock.Sub(now).Round(time.Second), Hello: hello}, servers); err != nil {
		return api.Welcome{}, err
	}
	w := api.Welcome{Clock: now, Definitions: version, LKG: lkg}
	if hello.Definitions != version {
		w.Servers = servers
	}
	ours := map[string]bool{}
	for _, s := range servers {
		ours[s.ID] = true
	}
	if len(servers) == 0 {
		return w, nil
	}
	st, err := m.storeOf(ctx, servers[0]) // they are all of one customer
	if err != nil {
		return w, err
	}
	rulings, err := records[dr.Ruling](ctx, st, recordRuling)
	if err != nil {
		return w, err
	}
	for _, r := range rulings {
		rec, err := m.Catalog.Snapshot(ctx, r.SnapshotID)
		if err == nil && ours[rec.Snapshot.ServerID] && len(w.Rulings) < maxRulingsTold {
			w.Rulings = append(w.Rulings, r)
		}
	}
	return w, nil
}

// heard writes down what an appliance said, and keeps the tickets about it.
func (m *Master) heard(ctx context.Context, s siteSeen, servers []dr.Server) error {
	m.mu.Lock()
	before, known := m.sites[s.Name]
	s.saved = before.saved
	m.sites[s.Name] = s
	m.mu.Unlock()
	now := problemsOf(s, servers)
	then := problemsOf(before, servers)
	for key, p := range now {
		_, same := then[key]
		if said := m.told("site/"+s.Name+"/"+key, true); said && same {
			continue
		}
		if _, err := m.Catalog.OpenTicket(ctx, p.ServerID, p.Problem, p.Title, p.Detail, "", m.Now()); err != nil && !errors.Is(err, catalog.ErrNotFound) {
			return err
		}
	}
	for key, p := range then {
		if _, still := now[key]; !still {
			m.told("site/"+s.Name+"/"+key, false)
			if err := m.problemOver(ctx, p.ServerID, p.Problem, "appliance "+s.Name+" says that it is over"); err != nil {
				return err
			}
		}
	}
	if !known {
		m.event(ctx, "appliance.first-seen", "", s.Name, "appliance "+s.Name+" says hello for the first time")
	}
	if greeted := m.told("greeted/"+s.Name, true); m.told("away/"+s.Name, false) || !greeted { // an earlier process may have said it
		if err := m.problemOver(ctx, "", dr.ProblemAway+dr.Problem("/"+s.Name), "appliance "+s.Name+" is back"); err != nil {
			return err
		}
	}
	if known && maps.EqualFunc(now, then, func(a, b api.SiteProblem) bool { return a == b }) && s.Seen.Sub(s.saved) < siteSaveEvery && s.saved.Before(s.Seen) {
		return nil
	}
	s.saved = s.Seen
	if err := m.Store.PutRecord(ctx, applianceRecord, s.Name, s); err != nil {
		return fmt.Errorf("write down what appliance %s says: %w", s.Name, err)
	}
	m.mu.Lock()
	m.sites[s.Name] = s
	m.mu.Unlock()
	return nil
}

// maxSiteProblems bounds how many problems of one appliance are heard.
const maxSiteProblems = 1000

// problemsOf gives the problems of an appliance by a key: those that it tells, of its own servers and of itself, and that of its clock.
func problemsOf(s siteSeen, servers []dr.Server) map[string]api.SiteProblem {
	out := map[string]api.SiteProblem{}
	for _, p := range s.Hello.Problems {
		if len(out) >= maxSiteProblems || len(p.Title)+len(p.Detail) > 64<<10 {
			continue
		}
		switch p.Problem {
		case dr.ProblemCapture, dr.ProblemSend, dr.ProblemStore:
			if !slices.ContainsFunc(servers, func(one dr.Server) bool { return one.ID == p.ServerID }) {
				continue
			}
		case dr.ProblemNearFull:
			p.ServerID, p.Problem = "", p.Problem+dr.Problem("/"+s.Name)
		default:
			continue
		}
		out[p.ServerID+"/"+string(p.Problem)] = p
	}
	if off := dr.ClockOff(s.Skew); off != "" {
		p := api.SiteProblem{Problem: dr.ProblemClock + dr.Problem("/"+s.Name), Title: "the clock of appliance " + s.Name + " is wrong: " + off + " of the master's",
			Detail: "so it was when this was noticed: set it, or have it set itself (systemd-timesyncd, chrony). Snapshots are dated by the master's clock meanwhile, as long as the appliance reaches it"}
		out["/"+string(p.Problem)] = p
	}
	return out
}

// told remembers whether something was said in this process, and says whether it was.
func (m *Master) told(what string, now bool) (before bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	before = m.said[what]
	if now {
		m.said[what] = true
	} else {
		delete(m.said, what)
	}
	return before
}

// problemOver closes the ticket of a problem.
func (m *Master) problemOver(ctx context.Context, serverID string, problem dr.Problem, reason string) error {
	open, err := m.Catalog.Tickets(ctx, catalog.TicketFilter{ServerID: serverID})
	if err != nil {
		return err
	}
	for _, t := range open {
		if t.ServerID == serverID && t.Problem == problem {
			if err := m.Catalog.CloseTicket(ctx, t.ID, reason, m.Now()); err != nil && !errors.Is(err, catalog.ErrNotFound) {
				return err
			}
		}
	}
	return nil
}

// Arrived implements api.Home. What is answered with "" is in the far store and in the catalog, and what comes next has begun.
func (m *Master) Arrived(ctx context.Context, from string, arrivals []api.Arrival) (map[string]string, error) {
	out := map[string]string{}
	var failed error
	for _, a := range arrivals {
		err := m.arrived(ctx, from, a)
		var known *api.Error
		switch {
		case err == nil:
			out[a.Snapshot.ID] = ""
		case errors.As(err, &known) && (known.Kind == api.Refused || known.Kind == api.Invalid):
			out[a.Snapshot.ID] = known.Message
			m.event(ctx, "arrival.refused", "", a.Snapshot.ID, "a snapshot of appliance "+from+" was refused: "+known.Message)
		default: // it is told again
			failed = err
			m.Log.WarnContext(ctx, "take in a snapshot", "appliance", from, "snapshot", a.Snapshot.ID, "error", err)
		}
	}
	if len(out) == 0 && failed != nil {
		return nil, failed
	}
	return out, nil
}

func (m *Master) arrived(ctx context.Context, from string, a api.Arrival) error {
	snap := a.Snapshot
	s, err := m.Catalog.Server(ctx, snap.ServerID)
	if errors.Is(err, catalog.ErrNotFound) {
		return api.Errorf(api.Refused, "its server %s is not protected any more", snap.ServerID)
	}
	if err != nil {
		return err
	}
	if s.ID != snap.ServerID || !m.capturedBy(from)(s) {
		return api.Errorf(api.Refused, "server %s is not captured by appliance %s", s.Name, from)
	}
	if err := snap.Validate(); err != nil {
		return api.Errorf(api.Invalid, "%w", err)
	}
	if a.Transfer.Sent < 0 {
		return api.Errorf(api.Invalid, "snapshot %s came with %d bytes", snap.ID, a.Transfer.Sent)
	}
	if snap.IsData() {
		if _, err := m.Catalog.Snapshot(ctx, snap.Image); errors.Is(err, catalog.ErrNotFound) {
			return api.Errorf(api.Conflict, "the image %s that data %s goes onto has not arrived", snap.Image, snap.ID)
		} else if err != nil {
			return err
		}
	}
	if err := m.Far(ctx, s, snap.ID); err != nil {
		return err
	}
	snap.Server = s.Name
	fresh, err := m.Catalog.RecordReplicated(ctx, snap, a.Transfer.Sent)
	if err != nil {
		return err
	}
	if fresh {
		m.told("arrival/"+s.ID, false)
	}
	return m.process(ctx, s, snap)
}

// inStore is Config.Far of a master that has the far store open itself: the snapshot is published there and its manifest can be read.
func (m *Master) inStore(ctx context.Context, s dr.Server, snapshot string) error {
	st, err := m.storeOf(ctx, s)
	if err != nil {
		return err
	}
	if err := st.Refresh(ctx); err != nil {
		return err
	}
	_, err = st.Snapshot(ctx, snapshot)
	if errors.Is(err, store.ErrNotFound) {
		return api.Errorf(api.Conflict, "snapshot %s is not in the far store", snapshot)
	}
	return err
}

// process starts what follows when a snapshot has arrived (R40). It starts nothing for one that arrived after a newer one, nor
// for an image whose server's data follows and is tested with it; and while the server is invoked nothing moves.
func (m *Master) process(ctx context.Context, s dr.Server, snap dr.Snapshot) error {
	if s.HasData() && !snap.IsData() {
		return nil
	}
	if _, active, err := m.Catalog.ActiveInvocation(ctx, s.ID); err != nil || active {
		return err
	}
	all, err := m.Catalog.Snapshots(ctx, s.ID)
	if err != nil {
		return err
	}
	for _, r := range all {
		switch {
		case r.Snapshot.ID == snap.ID && r.State != dr.Replicated:
			return nil // it was looked at
		case r.Snapshot.IsData() == snap.IsData() && r.State != dr.Expired && r.Snapshot.Taken.After(snap.Taken):
			return nil
		}
	}
	in := work{ServerID: s.ID, SnapshotID: snap.ID, PreRecovery: dr.NewID("pre"), VerdictID: dr.NewID("verdict"), Data: snap.IsData(),
		Asked: m.Now(), Arrived: true}
	kind, subject := kindProtect, snap.ID
	op, err := m.Operation(ctx, operationID(kind, s.Name, subject), 0, 0)
	if err == nil && op.State.Finished() { // somebody asked for it and did not wait until it came
		kind, subject = kindTest, in.VerdictID
	}
	_, err = begin(ctx, m, kind, s.Name, subject, in, engine.StartOptions{Key: serverKey(s.ID)})
	return err
}

// Replicate implements api.Operator.
func (m *Master) Replicate(ctx context.Context, name, snapshot string) (api.Operation, error) {
	s, err := m.server(ctx, name)
	if err != nil {
		return api.Operation{}, err
	}
	if s.Appliance == "" {
		return api.Operation{}, api.Errorf(api.Conflict, "server %s is captured by this process, straight into its store: there is nothing to send", s.Name)
	}
	if _, err := m.site(s.Appliance); err != nil {
		return api.Operation{}, err
	}
	if snapshot != "" {
		if err := dr.ValidateID(snapshot); err != nil {
			return api.Operation{}, api.Errorf(api.Invalid, "%w", err)
		}
	}
	return begin(ctx, m, kindReplicate, s.Name, dr.NewID("send"), work{ServerID: s.ID, SnapshotID: snapshot, Appliance: s.Appliance, Asked: m.Now()}, engine.StartOptions{})
}

// replicate has an appliance send a snapshot now. "" is the newest that it has.
func (m *Master) replicate(r *engine.Run, in work) error {
	_, err := engine.Step(r, "replicate", remote(sendLimit), func(ctx context.Context) (string, error) {
		return m.replicated(ctx, r, in, in.SnapshotID)
	})
	return err
}

// remote says how a step is tried that is carried out elsewhere: an appliance that goes away is waited for.
func remote(limit time.Duration) engine.StepOptions {
	return engine.StepOptions{Limit: limit, Attempts: 60, Backoff: 2 * time.Second}
}

// lasting makes every error final but that of an appliance that went away.
func lasting(err error) error {
	if err == nil || api.KindOf(err) == api.Unavailable {
		return err
	}
	return engine.Permanent(err)
}

// replicated waits until an appliance has sent a snapshot and told us so.
func (m *Master) replicated(ctx context.Context, r *engine.Run, in work, snapshot string) (string, error) {
	site, err := m.site(in.Appliance)
	if err != nil {
		return "", err
	}
	t, err := site.Replicate(ctx, in.ServerID, snapshot, r.Report)
	return t.Snapshot, lasting(err)
}

// Appliances implements api.Operator.
func (m *Master) Appliances(ctx context.Context) ([]api.ApplianceStatus, error) {
	servers, err := m.Catalog.Servers(ctx)
	if err != nil {
		return nil, err
	}
	out := map[string]*api.ApplianceStatus{}
	get := func(name string) *api.ApplianceStatus {
		if out[name] == nil {
			_, err := m.site(name)
			out[name] = &api.ApplianceStatus{Name: name, Connected: err == nil, Servers: []string{}}
		}
		return out[name]
	}
	m.mu.Lock()
	seen := maps.Clone(m.sites)
	m.mu.Unlock()
	for name, s := range seen {
		a := get(name)
		a.Seen, a.Skew, a.Hello = s.Seen, s.Skew, s.Hello
	}
	for _, s := range servers {
		if s.Appliance != "" {
			a := get(s.Appliance)
			a.Servers = append(a.Servers, s.Name)
		}
	}
	list := []api.ApplianceStatus{}
	for _, name := range slices.Sorted(maps.Keys(out)) {
		list = append(list, *out[name])
	}
	return list, nil
}

// near gives what a server's appliance last said of it.
func (m *Master) near(s dr.Server) *api.SiteServer {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, one := range m.sites[s.Appliance].Hello.Servers {
		if s.Appliance != "" && one.ID == s.ID {
			return &one
		}
	}
	return nil
}

// watchSites says so when an appliance is silent for too long, and when a snapshot that should have arrived did not (R72).
func (m *Master) watchSites(ctx context.Context) {
	now := m.Now()
	m.mu.Lock()
	watch := now.Sub(m.watched) >= siteWatchEvery || now.Before(m.watched)
	if watch {
		m.watched = now
	}
	seen := maps.Clone(m.sites)
	m.mu.Unlock()
	if !watch {
		return
	}
	wanted, err := m.watchServers(ctx, now)
	if err != nil {
		m.Log.ErrorContext(ctx, "look for missing snapshots", "error", err)
		return
	}
	for name, its := range wanted {
		last := seen[name].Seen
		if last.IsZero() || last.After(now) {
			last = m.started
		}
		if now.Sub(last) <= m.Away || m.told("away/"+name, true) {
			continue
		}
		detail := fmt.Sprintf("it was last heard of %s. It goes on capturing %s by itself if it runs; look at its power and its line", lastHeard(seen[name].Seen), strings.Join(its, ", "))
		if _, err := m.Catalog.OpenTicket(ctx, "", dr.ProblemAway+dr.Problem("/"+name), "appliance "+name+" is away", detail, "", now); err != nil {
			m.Log.ErrorContext(ctx, "open ticket", "error", err)
		}
	}
}

func lastHeard(at time.Time) string {
	if at.IsZero() {
		return "never"
	}
	return "at " + at.UTC().Format(time.RFC3339)
}

// watchServers looks at all servers whose snapshots appliances bring, and gives their names by appliance.
func (m *Master) watchServers(ctx context.Context, now time.Time) (wanted map[string][]string, err error) {
	wanted = map[string][]string{}
	for after := ""; ; {
		page, err := m.Catalog.Expected(ctx, after)
		if err != nil {
			return nil, err
		}
		for _, e := range page {
			wanted[e.Server.Appliance] = append(wanted[e.Server.Appliance], e.Server.Name)
			if err := m.watchServer(ctx, e, now); err != nil {
				m.Log.ErrorContext(ctx, "look for missing snapshots", "server", e.Server.Name, "error", err)
			}
		}
		if len(page) < catalog.MaxList {
			return wanted, nil
		}
		after = page[len(page)-1].Server.ID
	}
}

func (m *Master) watchServer(ctx context.Context, e catalog.Expected, now time.Time) error {
	s := e.Server
	why := s.Late(e.Arrived, now)
	key := "arrival/" + s.ID
	switch {
	case why == "":
		m.told(key, false)
		if !e.Missing {
			return nil
		}
		return m.problemOver(ctx, s.ID, dr.ProblemArrival, "a snapshot arrived in time")
	case m.told(key, true):
		return nil
	}
	_, err := m.Catalog.OpenTicket(ctx, s.ID, dr.ProblemArrival, "a snapshot that should have arrived did not", why+"; it comes from appliance "+s.Appliance, "", now)
	return err
}

// Files gives what people ask of what is in snapshots: each server's appliance answers for it.
