package dr

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"time"
)

// Check is one question of the customer's own, asked from inside the booted server by the test agent. Exactly the
// fields of its kind are used.
type Check struct {
	Name    string        `json:"name" yaml:"name"`
	Kind    CheckKind     `json:"kind" yaml:"kind"`
	Timeout time.Duration `json:"timeout,omitempty" yaml:"timeout"` // for the whole check with its retries; 0: DefaultCheckTimeout

	URL    string `json:"url,omitempty" yaml:"url"`       // http: http(s)://host/path as seen from inside
	Status int    `json:"status,omitempty" yaml:"status"` // http: expected status; 0: 200
	Body   string `json:"body,omitempty" yaml:"body"`     // http: regular expression (RE2) the body must match
	// InsecureTLS (http): accept a certificate that does not verify. The rescue machine may be isolated from its CA.
	InsecureTLS bool `json:"insecure_tls,omitempty" yaml:"insecure_tls"`

	Address string `json:"address,omitempty" yaml:"address"` // tcp: host:port; postgres, mysql: host:port or the socket's folder
	Banner  string `json:"banner,omitempty" yaml:"banner"`   // tcp: regular expression the first bytes must match; "" only connect

	User     string `json:"user,omitempty" yaml:"user"`         // postgres, mysql: database user; also the OS user for a local socket
	Password string `json:"password,omitempty" yaml:"password"` // postgres, mysql
	Database string `json:"database,omitempty" yaml:"database"`
	Query    string `json:"query,omitempty" yaml:"query"`

	Command []string `json:"command,omitempty" yaml:"command"` // command: argv, no shell
	Exit    int      `json:"exit,omitempty" yaml:"exit"`       // command: expected exit code

	Expect string `json:"expect,omitempty" yaml:"expect"` // postgres, mysql, command: regular expression the (first value of the) output must match
}

// CheckKind is a way of asking.
type CheckKind string

// The kinds of check.
const (
	CheckHTTP     CheckKind = "http"
	CheckTCP      CheckKind = "tcp"
	CheckPostgres CheckKind = "postgres"
	CheckMySQL    CheckKind = "mysql"
	CheckCommand  CheckKind = "command"
)

// Limits and defaults of checks.
const (
	DefaultCheckTimeout = 120 * time.Second
	MaxCheckTimeout     = 30 * time.Minute
	MaxCheckText        = 4096 // bytes of any one text field
)

// Limit is the check's time-out with the default filled in.
func (c Check) Limit() time.Duration {
	if c.Timeout <= 0 {
		return DefaultCheckTimeout
	}
	return c.Timeout
}

// Validate says what is wrong with a check, all at once. A check that could not fail is an error.
func (c Check) Validate() error {
	var errs []error
	add := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Name == "" {
		add("it has no name")
	}
	if c.Timeout < 0 || c.Timeout > MaxCheckTimeout {
		add("%s: timeout %s: use up to %s", c.Name, c.Timeout, MaxCheckTimeout)
	}
	for field, text := range map[string]string{"url": c.URL, "body": c.Body, "address": c.Address, "banner": c.Banner,
		"user": c.User, "password": c.Password, "database": c.Database, "query": c.Query, "expect": c.Expect, "name": c.Name} {
		if len(text) > MaxCheckText {
			add("%s: %s is longer than %d bytes", c.Name, field, MaxCheckText)
		}
	}
	for field, re := range map[string]string{"body": c.Body, "banner": c.Banner, "expect": c.Expect} {
		if _, err := regexp.Compile(re); err != nil {
			add("%s: %s is not a regular expression: %w", c.Name, field, err)
		}
	}
	switch c.Kind {
	case CheckHTTP:
		u, err := url.Parse(c.URL)
		if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
			add("%s: url %q: give http://… or https://…", c.Name, c.URL)
		}
	case CheckTCP:
		if c.Address == "" {
			add("%s: give an address as HOST:PORT", c.Name)
		}
	case CheckPostgres, CheckMySQL:
		if c.Query == "" || c.Expect == "" {
			add("%s: a %s check needs a query and the value to expect", c.Name, c.Kind)
		}
	case CheckCommand:
		if len(c.Command) == 0 || len(c.Command) > 64 {
			add("%s: give a command of 1 to 64 words", c.Name)
		}
	default:
		add("%s: kind %q: use http, tcp, postgres, mysql or command", c.Name, c.Kind)
	}
	return errors.Join(errs...)
}
