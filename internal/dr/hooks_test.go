package dr

import (
	"strings"
	"testing"
	"time"
)

func TestSettingsOfHooksThatMakeNoSenseAreRefused(t *testing.T) {
	for _, h := range []Hooks{{}, {Off: true}, {Limit: MaxHookLimit, Required: true}} {
		if err := h.Validate(); err != nil {
			t.Errorf("%+v: %v", h, err)
		}
	}
	for want, h := range map[string]Hooks{
		"hook limit -1s": {Limit: -time.Second}, "use up to": {Limit: MaxHookLimit + 1}, "both off and required": {Off: true, Required: true},
	} {
		if err := h.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", h, err, want)
		}
	}
}
