package s3_test

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/store/s3"
)

func TestAddressesAreRead(t *testing.T) {
	for address, want := range map[string]s3.Driver{
		"s3://b":                          {Endpoint: "s3.amazonaws.com", Bucket: "b"},
		"s3://b/a/c/?region=eu-central-1": {Endpoint: "s3.amazonaws.com", Bucket: "b", Prefix: "a/c/", Region: "eu-central-1"},
		"s3://b/p?endpoint=https://s3.example.org:9000&path-style=1&ca=/etc/ca.pem&lock-days=30": {Endpoint: "s3.example.org:9000", Bucket: "b", Prefix: "p/", PathStyle: true, CA: "/etc/ca.pem", Retention: 720 * time.Hour},
		"s3://b?endpoint=http://127.0.0.1:9000&lock-days=1&lock-mode=governance":                 {Endpoint: "127.0.0.1:9000", Plain: true, Bucket: "b", Retention: 24 * time.Hour, Governance: true},
	} {
		if got, err := s3.Parse(address); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", address, got, err)
		}
	}
	for address, says := range map[string]string{
		"s3:///p":                     "is no s3://BUCKET",
		"s3://AKIA:secret@b/p":        "credentials do not belong",
		"s3://b?endpoint=example.org": "is no https://HOST",
		"s3://b?lock-days=0":          "from 1 to",
		"s3://b?lock-days=99999":      "from 1 to",
		"s3://b?lock-mode=compliant":  "neither compliance nor governance",
		"s3://b?lock-mode=governance": "locks nothing",
		"s3://b?secret=x":             `no "secret"`,
		"s3://b\x00AKIA":              "no s3://",
		"https://b":                   "is no s3://BUCKET",
		"s3://b?path-style=perhaps":   "neither 1 nor 0",
	} {
		if _, err := s3.Parse(address); err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "AKIA") || strings.Contains(err.Error(), "secret@") {
			t.Errorf("%q: %v", address, err)
		}
	}
}
