package trust

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"time"
)

// signer is the authority's key with its certificate.
type signer struct {
	cert *x509.Certificate
	key  ed25519.PrivateKey
}

// newSigner makes an authority.
func newSigner(name string, now time.Time) (signer, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return signer{}, err
	}
	template := &x509.Certificate{SerialNumber: newSerial(), Subject: pkix.Name{Organization: []string{"Muster"}, CommonName: "master " + name},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(authorityLife), IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return signer{}, fmt.Errorf("make authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	return signer{cert, key}, err
}

// issue signs a certificate for a public key. The one for the master serves, those for nodes only dial.
func (s signer) issue(who Peer, public crypto.PublicKey, now time.Time, life time.Duration) (*x509.Certificate, error) {
	usage := x509.ExtKeyUsageClientAuth
	if who.Role == roleMaster {
		usage = x509.ExtKeyUsageServerAuth
	}
	until := now.Add(life)
	if until.After(s.cert.NotAfter) {
		until = s.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: newSerial(),
		Subject:   pkix.Name{Organization: []string{"Muster"}, CommonName: who.String()},
		NotBefore: now.Add(-backdate), NotAfter: until, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{usage}, BasicConstraintsValid: true, URIs: []*url.URL{identityOf(who)}}, s.cert, public, s.key)
	if err != nil {
		return nil, fmt.Errorf("issue certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

// newSerial gives a serial number of 127 random bits.
func newSerial() *big.Int {
	b := random(16)
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b)
}

func serialOf(cert *x509.Certificate) string { return hex.EncodeToString(cert.SerialNumber.Bytes()) }

const identityScheme = "muster"

// identityOf is the URI by which a certificate says whose it is.
func identityOf(p Peer) *url.URL {
	path := "/" + p.Name
	if p.Role == Appliance {
		path = "/" + p.Customer + path
	}
	return &url.URL{Scheme: identityScheme, Host: string(p.Role), Path: path}
}

// parseIdentity reads the one URI of a certificate, or of a request for one.
func parseIdentity(uris []*url.URL) (Peer, error) {
	if len(uris) != 1 {
		return Peer{}, fmt.Errorf("a certificate says in %d URIs whose it is: it has to be one", len(uris))
	}
	var p Peer
	parts := strings.Split(strings.TrimPrefix(uris[0].Path, "/"), "/")
	switch p.Role = Role(uris[0].Host); {
	case p.Role == Appliance && len(parts) == 2:
		p.Customer, p.Name = parts[0], parts[1]
	case (p.Role == Silo || p.Role == roleMaster) && len(parts) == 1:
		p.Name = parts[0]
	}
	if identityOf(p).String() != uris[0].String() {
		return Peer{}, fmt.Errorf("a certificate of %q: nobody is called so", uris[0])
	}
	if p.Role != roleMaster {
		return p, p.validate()
	}
	return p, nil
}

// pinOf is what a token carries to know the authority by: the SHA-256 of its public key.
func pinOf(cert *x509.Certificate) [sha256.Size]byte {
	return sha256.Sum256(cert.RawSubjectPublicKeyInfo)
}

// errTime means that a certificate is good but for its time.
var errTime = errors.New("certificate is not valid now")

// verify proves that the authority signed a certificate for this use, and reads whose it is. If only its time is wrong
// the peer is told along with an error that wraps errTime.
func verify(authority, cert *x509.Certificate, usage x509.ExtKeyUsage, now time.Time) (Peer, error) {
	roots := x509.NewCertPool()
	roots.AddCert(authority)
	options := x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}}
	late := now.Before(cert.NotBefore) || now.After(cert.NotAfter)
	if late { // then it is looked at as it was when it was made
		options.CurrentTime = cert.NotBefore.Add(backdate)
	}
	if _, err := cert.Verify(options); err != nil {
		return Peer{}, err
	}
	peer, err := parseIdentity(cert.URIs)
	if err != nil {
		return Peer{}, err
	}
	peer.Serial = serialOf(cert)
	if (peer.Role == roleMaster) != (usage == x509.ExtKeyUsageServerAuth) {
		return Peer{}, fmt.Errorf("a certificate of %s is used the wrong way round", peer)
	}
	if late {
		return peer, fmt.Errorf("%w: %s", errTime, clockHint(cert.NotBefore, cert.NotAfter, now))
	}
	return peer, nil
}

// newRequest makes a key and asks for a certificate for it.
func newRequest(who Peer, key ed25519.PrivateKey) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{identityOf(who)}}, key)
	if err != nil {
		return nil, fmt.Errorf("ask for certificate: %w", err)
	}
	return der, nil
}

// readRequest reads a request for a certificate and proves that who sends it has its key.
func readRequest(der []byte) (Peer, ed25519.PublicKey, error) {
	request, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return Peer{}, nil, fmt.Errorf("read request for a certificate: %w", err)
	}
	if err := request.CheckSignature(); err != nil {
		return Peer{}, nil, fmt.Errorf("read request for a certificate: %w", err)
	}
	public, ok := request.PublicKey.(ed25519.PublicKey)
	if !ok {
		return Peer{}, nil, errors.New("read request for a certificate: its key is not Ed25519")
	}
	who, err := parseIdentity(request.URIs)
	return who, public, err
}

const (
	pemCertificate = "CERTIFICATE"
	pemKey         = "PRIVATE KEY"
)

func encodeCert(cert *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: cert.Raw}))
}

func decodeCert(text string) (*x509.Certificate, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != pemCertificate {
		return nil, errors.New("there is no certificate in it")
	}
	return x509.ParseCertificate(block.Bytes)
}

func encodeKey(key ed25519.PrivateKey) (string, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	return string(pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der})), err
}

func decodeKey(text string) (ed25519.PrivateKey, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != pemKey {
		return nil, errors.New("there is no key in it")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, errors.New("its key is not Ed25519")
	}
	return key, nil
}
