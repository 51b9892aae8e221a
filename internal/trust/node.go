package trust

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
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

// OpenNode opens a node's folder. It connects to nobody.
func OpenNode(dir string) (*Node, error) {
	n := newNode(dir)
	_, err := n.load()
	return n, err
}

func newNode(dir string) *Node { return newNodeWith(dir, patient) }

func newNodeWith(dir string, t timing) *Node {
	n := &Node{Log: slog.Default(), dir: dir, now: time.Now, timing: t}
	n.client = &http.Client{CheckRedirect: noRedirect, Transport: heed{newLanes(func(ctx context.Context, _, _ string) (net.Conn, error) {
		c, err := n.dial(ctx, alpnRequests)
		if err != nil {
			return nil, err
		}
		return c, nil
	}, n.timing)}}
	return n
}

func onlyHTTP2() *http.Protocols {
	p := &http.Protocols{}
	p.SetHTTP2(true)
	return p
}

// heed turns the master's refusals into errors.
type heed struct {
	next interface {
		http.RoundTripper
		CloseIdleConnections()
	}
}

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
