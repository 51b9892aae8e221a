package s3

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Scheme begins the address of a bucket.
const Scheme = "s3://"

const defaultEndpoint = "s3.amazonaws.com"

// maxDays is the longest retention that is taken for meant: in compliance mode nobody can take it back.
const maxDays = 3650

// Parse reads the address of a store in a bucket:
//
//	s3://BUCKET[/PREFIX][?endpoint=https://HOST[:PORT]&region=REGION&path-style=1&ca=FILE&lock-days=N&lock-mode=compliance|governance]
//
// Credentials are not part of it: addresses are printed.
func Parse(address string) (Driver, error) {
	d, err := parse(address)
	if err != nil {
		return Driver{}, fmt.Errorf("read the store's address: %w", err)
	}
	return d, nil
}

func parse(address string) (d Driver, err error) {
	u, err := url.Parse(address)
	if err != nil {
		return d, fmt.Errorf("it is no s3://BUCKET/PREFIX?endpoint=https://HOST") // the library's error repeats all of it
	}
	if u.User != nil {
		return d, fmt.Errorf("credentials do not belong into it, because it is printed: put them into a file of their own, and replace the key")
	}
	d = Driver{Endpoint: defaultEndpoint, Bucket: u.Host, Prefix: strings.Trim(u.Path, "/")}
	if u.Scheme != "s3" || d.Bucket == "" {
		return d, fmt.Errorf("%s is no s3://BUCKET/PREFIX?endpoint=https://HOST", u.Redacted())
	}
	if d.Prefix != "" {
		d.Prefix += "/"
	}
	values, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return d, fmt.Errorf("after the ? give NAME=VALUE&NAME=VALUE")
	}
	for name, all := range values {
		if err := d.set(name, all[len(all)-1]); err != nil {
			return d, err
		}
	}
	if d.Governance && d.Retention == 0 {
		return d, fmt.Errorf("lock-mode without lock-days locks nothing")
	}
	return d, nil
}

func (d *Driver) set(name, value string) error {
	switch name {
	case "endpoint":
		u, err := url.Parse(value)
		if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || strings.Trim(u.Path, "/") != "" {
			return fmt.Errorf("endpoint %q is no https://HOST or https://HOST:PORT", value)
		}
		d.Endpoint, d.Plain = u.Host, u.Scheme == "http"
	case "region":
		d.Region = value
	case "ca":
		d.CA = value
	case "path-style":
		on, err := strconv.ParseBool(value)
		if err != nil {
			return fmt.Errorf("path-style %q is neither 1 nor 0", value)
		}
		d.PathStyle = on
	case "lock-days":
		n, err := strconv.Atoi(value)
		if err != nil || n < 1 || n > maxDays {
			return fmt.Errorf("lock-days %q is no number from 1 to %d", value, maxDays)
		}
		d.Retention = time.Duration(n) * 24 * time.Hour
	case "lock-mode":
		if value != "compliance" && value != "governance" {
			return fmt.Errorf("lock-mode %q is neither compliance nor governance", value)
		}
		d.Governance = value == "governance"
	default:
		return fmt.Errorf("it has no %q: there are endpoint, region, path-style, ca, lock-days and lock-mode", name)
	}
	return nil
}
