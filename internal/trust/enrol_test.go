package trust

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestANodeThatJoinedIsWhoItsTokenInvited(t *testing.T) {
	m := newMaster(t)
	key, err := m.CustomerKey("acme")
	if err != nil {
		t.Fatal(err)
	}
	n := m.node(office)
	if p := n.Peer(); p.Role != office.Role || p.Customer != office.Customer || p.Name != office.Name || p.Serial == "" {
		t.Errorf("joined as %+v", p)
	}
	if n.CustomerKey() != key || n.Master() != "hq" {
		t.Errorf("customer's key %q, master %q", n.CustomerKey(), n.Master())
	}
	if silo := m.node(Peer{Role: Silo, Name: "silo-1"}); silo.CustomerKey() != "" {
		t.Error("a silo was given a customer's key")
	}
	if got, err := get(n.Client(), baseURL+"/who"); err != nil || got != "appliance office of customer acme" {
		t.Errorf("the master takes it for %q, %v", got, err)
	}
	for path, mode := range map[string]os.FileMode{"": 0o700, fileNode: 0o600} {
		if info, err := os.Stat(filepath.Join(n.dir, path)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%q: %v, %v", path, info.Mode(), err)
		}
	}
	if files, _ := os.ReadDir(n.dir); len(files) != 1 {
		t.Errorf("left in the folder: %v", files)
	}
}

func TestAReplayedTokenIsRefused(t *testing.T) {
	m := newMaster(t)
	token := m.token(office)
	first := filepath.Join(t.TempDir(), "node")
	if _, err := Join(t.Context(), first, token); err != nil {
		t.Fatal(err)
	}
	thief := filepath.Join(t.TempDir(), "node")
	_, err := Join(t.Context(), thief, token)
	refused(t, err, "used already")
	if _, err := OpenNode(thief); !errors.Is(err, ErrNone) {
		t.Errorf("a folder was left that opens: %v", err)
	}
	n, err := OpenNode(first)
	if err != nil {
		t.Fatal(err)
	}
	n = hurried(t, n)
	if _, err := get(n.Client(), baseURL+"/who"); err != nil {
		t.Errorf("the replay shut the rightful node out: %v", err)
	}
}

// The master has spent the token and the node never heard of it: the same machine may ask again.
func TestAJoinWhoseAnswerWasLostCanBeRepeated(t *testing.T) {
	m := newMaster(t)
	token := m.token(office)
	n := newNodeWith(filepath.Join(t.TempDir(), "node"), hasty)
	if err := os.MkdirAll(n.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	key, err := n.joiningKey()
	if err != nil {
		t.Fatal(err)
	}
	request, err := newRequest(office, key)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // who asked is gone before it is answered
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, baseURL+pathJoin, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.hub.join(r, joinRequest{Secret: token.secret[:], Request: request}); err != nil {
		t.Fatal(err)
	}
	joined, err := Join(t.Context(), n.dir, token)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := get(hurried(t, joined).Client(), baseURL+"/who"); err != nil {
		t.Error(err)
	}
}

func TestATokenIsRefusedThatExpiredWasReplacedOrIsForAnother(t *testing.T) {
	m := newMaster(t)
	join := func(token Token) error {
		_, err := Join(t.Context(), filepath.Join(t.TempDir(), "node"), token)
		return err
	}
	old, err := m.Enrol(office, 10*time.Minute, []string{m.address})
	if err != nil {
		t.Fatal(err)
	}
	m.clock.set(11 * time.Minute)
	refused(t, join(old), "expired on")
	m.clock.set(0)
	replaced := m.token(office)
	token := m.token(office)
	refused(t, join(replaced), "replaced by a newer one")

	for _, who := range []Peer{{Role: Appliance, Customer: "globex", Name: "office"}, {Role: Appliance, Customer: "acme", Name: "other"}, {Role: Silo, Name: "office"}} {
		forged := token
		forged.Peer = who
		refused(t, join(forged), "is for appliance office of customer acme")
	}
	if _, err := m.Revoke("office"); err != nil {
		t.Fatal(err)
	}
	refused(t, join(token), "revoked")
	if err := join(m.token(office)); err != nil {
		t.Error(err)
	}
	guessed := token
	guessed.secret[0] ^= 1
	refused(t, join(guessed), "does not know the token")
}

func TestAMachineIsNotMadeAnotherNodeByTheWay(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	_, err := Join(t.Context(), n.dir, m.token(Peer{Role: Silo, Name: "silo-1"}))
	refused(t, err, "move that folder away")
	if _, err := m.Enrol(Peer{Role: Silo, Name: "office"}, time.Hour, nil); err == nil {
		t.Error("a name was given twice")
	} else {
		refused(t, err, "taken by appliance office")
	}
}

func TestAnotherAuthorityIsNoMasterAndItsNodesAreNobody(t *testing.T) {
	ours, theirs := newMaster(t), newMaster(t)
	n := ours.node(office)
	spy := theirs.node(office) // of the same names

	// The spy's master takes our master's place on the network.
	diverted := n.current().file
	diverted.Masters = []string{theirs.address}
	if err := n.store(diverted, nil); err != nil {
		t.Fatal(err)
	}
	_, err := get(n.Client(), baseURL+"/who")
	refused(t, err, "not the master of this node's authority")
	token := ours.token(Peer{Role: Silo, Name: "silo-1"})
	token.Masters = []string{theirs.address}
	_, err = Join(t.Context(), filepath.Join(t.TempDir(), "node"), token)
	refused(t, err, "not the master that made the token")

	// The spy comes to our master, and does not care who answers.
	s := spy.current()
	_, err = get(careless(t, ours.address, &tls.Certificate{Certificate: [][]byte{s.cert.Raw, s.authority.Raw}, PrivateKey: s.key}), baseURL+"/who")
	refused(t, err, "not of this master's authority")
	_, err = get(careless(t, ours.address, nil), baseURL+"/who")
	refused(t, err, "join with a token")
}

// careless is a client that shows what it is told to show, to anybody.
func careless(t *testing.T, address string, show *tls.Certificate) *http.Client {
	config := baseTLS()
	config.NextProtos = []string{alpnRequests}
	config.InsecureSkipVerify = true
	if show != nil {
		config.Certificates = []tls.Certificate{*show}
	}
	transport := &http.Transport{Protocols: onlyHTTP2(), DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		c, err := dialOne(ctx, address, config, hasty.dial)
		if err != nil {
			return nil, err
		}
		return c, nil
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: heed{transport}}
}

func TestACertificateOfOneCustomerGetsNoneOfAnother(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	for _, other := range []Peer{{Role: Appliance, Customer: "globex", Name: "office"}, {Role: Appliance, Customer: "acme", Name: "branch"},
		{Role: Silo, Name: "office"}, {Role: roleMaster, Name: "hq"}} {
		request, err := newRequest(other, newKey(t))
		if err != nil {
			t.Fatal(err)
		}
		_, err = ask(t.Context(), n.client, pathRenew, renewRequest{request})
		refused(t, err, "may not have a certificate of")
	}
	if nodes, err := m.Nodes(); err != nil || len(nodes) != 1 || len(nodes[0].Serials) != 1 {
		t.Errorf("the book has %+v, %v", nodes, err)
	}
}

// Even what the authority's key signed is not believed if it says two things, or is used for what it is not.
func TestACertificateSaysOneThingOnly(t *testing.T) {
	m := newMaster(t)
	sign := func(usage x509.ExtKeyUsage, uris ...string) *x509.Certificate {
		cert, err := m.signer.issue(office, newKey(t).Public(), time.Now(), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		cert.URIs, cert.ExtraExtensions, cert.ExtKeyUsage = nil, nil, []x509.ExtKeyUsage{usage}
		for _, u := range uris {
			parsed, err := url.Parse(u)
			if err != nil {
				t.Fatal(err)
			}
			cert.URIs = append(cert.URIs, parsed)
		}
		der, err := x509.CreateCertificate(nil, cert, m.signer.cert, cert.PublicKey, m.signer.key)
		if err != nil {
			t.Fatal(err)
		}
		if cert, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		return cert
	}
	const client, server = x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth
	if p, err := verify(m.signer.cert, sign(client, "muster://appliance/acme/office"), client, time.Now()); err != nil || p.Customer != "acme" {
		t.Fatalf("the one that is right was read as %v, %v", p, err)
	}
	for _, bad := range []*x509.Certificate{
		sign(client), sign(client, "muster://appliance/acme/office", "muster://appliance/globex/office"),
		sign(client, "muster://appliance/acme/office/x"), sign(client, "muster://appliance/office"), sign(client, "muster://silo/acme/office"),
		sign(client, "muster://appliance/acme/../globex/office"), sign(client, "muster://appliance/acme/office?x"), sign(client, "muster://x@appliance/acme/office"),
		sign(client, "muster://appliance/acme/of%66ice"), sign(client, "https://appliance/acme/office"), sign(client, "muster://appliance/Acme/office"),
		sign(client, "muster://master/hq"), sign(server, "muster://appliance/acme/office"),
	} {
		if p, err := verify(m.signer.cert, bad, client, time.Now()); err == nil {
			t.Errorf("%v was taken for one of %s", bad.URIs, p)
		}
	}
	if p, err := verify(m.signer.cert, sign(server, "muster://appliance/acme/office"), server, time.Now()); err == nil {
		t.Errorf("%s was taken for a master", p)
	}
}

func TestAClockThatIsWrongIsNamedAsTheCause(t *testing.T) {
	m := newMaster(t)
	joinAt := func(ahead time.Duration) error {
		var c clock
		c.set(ahead)
		n := newNodeWith(filepath.Join(t.TempDir(), "node"), hasty)
		n.Log, n.now = quiet, c.now
		token := m.token(office)
		return n.join(t.Context(), token)
	}
	for _, fine := range []time.Duration{-55 * time.Minute, 0, 6 * 24 * time.Hour} {
		if err := joinAt(fine); err != nil {
			t.Errorf("a clock that is %s ahead: %v", fine, err)
		}
	}
	for _, wrong := range []time.Duration{-2 * time.Hour, -365 * 24 * time.Hour, 8 * 24 * time.Hour} {
		if err := joinAt(wrong); err == nil || !strings.Contains(err.Error(), "set the clock") {
			t.Errorf("a clock that is %s ahead: %v", wrong, err)
		}
	}
	// The master's clock goes wrong later.
	n := m.node(office)
	m.clock.set(-3 * time.Hour)
	m.stop() // its own certificate is of its own time
	m.start()
	_, err := get(n.Client(), baseURL+"/who")
	refused(t, err, "set the master's clock")
}

func TestANodeComesBackAfterDaysAsLongAsItsCertificateLives(t *testing.T) {
	m := newMaster(t)
	var c clock
	n := m.node(office)
	n.now = c.now
	before := n.Peer().Serial
	for _, days := range []int{6, 12, 18} { // never on line in between
		m.clock.set(time.Duration(days) * 24 * time.Hour)
		c.set(time.Duration(days) * 24 * time.Hour)
		n.client.CloseIdleConnections()
		stop := serve(t, n, http.HandlerFunc(greet))
		until(t, "the certificate is renewed", func() bool { return n.Peer().Serial != before })
		m.waitConnected(office)
		stop()
		before = n.Peer().Serial
	}
	m.clock.set(26 * 24 * time.Hour)
	c.set(26 * 24 * time.Hour)
	n.client.CloseIdleConnections()
	_, err := get(n.Client(), baseURL+"/who")
	refused(t, err, "has expired")
	refused(t, err, "enrol the node again")
	if nodes, err := m.Nodes(); err != nil || nodes[0].State != Expired {
		t.Errorf("the book says %+v, %v", nodes, err)
	}
}

// A master that was put back from a backup has forgotten renewals, which is no reason to shut anybody out.
func TestABookFromABackupStillKnowsItsNodes(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	n.now = m.clock.now
	gone := m.node(Peer{Role: Silo, Name: "silo-1"})
	backup, err := os.ReadFile(m.path(fileBook))
	if err != nil {
		t.Fatal(err)
	}
	m.clock.set(5 * 24 * time.Hour)
	for range maxSerials + 1 {
		if err := n.renew(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	m.stop()
	if err := os.WriteFile(m.path(fileBook), backup, 0o600); err != nil {
		t.Fatal(err)
	}
	m.start()
	if _, err := get(n.Client(), baseURL+"/who"); err != nil {
		t.Error(err)
	}
	// What was issued before a node joined again stays void.
	if _, err := Join(t.Context(), filepath.Join(t.TempDir(), "node"), m.token(Peer{Role: Silo, Name: "silo-1"})); err == nil {
		t.Error("a clock five days behind was not noticed")
	}
	m.clock.set(0)
	m.stop()
	m.start()
	m.node(Peer{Role: Silo, Name: "silo-1"})
	_, err = get(gone.Client(), baseURL+"/who")
	refused(t, err, "enrolled anew")
}

func TestARenewalDoesNotUndoAJoinThatCameBefore(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	s := n.current()
	if _, err := Join(t.Context(), n.dir, m.token(office)); err != nil {
		t.Fatal(err)
	}
	if err := n.store(s.file, s); err == nil {
		t.Error("what the join wrote was replaced")
	}
	if _, err := get(n.Client(), baseURL+"/who"); err != nil {
		t.Error(err)
	}
}

func TestNothingOlderThanTLS13IsSpoken(t *testing.T) {
	m := newMaster(t)
	config := &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, NextProtos: []string{alpnRequests}}
	if _, err := dialOne(t.Context(), m.address, config, hasty.dial); err == nil {
		t.Error("the master speaks TLS 1.2")
	}
}
