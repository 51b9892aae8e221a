package trust

import (
	"strings"
	"testing"
	"time"
)

func TestATokenIsReadAsItWasWritten(t *testing.T) {
	m := newMaster(t)
	for _, who := range []Peer{office, {Role: Silo, Name: "silo-1"}} {
		token, err := m.Enrol(who, 72*time.Hour, []string{"muster.example.com:7443", "10.0.0.1:443", "[2001:db8::1]:7443"})
		if err != nil {
			t.Fatal(err)
		}
		line := token.String()
		if strings.ContainsAny(line, " \t\n'\"&;$?*") {
			t.Errorf("a shell would not take it as it is: %s", line)
		}
		for _, text := range []string{line, "# for the box at the office\n\n" + line + "\n"} {
			got, err := ParseToken(text)
			if err != nil {
				t.Fatal(err)
			}
			if got.String() != line || got.Peer != who || !got.Expires.Equal(token.Expires) || got.secret != token.secret {
				t.Errorf("wrote %+v, read %+v", token, got)
			}
		}
	}
}

func TestATokenThatWasCutOrMistypedIsKnown(t *testing.T) {
	token, err := newRegistryToken(t)
	if err != nil {
		t.Fatal(err)
	}
	line := token.String()
	for i := range line {
		if _, err := ParseToken(line[:i]); err == nil {
			t.Errorf("the first %d characters were taken for a token", i)
		}
		other := byte('a')
		if line[i] == other {
			other = 'b'
		}
		if _, err := ParseToken(line[:i] + string(other) + line[i+1:]); err == nil {
			t.Errorf("a token with another character at %d was taken", i)
		}
	}
	if _, err := ParseToken(line + "\n" + line); err == nil {
		t.Error("two tokens were taken for one")
	}
}

func newRegistryToken(t *testing.T) (Token, error) {
	r, err := OpenRegistry(newAuthority(t))
	if err != nil {
		return Token{}, err
	}
	return r.Enrol(office, time.Hour, []string{"muster.example.com:7443"})
}

func TestAnAddressThatNobodyCanDialIsNotPutIntoAToken(t *testing.T) {
	for _, bad := range []string{"", "host", "host:", ":7443", "host:0", "host:65536", "host:https", "ho st:1", "host:07443", "a/b:1", "::1:7443", "$(x):1"} {
		if err := validateAddress(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	for _, good := range []string{"muster.example.com:7443", "[::1]:7443", "192.0.2.1:1"} {
		if err := validateAddress(good); err != nil {
			t.Error(err)
		}
	}
}

// Whatever is read, it does not panic, and what is taken is written as it was read.
func FuzzParseToken(f *testing.F) {
	body := "muster1.appliance.acme.office.1764000000.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA.BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBE@m:1"
	f.Add(body + "/" + tokenCheck(body))
	f.Add("# x\n" + body)
	f.Add("muster1.silo.-.s.0..@/")
	f.Fuzz(func(t *testing.T, text string) {
		for _, in := range []string{text, text + "/" + tokenCheck(text)} { // the check would keep almost everything out
			token, err := ParseToken(in)
			if err != nil {
				continue
			}
			if again, err := ParseToken(token.String()); err != nil || again.String() != token.String() {
				t.Errorf("%q was read as %q, and that as %v, %v", in, token, again, err)
			}
			if !strings.Contains(in, token.String()) {
				t.Errorf("%q was read as %q", in, token)
			}
		}
	})
}
