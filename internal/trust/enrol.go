package trust

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// What nodes ask of the authority, on the line like everything else.
const (
	pathJoin  = "/trust/v1/join"  // a token against a certificate; the one thing that a stranger may ask
	pathRenew = "/trust/v1/renew" // a certificate against one that lives longer
	pathHello = "/trust/v1/hello" // whether the node is let in
)

// headerRefused marks an answer whose body is the reason of a Refusal.
const headerRefused = "Muster-Refused"

const (
	maxAsked  = 16 << 10 // bytes of a question to the authority
	maxAnswer = 64 << 10 // bytes of its answer
)

type joinRequest struct {
	Secret  []byte `json:"secret"`
	Request []byte `json:"request"` // PKCS #10, DER
}

type renewRequest struct {
	Request []byte `json:"request"`
}

// granted is what a node gets.
type granted struct {
	Master      string    `json:"master"` // its name
	Time        time.Time `json:"time"`   // its clock
	Certificate []byte    `json:"certificate,omitempty"`
	CustomerKey string    `json:"customer_key,omitempty"`
}

type connKey struct{}

// guard lets requests of nodes through to the handlers, with the peer in the context. Everybody else is told why not.
func (h *Hub) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, ok := r.Context().Value(connKey{}).(*conn)
		switch {
		case !ok:
			answerError(w, errors.New("a connection of no kind"))
		case c.refuse != nil && r.URL.Path != pathJoin:
			w.Header().Set("Connection", "close") // the next one may show another certificate
			answerError(w, c.refuse)
		case c.peer == nil && r.URL.Path != pathJoin:
			w.Header().Set("Connection", "close")
			answerError(w, refuse("this master answers nodes that have joined: join with a token ('muster master enrol')"))
		case c.peer == nil:
			next.ServeHTTP(w, r)
		default:
			if err := h.stays(c); err != nil {
				answerError(w, err)
				return
			}
			next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), peerKey{}, *c.peer)))
		}
	})
}

func (h *Hub) mountEnrolment(mux *http.ServeMux) {
	mux.HandleFunc("POST "+pathJoin, func(w http.ResponseWriter, r *http.Request) {
		var in joinRequest
		reply(w, r, &in, func() (granted, error) { return h.join(r, in) })
	})
	mux.HandleFunc("POST "+pathRenew, func(w http.ResponseWriter, r *http.Request) {
		var in renewRequest
		reply(w, r, &in, func() (granted, error) { return h.renew(r, in) })
	})
	mux.HandleFunc("POST "+pathHello, func(w http.ResponseWriter, r *http.Request) {
		reply(w, r, &struct{}{}, func() (granted, error) { return h.greeting(), nil })
	})
}

// reply reads a question, and answers it or says what is wrong.
func reply(w http.ResponseWriter, r *http.Request, in any, do func() (granted, error)) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxAsked))
	if err == nil {
		err = json.Unmarshal(body, in)
	}
	if err != nil {
		answerError(w, refuse("the master does not understand what this node asks: use the same release on both (%v)", err))
		return
	}
	out, err := do()
	if err != nil {
		answerError(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(out) // who asked is gone
}

func answerError(w http.ResponseWriter, err error) {
	var no *Refusal
	if errors.As(err, &no) {
		w.Header().Set(headerRefused, "1")
		http.Error(w, no.Reason, http.StatusForbidden)
		return
	}
	http.Error(w, "the master could not answer: see its log", http.StatusInternalServerError)
}

func (h *Hub) greeting() granted {
	return granted{Master: h.authority.Name(), Time: h.authority.now().UTC()}
}

func (h *Hub) join(r *http.Request, in joinRequest) (granted, error) {
	who, public, err := readRequest(in.Request)
	if err != nil {
		return granted{}, refuse("%v", err)
	}
	address, _, _ := net.SplitHostPort(r.RemoteAddr)
	out := h.greeting()
	if who.Role == Appliance {
		// Before the token is spent, so that a key that is not here spends none. A stranger learns nothing of keys: it has to
		// be known to the book.
		if err := h.authority.invited(in.Secret, public, who); err != nil {
			return granted{}, h.mayNotJoin(r.Context(), in.Secret, who, address, err)
		}
		if out.CustomerKey, err = h.authority.CustomerKey(who.Customer); err != nil {
			h.log.ErrorContext(r.Context(), "open the customer's key", "customer", who.Customer, "error", err)
			return granted{}, err
		}
	}
	cert, err := h.authority.redeem(in.Secret, public, who, func() (*x509.Certificate, error) { return h.authority.certify(who, public) })
	if err != nil {
		return granted{}, h.mayNotJoin(r.Context(), in.Secret, who, address, err)
	}
	h.log.InfoContext(r.Context(), "a node joined", "node", who.String(), "address", address, "serial", serialOf(cert))
	out.Certificate = cert.Raw
	return out, nil
}

// mayNotJoin tells why somebody may not join. For the record that is worth it if the token is one of the book's: strangers write nothing there.
func (h *Hub) mayNotJoin(ctx context.Context, secret []byte, who Peer, address string, why error) error {
	h.log.WarnContext(ctx, "a node may not join", "node", who.String(), "address", address, "reason", why.Error())
	b, err := h.authority.book()
	if err != nil {
		return why
	}
	hash := digest(secret)
	var no *Refusal
	for _, e := range b.Nodes {
		if errors.As(why, &no) && e.Invitation != nil && e.Invitation.Hash == hash {
			h.refused(e.peer(), fmt.Sprintf("somebody at %s may not join as %s: %s", address, e.peer(), no.Reason))
		}
	}
	return why
}

func (h *Hub) renew(r *http.Request, in renewRequest) (granted, error) {
	c, _ := r.Context().Value(connKey{}).(*conn) // that it is there, and has a peer, is the guard's to see to
	peer := *c.peer
	who, public, err := readRequest(in.Request)
	if err != nil {
		return granted{}, refuse("%v", err)
	}
	if who.Serial = peer.Serial; who != peer {
		h.log.WarnContext(r.Context(), "a node asks for another's certificate", "node", peer.String(), "asks_for", who.String())
		return granted{}, refuse("%s may not have a certificate of %s", peer, who)
	}
	cert, err := h.authority.renew(peer, c.joined, func() (*x509.Certificate, error) {
		return h.authority.certify(Peer{Role: who.Role, Customer: who.Customer, Name: who.Name}, public)
	})
	if err != nil {
		return granted{}, err
	}
	h.log.InfoContext(r.Context(), "a certificate was renewed", "node", peer.String(), "serial", serialOf(cert))
	out := h.greeting()
	out.Certificate = cert.Raw
	return out, nil
}

// ask puts a question to the authority.
func ask(ctx context.Context, client *http.Client, path string, in any) (granted, error) {
	raw, err := json.Marshal(in)
	if err != nil {
		return granted{}, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, baseURL+path, bytes.NewReader(raw))
	if err != nil {
		return granted{}, err
	}
	response, err := client.Do(request)
	if err != nil {
		var wrapped *url.Error // which says "Post https://master/…", as if there were such a host
		if errors.As(err, &wrapped) {
			err = wrapped.Err
		}
		return granted{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return granted{}, fmt.Errorf("read the master's answer: %w", err)
	}
	if response.StatusCode != http.StatusOK {
		return granted{}, fmt.Errorf("ask master: it answered %s: %s", response.Status, strings.TrimSpace(string(body)))
	}
	var out granted
	if err := json.Unmarshal(body, &out); err != nil {
		return granted{}, fmt.Errorf("read the master's answer: %w", err)
	}
	return out, nil
}

// certificateFor reads the certificate in an answer and proves that it is the one that was asked for.
func (g granted) certificateFor(who Peer, key ed25519.PrivateKey, authority *x509.Certificate, now time.Time) (*x509.Certificate, error) {
	cert, err := x509.ParseCertificate(g.Certificate)
	if err != nil {
		return nil, fmt.Errorf("read the certificate: %w", err)
	}
	got, err := verify(authority, cert, x509.ExtKeyUsageClientAuth, now)
	if errors.Is(err, errTime) {
		return nil, fmt.Errorf("the certificate does not fit this machine's clock: %w; at the master it is %s: set the clock that is wrong, and try again",
			err, g.Time.Format(timeForm))
	}
	if err != nil {
		return nil, fmt.Errorf("read the certificate: %w", err)
	}
	public, ok := cert.PublicKey.(ed25519.PublicKey)
	if got.Serial = who.Serial; got != who || !ok || !public.Equal(key.Public()) {
		return nil, fmt.Errorf("the master gave a certificate of %s, not of %s with this key", got, who)
	}
	return cert, nil
}
