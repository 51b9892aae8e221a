package trust

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/musterdr/muster/internal/durable"
)

// Node is a node's folder and its end of the line. Its methods may be called from many goroutines.
type Node struct {
	Log *slog.Logger // where Serve tells what happens; set it before

	dir    string
	now    func() time.Time
	timing timing
	client *http.Client

	mu    sync.Mutex
	seen  os.FileInfo // the file that state was read from
	state *identity
}

// identity is the content of a node's file, parsed.
type identity struct {
	file      nodeFile
	peer      Peer
	authority *x509.Certificate
	cert      *x509.Certificate
	key       ed25519.PrivateKey
}

// nodeFile is all that a node has of its own. It is one file, so that it is there in full or not at all.
type nodeFile struct {
	Version     int      `json:"version"`
	Role        Role     `json:"role"`
	Customer    string   `json:"customer,omitempty"`
	Name        string   `json:"name"`
	Master      string   `json:"master"`
	Masters     []string `json:"masters"` // HOST:PORT
	Authority   string   `json:"authority"`
	Certificate string   `json:"certificate"`
	Key         string   `json:"key"`
	CustomerKey string   `json:"customer_key,omitempty"`
}

// Files of a node's folder.
const (
	fileNode    = "node.json"
	fileJoining = "joining.key" // the key for which a certificate is being asked
)

const (
	nodeVersion = 1
	maxNodeFile = 256 << 10 // bytes
	baseURL     = "https://master"
)

// Join makes a machine the node that a token invites, and its folder, unless it has been that already. Cut off at any
// point it can be repeated with the same token. A folder of the same node gets the new certificate; another's is left
// alone.
func Join(ctx context.Context, dir string, token Token) (*Node, error) {
	n := newNode(dir)
	if old, err := n.load(); err == nil {
		if old.peer.Serial = ""; old.peer != token.Peer {
			return nil, refuse("join: %s is the folder of %s: to make this machine another node, move that folder away", dir, old.peer)
		}
	} else if !errors.Is(err, ErrNone) {
		return nil, err
	}
	if err := n.join(ctx, token); err != nil {
		return nil, fmt.Errorf("join as %s: %w", token.Peer, err)
	}
	return OpenNode(dir)
}

// OpenNode opens a node's folder. It connects to nobody.
func OpenNode(dir string) (*Node, error) {
	n := newNode(dir)
	_, err := n.load()
	return n, err
}

func newNode(dir string) *Node { return newNodeWith(dir, patient) }

func newNodeWith(dir string, t timing) *Node {
	n := &Node{Log: slog.Default(), dir: dir, now: time.Now, timing: t}
	n.client = &http.Client{CheckRedirect: noRedirect, Transport: heed{&http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := n.dial(ctx, alpnRequests)
			if err != nil {
				return nil, err
			}
			return c, nil
		},
		Protocols: onlyHTTP2(), HTTP2: n.timing.http2(), DisableCompression: true, MaxResponseHeaderBytes: maxHeader, IdleConnTimeout: 90 * time.Second}}}
	return n
}

func onlyHTTP2() *http.Protocols {
	p := &http.Protocols{}
	p.SetHTTP2(true)
	return p
}

// heed turns the master's refusals into errors.
type heed struct{ next *http.Transport }

// RoundTrip implements http.RoundTripper.
func (t heed) RoundTrip(request *http.Request) (*http.Response, error) {
	response, err := t.next.RoundTrip(request)
	if err != nil || response.Header.Get(headerRefused) == "" {
		return response, err
	}
	defer response.Body.Close()
	reason, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("read why the master refuses: %w", err)
	}
	return nil, &Refusal{strings.TrimSpace(string(reason))}
}

// CloseIdleConnections lets http.Client's method of that name through.
func (t heed) CloseIdleConnections() { t.next.CloseIdleConnections() }

// Peer says who the node is, with the serial of its present certificate.
func (n *Node) Peer() Peer { return n.current().peer }

// CustomerKey is the key of the appliance's customer, "" for a silo.
func (n *Node) CustomerKey() string { return n.current().file.CustomerKey }

// Master is the name of the node's master.
func (n *Node) Master() string { return n.current().file.Master }

// Expires is when the present certificate ends, if it is not renewed before.
func (n *Node) Expires() time.Time { return n.current().cert.NotAfter }

// Client gives a client for requests to the master, whose base URL is https://master. What the master refuses is an error
// of type *Refusal.
func (n *Node) Client() *http.Client { return n.client }

// current gives what was read last.
func (n *Node) current() *identity {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state
}

// load reads the folder if it was changed since, as by a Join of another process.
func (n *Node) load() (*identity, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	path := filepath.Join(n.dir, fileNode)
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("open node: %w in %s: join a master with a token ('muster appliance join', 'muster silo join')", ErrNone, n.dir)
	}
	if err != nil {
		return nil, fmt.Errorf("open node: %w", err)
	}
	if n.seen != nil && os.SameFile(n.seen, info) && n.seen.ModTime().Equal(info.ModTime()) {
		return n.state, nil
	}
	state, err := readNode(path, info)
	if err != nil {
		return nil, fmt.Errorf("open node: read %s: %w", path, err)
	}
	n.seen, n.state = info, state
	return state, nil
}

func readNode(path string, info os.FileInfo) (*identity, error) {
	if info.Mode().Perm()&0o077 != 0 {
		return nil, errors.New("others may read it: 'chmod 600' it, and think about who has read the key in it")
	}
	if info.Size() > maxNodeFile {
		return nil, fmt.Errorf("it has %d bytes, the most is %d", info.Size(), maxNodeFile)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	s := &identity{}
	if err := json.Unmarshal(raw, &s.file); err != nil {
		return nil, err
	}
	if s.file.Version != nodeVersion {
		return nil, fmt.Errorf("it is of version %d, this release knows %d", s.file.Version, nodeVersion)
	}
	if err := validateMasters(s.file.Masters); err != nil {
		return nil, err
	}
	return s, s.parse()
}

func (s *identity) parse() (err error) {
	if s.authority, err = decodeCert(s.file.Authority); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	if s.cert, err = decodeCert(s.file.Certificate); err != nil {
		return fmt.Errorf("certificate: %w", err)
	}
	if s.key, err = decodeKey(s.file.Key); err != nil {
		return fmt.Errorf("key: %w", err)
	}
	s.peer, err = parseIdentity(s.cert.URIs)
	s.peer.Serial = serialOf(s.cert)
	if err == nil && (Peer{Role: s.file.Role, Customer: s.file.Customer, Name: s.file.Name, Serial: s.peer.Serial}) != s.peer {
		err = fmt.Errorf("its certificate is of %s", s.peer)
	}
	return err
}

// store replaces the folder's content. Not nil, present has to be what is there: nothing that came meanwhile is lost.
func (n *Node) store(f nodeFile, present *identity) error {
	raw, err := json.MarshalIndent(f, "", " ")
	if err != nil {
		return err
	}
	unlock, err := lockFolder(n.dir)
	if err != nil {
		return err
	}
	defer unlock()
	if present != nil {
		if s, err := n.load(); err != nil || !s.cert.Equal(present.cert) {
			return errors.Join(errors.New("the node joined anew meanwhile"), err)
		}
	}
	if err := durable.WriteFile(filepath.Join(n.dir, fileNode), append(raw, '\n'), 0o600); err != nil {
		return err
	}
	_, err = n.load()
	return err
}

func (n *Node) join(ctx context.Context, token Token) error {
	if now := n.now(); now.After(token.Expires) {
		n.Log.Warn("the token has expired by this machine's clock", "expired", token.Expires, "now", now)
	}
	if err := os.MkdirAll(n.dir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(n.dir, 0o700); err != nil {
		return err
	}
	key, err := n.joiningKey()
	if err != nil {
		return err
	}
	request, err := newRequest(token.Peer, key)
	if err != nil {
		return err
	}
	var authority *x509.Certificate
	client := &http.Client{CheckRedirect: noRedirect, Transport: heed{&http.Transport{Protocols: onlyHTTP2(), MaxResponseHeaderBytes: maxHeader, DisableKeepAlives: true,
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			config := baseTLS()
			config.NextProtos = []string{alpnRequests}
			config.InsecureSkipVerify = true // it is verified below, by the pin
			config.VerifyConnection = func(state tls.ConnectionState) (err error) {
				if authority, err = pinned(state, token.Pin); err != nil {
					return err
				}
				return masterOf(state, authority, n.now())
			}
			c, err := dial(ctx, token.Masters, config, n.timing.dial)
			if err != nil {
				return nil, err
			}
			return c, nil
		}}}}
	out, err := ask(ctx, client, pathJoin, joinRequest{Secret: token.secret[:], Request: request})
	if err != nil {
		return err
	}
	cert, err := out.certificateFor(token.Peer, key, authority, n.now())
	if err != nil {
		return err
	}
	text, err := encodeKey(key)
	if err != nil {
		return err
	}
	p := token.Peer
	if err := n.store(nodeFile{Version: nodeVersion, Role: p.Role, Customer: p.Customer, Name: p.Name, Master: out.Master, Masters: token.Masters,
		Authority: encodeCert(authority), Certificate: encodeCert(cert), Key: text, CustomerKey: out.CustomerKey}, nil); err != nil {
		return err
	}
	return os.Remove(filepath.Join(n.dir, fileJoining))
}

// pinned finds the authority that a token knows among what the other end shows.
func pinned(state tls.ConnectionState, pin [sha256.Size]byte) (*x509.Certificate, error) {
	for _, cert := range state.PeerCertificates {
		if cert.IsCA && pinOf(cert) == pin {
			return cert, nil
		}
	}
	return nil, refuse("what answers there is not the master that made the token: check the address; if the master was made anew, ask for a new token")
}

// joiningKey makes the node's key, or takes the one of an attempt whose end is not known.
func (n *Node) joiningKey() (ed25519.PrivateKey, error) {
	path := filepath.Join(n.dir, fileJoining)
	raw, err := os.ReadFile(path)
	if err == nil {
		return decodeKey(string(raw))
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	text, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	return key, durable.WriteFile(path, []byte(text), 0o600)
}

// dial opens a connection to the master with the present certificate.
func (n *Node) dial(ctx context.Context, protocol string) (*tls.Conn, error) {
	s, err := n.load()
	if err != nil {
		return nil, err
	}
	config := baseTLS()
	config.NextProtos = []string{protocol}
	config.InsecureSkipVerify = true // it is verified below, by the authority
	config.VerifyConnection = func(state tls.ConnectionState) error { return masterOf(state, s.authority, n.now()) }
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return &tls.Certificate{Certificate: [][]byte{s.cert.Raw}, PrivateKey: s.key, Leaf: s.cert}, nil
	}
	return dial(ctx, s.file.Masters, config, n.timing.dial)
}

// renew gets a certificate for a new key, and stores both.
func (n *Node) renew(ctx context.Context) error {
	s := n.current()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	who := s.peer
	who.Serial = ""
	request, err := newRequest(who, key)
	if err != nil {
		return err
	}
	out, err := ask(ctx, n.client, pathRenew, renewRequest{Request: request})
	if err != nil {
		return err
	}
	cert, err := out.certificateFor(who, key, s.authority, n.now())
	if err != nil {
		return err
	}
	next := s.file
	if next.Key, err = encodeKey(key); err != nil {
		return err
	}
	next.Certificate = encodeCert(cert)
	if err := n.store(next, s); err != nil {
		return err
	}
	n.client.CloseIdleConnections() // the next one shows the new certificate
	return nil
}
