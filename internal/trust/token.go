package trust

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"
)

// Token invites one node. It is a secret until it has been used or its time is over.
type Token struct {
	Peer    Peer     // who is invited; without a serial
	Masters []string // HOST:PORT, tried in order
	Pin     [sha256.Size]byte
	Expires time.Time // to the second
	secret  [secretSize]byte
}

// Limits of a token.
const (
	secretSize  = 32
	maxMasters  = 8
	maxAddress  = 255 + 6
	maxTokenLen = 4096 // bytes of text
	checkLen    = 8    // characters at the end by which a token that was cut or mistyped is known
)

const tokenStart = "muster1"

// String gives the token as one line that a shell takes as it is:
//
//	muster1.ROLE.CUSTOMER.NAME.EXPIRES.PIN.SECRET@HOST:PORT,HOST:PORT/CHECK
func (t Token) String() string {
	customer := t.Peer.Customer
	if customer == "" {
		customer = "-"
	}
	body := strings.Join([]string{tokenStart, string(t.Peer.Role), customer, t.Peer.Name, strconv.FormatInt(t.Expires.Unix(), 10),
		base64.RawURLEncoding.EncodeToString(t.Pin[:]), base64.RawURLEncoding.EncodeToString(t.secret[:])}, ".") +
		"@" + strings.Join(t.Masters, ",")
	return body + "/" + tokenCheck(body)
}

func tokenCheck(body string) string {
	sum := sha256.Sum256([]byte(body))
	return base64.RawURLEncoding.EncodeToString(sum[:])[:checkLen]
}

var errToken = errors.New("read token: it is no token of Muster, or it was cut off or mistyped: copy it whole, or carry it as a file")

// ParseToken reads what String writes. Lines that are empty or begin with # are passed over, so that it reads the files
// that carry tokens too.
func ParseToken(text string) (Token, error) {
	if len(text) > maxTokenLen {
		return Token{}, errToken
	}
	var line string
	for l := range strings.Lines(text) {
		l = strings.TrimSpace(l)
		if l == "" || l[0] == '#' {
			continue
		}
		if line != "" {
			return Token{}, errToken
		}
		line = l
	}
	slash := strings.LastIndexByte(line, '/')
	if slash < 0 || line[slash+1:] != tokenCheck(line[:slash]) {
		return Token{}, errToken
	}
	who, masters, ok := strings.Cut(line[:slash], "@")
	fields := strings.Split(who, ".")
	if !ok || len(fields) != 7 || fields[0] != tokenStart {
		return Token{}, errToken
	}
	return parseFields(fields[1:], strings.Split(masters, ","))
}

func parseFields(fields, masters []string) (Token, error) {
	t := Token{Peer: Peer{Role: Role(fields[0]), Customer: fields[1], Name: fields[2]}, Masters: masters}
	if t.Peer.Customer == "-" {
		t.Peer.Customer = ""
	}
	seconds, err := strconv.ParseInt(fields[3], 10, 64)
	if err != nil || seconds < 0 || strconv.FormatInt(seconds, 10) != fields[3] {
		return Token{}, errToken
	}
	t.Expires = time.Unix(seconds, 0).UTC()
	for i, into := range [][]byte{t.Pin[:], t.secret[:]} {
		raw, err := base64.RawURLEncoding.Strict().DecodeString(fields[4+i])
		if err != nil || len(raw) != len(into) {
			return Token{}, errToken
		}
		copy(into, raw)
	}
	if err := t.validate(); err != nil {
		return Token{}, fmt.Errorf("read token: %w", err)
	}
	return t, nil
}

func (t Token) validate() error {
	if err := t.Peer.validate(); err != nil {
		return err
	}
	return validateMasters(t.Masters)
}

func validateMasters(masters []string) error {
	if len(masters) == 0 || len(masters) > maxMasters {
		return fmt.Errorf("a token names %d addresses of the master: give 1 to %d", len(masters), maxMasters)
	}
	for _, m := range masters {
		if err := validateAddress(m); err != nil {
			return err
		}
	}
	return nil
}

// validateAddress accepts HOST:PORT that can be dialled and that a shell takes as it is.
func validateAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	number, perr := strconv.ParseUint(port, 10, 16)
	odd := strings.Trim(host, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:-_")
	if err != nil || perr != nil || number == 0 || strconv.FormatUint(number, 10) != port || host == "" || odd != "" ||
		len(address) > maxAddress || net.JoinHostPort(host, port) != address {
		return fmt.Errorf("address %q of the master: write HOST:PORT, as nodes reach it", address)
	}
	return nil
}
