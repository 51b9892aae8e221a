package prerecover

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// Variables is what a template may name, as {{name}}. There is nothing else in the language: no conditions, no loops, no
// functions. Some values come out of a customer's image; they are put in as they are, as text.
type Variables map[string]string

// The variables there are, with examples.
var exampleVariables = Variables{
	"hostname": "shop", "distro": "debian", "version": "12", "kernel": "6.1.0-25-amd64", "root_uuid": "c0ffee",
	"server": "shop", "snapshot": "snap-1", "machine_uuid": "c0ffee",
}

var variableRE = regexp.MustCompile(`\{\{([^{}\n]*)\}\}`)

// maxVariable is the longest value that is put into a template, in bytes.
const maxVariable = 256

// expand puts the values in. A name that is not among them, or a value that is more than one plain line, is an error.
func expand(template string, values Variables) (string, error) {
	var err error
	out := variableRE.ReplaceAllStringFunc(template, func(m string) string {
		name := strings.TrimSpace(m[2 : len(m)-2])
		value, ok := values[name]
		switch {
		case !ok:
			err = fmt.Errorf("there is no variable %q; there are: %s", name, strings.Join(slices.Sorted(maps.Keys(values)), ", "))
		case len(value) > maxVariable || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f }):
			err = fmt.Errorf("the value of %s is not one plain line of at most %d bytes", name, maxVariable)
		}
		return value
	})
	if err != nil {
		return "", err
	}
	return out, nil
}
