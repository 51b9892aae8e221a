package ssh

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"regexp"
	"strings"
	"testing"
	"unicode/utf16"
)

// decode reads a script as PowerShell does.
func decode(t testing.TB, command string) string {
	t.Helper()
	text, ok := strings.CutPrefix(command, "powershell -NoProfile -NonInteractive -EncodedCommand ")
	raw, err := base64.StdEncoding.DecodeString(text)
	if !ok || err != nil || len(raw)%2 != 0 {
		t.Fatalf("%q: %v", command, err)
	}
	var units []uint16
	for i := 0; i < len(raw); i += 2 {
		units = append(units, binary.LittleEndian.Uint16(raw[i:]))
	}
	return string(utf16.Decode(units))
}

func TestNoShellOfWindowsChangesAScript(t *testing.T) {
	sum := strings.Repeat("ab", 32)
	for name, script := range map[string]string{"look": powershell.look, "have": powershell.have, "upload": powershell.upload, "forget": powershell.forget} {
		line := powershell.command(powershell.dir, script, sum)
		if !regexp.MustCompile(`^[A-Za-z0-9+/= -]+$`).MatchString(line) {
			t.Errorf("%s: a shell may change %q", name, line)
		}
		const most = 8191 // characters that cmd takes
		if len(line) > most {
			t.Errorf("%s: %d characters are too long for cmd", name, len(line))
		}
		if got := decode(t, line); strings.Contains(got, "DIR") || strings.Contains(got, "FILE") || strings.Contains(got, "SUM") ||
			!strings.Contains(got, `'C:\ProgramData\Muster`) {
			t.Errorf("%s: %s", name, got)
		}
	}
	if line := powershell.command(powershell.dir, powershell.serve, sum); line != `C:\ProgramData\Muster\agent-`+sum+`.exe serve` {
		t.Errorf("the agent is started by %q", line)
	}
}

func FuzzQuotePower(f *testing.F) {
	f.Add(`C:\it's; here`)
	f.Add("a’b‘c‚d‛")
	f.Fuzz(func(t *testing.T, path string) {
		q := quotePower(path)
		inside := []rune(q)[1 : len([]rune(q))-1]
		var back []rune
		for i := 0; i < len(inside); i++ {
			if strings.ContainsRune("'‘’‚‛", inside[i]) {
				if i+1 == len(inside) || inside[i+1] != inside[i] {
					t.Fatalf("%s ends too early", q)
				}
				i++
			}
			back = append(back, inside[i])
		}
		if string(back) != string([]rune(path)) {
			t.Fatalf("%q became %q", path, string(back))
		}
	})
}

// The server of this test has no POSIX shell; what stands for PowerShell answers as one does.
func TestAServerWithoutAPOSIXShellIsLookedAtAsWindows(t *testing.T) {
	h, source := newHost(t)
	h.fake("sh", "echo \"'sh' is not recognized as an internal or external command\" >&2; exit 1")
	h.fake("powershell", "echo Windows AMD64 True False")
	s := h.open(t, source)
	p, err := s.look(t.Context())
	if err != nil || p != (platform{system: "windows", arch: "amd64"}) || s.cache != powershell.dir {
		t.Errorf("%+v, %v, in %s", p, err, s.cache)
	}
	wanted := ""
	s.agents = func(goos, goarch string) ([]byte, error) {
		wanted = goos + "/" + goarch
		return nil, errors.New("none")
	}
	if _, err := s.install(t.Context(), p); err == nil || wanted != "windows/amd64" {
		t.Errorf("the agent for %q was looked for, %v", wanted, err)
	}
	h.fake("powershell", "echo Windows AMD64 False True")
	if _, err := h.open(t, source).look(t.Context()); err == nil || !strings.Contains(err.Error(), "no administrator") {
		t.Errorf("a user who may not: %v", err)
	}
	h.fake("powershell", "exit 1")
	if _, err := h.open(t, source).look(t.Context()); err == nil || !strings.Contains(err.Error(), "not recognized") {
		t.Errorf("neither shell: %v", err)
	}
}
