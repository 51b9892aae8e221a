package dr

import (
	"fmt"
	"time"
)

// Hooks says what is done about a live server's applications around the instant of a snapshot. The zero value is the
// default: what is found running is brought to rest, and a snapshot is taken all the same where that does not work.
type Hooks struct {
	Off      bool          `json:"off,omitempty"`      // applications are left alone
	Limit    time.Duration `json:"limit,omitempty"`    // how long one hook may take; 0: DefaultHookLimit
	Required bool          `json:"required,omitempty"` // no snapshot if a hook fails
}

// Limits of hooks.
const (
	DefaultHookLimit = 30 * time.Second
	MaxHookLimit     = 30 * time.Minute
	MaxApplications  = 48 // named by one snapshot
)

// Validate says what is wrong with the settings.
func (h Hooks) Validate() error {
	switch {
	case h.Limit < 0 || h.Limit > MaxHookLimit:
		return fmt.Errorf("hook limit %s: use up to %s", h.Limit, MaxHookLimit)
	case h.Off && h.Required:
		return fmt.Errorf("hooks are both off and required: choose one")
	}
	return nil
}

// Application is a program of a server that a capture brought to rest, or could not.
type Application struct {
	Name   string        `json:"name"`             // with its version and where it is reached, for people
	AtRest bool          `json:"at_rest"`          // from before the instant until everything was read
	Still  time.Duration `json:"still,omitempty"`  // how long it had to wait for that; 0: it never had to
	Reason string        `json:"reason,omitempty"` // why not at rest, and what to do about it
}
