// Package probe is the conversation between a host and the test agent inside a booted rescue image: the questions,
// the answers, their limits and their form on the wire.
//
//	Reader        takes whole messages off a channel on which anything may arrive
//	Conversation  the host's end: who booted, how is it, ask this
//	Ask, Answer   one question, one answer
//
// # Wire
//
// One JSON object a line, at most MaxLine bytes, over a serial port: no framing below it can be trusted, because
// firmware, boot loader and kernel may write to the port first and the guest is hostile input. A line that does not
// parse, or carries another challenge than this boot's, is skipped and counted; after MaxGarbage bytes of such lines the
// channel is given up.
//
//	guest → host   {"answer":"ready","hello":{"agent":"…"}}      from time to time while nobody asks anything
//	host → guest   {"ask":"hello","challenge":"…"}     every second until answered
//	guest → host   {"answer":"hello","challenge":"…","hello":{"boot_id":"…",…}}
//	host → guest   {"ask":"status","challenge":"…","id":7}
//	guest → host   {"answer":"status","challenge":"…","id":7,"status":{…}}
//	host → guest   {"ask":"check","challenge":"…","id":8,"check":{…}}
//	guest → host   {"answer":"check","challenge":"…","id":8,"result":{…}}
//
// The host is silent until the guest's kernel runs or the agent says that it is ready: until then the other end of a
// serial port may be a firmware or a boot loader, to which our bytes are keystrokes.
//
// The challenge is 16 random bytes in hex, made anew for every boot: an answer that repeats it comes from this boot
// and not from a log or an earlier machine.
//
// Knows: questions, answers, their encoding.
// Must not know: how a check is carried out, what a verdict is, libvirt.
package probe

import (
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Limits of the conversation.
const (
	MaxLine    = 1 << 20  // bytes of one message
	MaxGarbage = 16 << 20 // bytes that are no message before the channel is given up
	MaxItems   = 4096     // entries of any list in an answer
	MaxText    = 4096     // bytes of any one text in an answer
)

// PortName is the virtio-serial port on which the agent answers.
const PortName = "org.muster.guest.0"

// The questions, and what the agent says unasked. An answer bears the name of its question.
const (
	AskHello  = "hello"
	AskStatus = "status"
	AskCheck  = "check"
	SayReady  = "ready" // its hello holds only Agent
)

// Ask is a question.
type Ask struct {
	Ask       string    `json:"ask"` // one of the Ask… constants
	Challenge string    `json:"challenge"`
	ID        int64     `json:"id,omitempty"`
	Check     *dr.Check `json:"check,omitempty"`
	Brief     bool      `json:"brief,omitempty"` // status: only what tells whether the machine has settled
	Now       time.Time `json:"now,omitzero"`    // the host's clock, for the time offset
}

// Answer is an answer.
type Answer struct {
	Answer    string          `json:"answer"`
	Challenge string          `json:"challenge"`
	ID        int64           `json:"id,omitempty"`
	Error     string          `json:"error,omitempty"`
	Hello     *Hello          `json:"hello,omitempty"`
	Status    *Status         `json:"status,omitempty"`
	Result    *dr.CheckResult `json:"result,omitempty"`
}

// Hello is the first answer: who booted.
type Hello struct {
	Agent    string        `json:"agent"`   // random, made when the agent starts: another means that it started again
	Version  string        `json:"version"` // of the agent
	BootID   string        `json:"boot_id"` // /proc/sys/kernel/random/boot_id
	Machine  string        `json:"machine_id"`
	Hostname string        `json:"hostname"`
	Kernel   string        `json:"kernel"`
	Uptime   time.Duration `json:"uptime"` // since the kernel started
}

// Status is the machine seen from inside, now. A brief one holds only Uptime, Now, InitState, Jobs, Load1, FailedUnits
// and Listening: what tells whether the machine has settled.
type Status struct {
	Uptime      time.Duration   `json:"uptime"`
	Now         time.Time       `json:"now"` // the guest's clock
	Timezone    string          `json:"timezone,omitempty"`
	Distro      dr.Distro       `json:"distro"`
	Kernel      string          `json:"kernel"`
	Hostname    string          `json:"hostname"`
	InitState   string          `json:"init_state"` // systemctl is-system-running
	Jobs        int             `json:"jobs"`       // init's queued jobs; 0 when it has settled
	Load1       float64         `json:"load1"`
	FailedUnits []string        `json:"failed_units,omitempty"`
	ActiveUnits []string        `json:"active_units,omitempty"`
	Mounts      []dr.Filesystem `json:"mounts,omitempty"`
	Fstab       []FstabEntry    `json:"fstab,omitempty"` // what should be mounted at boot
	NICs        []dr.NIC        `json:"nics,omitempty"`
	Routes      []dr.Route      `json:"routes,omitempty"`
	Listening   []dr.Listener   `json:"listening,omitempty"`
	Processes   []string        `json:"processes,omitempty"`
	Journal     []LogLine       `json:"journal,omitempty"`   // priority err and worse, this boot, newest last
	Oops        []string        `json:"oops,omitempty"`      // kernel oops, OOM kills, segfaults
	ReadOnly    []string        `json:"read_only,omitempty"` // mounted read-only though fstab does not ask for it
	Unread      []string        `json:"unread,omitempty"`    // what could not be found out, each with why
}

// FstabEntry is one line of fstab that is to be mounted at boot.
type FstabEntry struct {
	Spec   string `json:"spec"`
	Mount  string `json:"mount"`
	Type   string `json:"type"`
	Nofail bool   `json:"nofail,omitempty"`
}

// LogLine is one line of a system's log.
type LogLine struct {
	Priority int    `json:"priority"` // syslog: 0 emergency … 3 error
	Unit     string `json:"unit,omitempty"`
	Text     string `json:"text"`
}
