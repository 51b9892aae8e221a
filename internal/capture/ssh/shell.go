package ssh

import (
	"encoding/base64"
	"encoding/binary"
	"strings"
	"unicode/utf16"
)

// shell is the language in which a server is told to install and start the agent. In its scripts DIR, FILE and SUM are
// replaced by the cache folder, the agent's path and its fingerprint.
type shell struct {
	dir    string // the only folder on the server that captures write to
	suffix string // of programs
	quote  func(path string) string
	wrap   func(script string) string // for any login shell

	look   string // says what kind of system it is
	have   string // prints the fingerprint of the agent, if it is there
	upload string // puts its input there as the agent
	serve  string // starts it; not wrapped if direct
	direct bool
	forget string
}

// posix runs in the server's POSIX shell whatever the login shell is, hence no line ends, single quotes or exclamation marks.
// What is replaced can hold nothing but letters, digits, dots, dashes and slashes.
var posix = shell{
	dir: CacheDir, quote: func(path string) string { return path },
	wrap: func(script string) string { return "sh -c '" + script + "'" },
	look: `uname -s; uname -m; id -u; if test -d DIR; then echo there; else echo absent; fi`,
	have: `if test -L DIR; then exit 71; fi; command -v sha256sum >/dev/null || exit 75; if test -x FILE; then sha256sum FILE; fi`,
	upload: `umask 077; if test -L DIR; then exit 71; fi; mkdir -p DIR && chmod 700 DIR || exit 72; test -O DIR || exit 71; ` +
		`t=FILE.new.$$; cat >$t || { rm -f $t; exit 73; }; set -- $(sha256sum $t); if test x$1 = xSUM; then :; else rm -f $t; exit 74; fi; ` +
		`chmod 700 $t && mv -f $t FILE || { rm -f $t; exit 73; }; for o in DIR/agent-*; do test $o = FILE || rm -f $o; done`,
	serve:  `set -- $(sha256sum FILE); test x$1 = xSUM || exit 74; exec FILE serve`,
	forget: `for a in DIR/agent-*; do if test -x $a; then $a forget || exit 76; fi; done; rm -rf DIR`,
}

// powershell is for OpenSSH on Windows, whose login shell is cmd or PowerShell: both start a PowerShell with an encoded
// script alike. The agent itself is started without one, because PowerShell takes what a program prints for text. It has
// not been run on Windows yet.
var powershell = shell{
	dir: `C:\ProgramData\Muster`, suffix: ".exe", quote: quotePower, wrap: encodePower, direct: true,
	look: `$me = [Security.Principal.WindowsPrincipal][Security.Principal.WindowsIdentity]::GetCurrent(); ` +
		`$admin = $me.IsInRole([Security.Principal.WindowsBuiltInRole]::Administrator); ` +
		`[Console]::Out.WriteLine("Windows $env:PROCESSOR_ARCHITECTURE $admin $(Test-Path -LiteralPath DIR)")`,
	have: `if (Test-Path -LiteralPath FILE) { [Console]::Out.WriteLine((Get-FileHash -Algorithm SHA256 -LiteralPath FILE).Hash.ToLower()) }`,
	upload: `$ErrorActionPreference = 'Stop'; ` +
		`try { $d = New-Item -ItemType Directory -Force -Path DIR } catch { exit 72 }; ` +
		`if ($d.Attributes -band [IO.FileAttributes]::ReparsePoint) { exit 71 }; ` +
		`icacls DIR /inheritance:r /grant:r '*S-1-5-32-544:(OI)(CI)F' '*S-1-5-18:(OI)(CI)F' | Out-Null; if ($LASTEXITCODE -ne 0) { exit 72 }; ` +
		`$t = FILE + '.new'; ` +
		`try { $o = [IO.File]::Create($t); [Console]::OpenStandardInput().CopyTo($o); $o.Close() } catch { exit 73 }; ` +
		`if ((Get-FileHash -Algorithm SHA256 -LiteralPath $t).Hash -ne 'SUM') { Remove-Item -LiteralPath $t; exit 74 }; ` +
		`Get-ChildItem -LiteralPath DIR -Filter 'agent-*.exe' | Remove-Item -ErrorAction SilentlyContinue; ` +
		`try { Move-Item -Force -LiteralPath $t -Destination FILE } catch { exit 73 }`,
	serve: `FILE serve`,
	forget: `if (Test-Path -LiteralPath DIR) { ` +
		`Get-ChildItem -LiteralPath DIR -Filter 'agent-*.exe' | ForEach-Object { & $_.FullName forget; if ($LASTEXITCODE -ne 0) { exit 76 } }; ` +
		`Remove-Item -Recurse -Force -LiteralPath DIR }`,
}

// quotePower makes a path one word of PowerShell, whatever it holds. Its typographic quotes end a string as well.
func quotePower(path string) string {
	var b strings.Builder
	b.WriteByte('\'')
	for _, r := range path {
		if strings.ContainsRune("'‘’‚‛", r) {
			b.WriteRune(r)
		}
		b.WriteRune(r)
	}
	b.WriteByte('\'')
	return b.String()
}

// encodePower gives a command line that runs a script, with nothing in it that any shell would change.
func encodePower(script string) string {
	script = "$ProgressPreference = 'SilentlyContinue'; " + script
	var raw []byte
	for _, unit := range utf16.Encode([]rune(script)) {
		raw = binary.LittleEndian.AppendUint16(raw, unit)
	}
	return "powershell -NoProfile -NonInteractive -EncodedCommand " + base64.StdEncoding.EncodeToString(raw)
}

// command fills in a script.
func (sh shell) command(dir, script, sum string) string {
	separator := "/"
	if sh.suffix != "" {
		separator = `\`
	}
	file := dir + separator + "agent-" + sum + sh.suffix
	if sh.direct && script == sh.serve {
		return strings.ReplaceAll(script, "FILE", file)
	}
	return sh.wrap(strings.NewReplacer("DIR", sh.quote(dir), "FILE", sh.quote(file), "SUM", sum).Replace(script))
}
