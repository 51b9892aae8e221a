package dr

import (
	"crypto/rand"
	"encoding/base32"
	"fmt"
	"regexp"
	"strings"
	"time"
)

var idRE = regexp.MustCompile(`^[a-z]+-[0-9a-z]{1,40}(-[0-9a-z]{1,40})*$`)

// NewID gives an identifier of a kind ("srv", "verdict", …) that is unique without asking anyone: 80 random bits.
func NewID(kind string) string {
	var b [10]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic("dr: the system has no randomness: " + err.Error())
	}
	return kind + "-" + strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b[:]))
}

// NewSnapshotID gives a snapshot's identifier: its instant to the second in UTC, for people, and 40 random bits.
func NewSnapshotID(taken time.Time) string {
	return "snap-" + taken.UTC().Format("20060102t150405") + "-" + NewID("x")[2:10]
}

// ValidateID accepts only what NewID and NewSnapshotID make. Identifiers become file names.
func ValidateID(id string) error {
	if len(id) > 100 || !idRE.MatchString(id) {
		return fmt.Errorf("identifier %q is not of the form kind-…", id)
	}
	return nil
}
