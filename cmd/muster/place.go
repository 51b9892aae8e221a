package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/cached"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/s3"
)

// defaultCache is how many GiB of what was read from a bucket are kept on this host.
const defaultCache = 10

// inBucket says whether the store is in a bucket and not in a folder.
func (s settings) inBucket() bool { return strings.HasPrefix(s.Store, s3.Scheme) }

// bucket is the driver of a store in a bucket, without its cache.
func (s settings) bucket() (s3.Driver, error) {
	d, err := s3.Parse(s.Store)
	if err != nil {
		return d, withCode(exitUsage, err)
	}
	d.Credentials = s.StoreCredentials
	return d, nil
}

// driver reaches the installation's own store.
func (i install) driver(s settings) (store.Driver, error) { return i.driverAt(s, i.path("cache")) }

// farDriver reaches the far store of a customer: where the customer's record says, or beside the installation's own store.
func (i install) farDriver(s settings, c store.Customer) (store.Driver, error) {
	s.Store = c.Place
	return i.driverAt(s, i.path("cache-"+c.Name))
}

// besideStore is where a customer's far store is put if nobody says otherwise: beside the installation's own.
func (s settings) besideStore(customer string) (string, error) {
	place, options := s.Store, ""
	if s.inBucket() {
		d, err := s.bucket()
		if err != nil {
			return "", err
		}
		if d.Prefix == "" {
			return "", withCode(exitUsage, fmt.Errorf("the installation's own store has all of its bucket: say with --store where that of %s is to be", customer))
		}
		if at := strings.IndexByte(place, '?'); at >= 0 {
			place, options = place[:at], place[at:]
		}
	}
	return strings.TrimSuffix(place, "/") + ".customers/" + customer + options, nil
}

// driverAt knows the ways of keeping a store. cache is the folder of what was read of one in a bucket.
func (i install) driverAt(s settings, cache string) (store.Driver, error) {
	if !s.inBucket() {
		return folder.Driver{Path: s.Store}, nil
	}
	d, err := s.bucket()
	if err != nil {
		return nil, err
	}
	gib := s.StoreCache
	if gib == 0 {
		gib = defaultCache
	}
	return cached.Driver{Driver: d, Dir: cache, Limit: int64(gib) << 30}, nil
}

// place makes what was typed complete: a folder's path does not depend on where the command was typed.
func (s *settings) place(i install) error {
	for _, path := range []*string{&s.Store, &s.StoreCredentials} {
		if *path == "" || path == &s.Store && s.inBucket() {
			continue
		}
		abs, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = abs
	}
	if s.Store == "" {
		s.Store = i.path("store")
	}
	if !s.inBucket() && (s.StoreCredentials != "" || s.StoreCache != 0) {
		return withCode(exitUsage, fmt.Errorf("--store-credentials and --store-cache are for a store in a bucket: give --store s3://BUCKET/PREFIX?endpoint=https://HOST"))
	}
	if s.StoreCache < 0 {
		return withCode(exitUsage, fmt.Errorf("--store-cache %d: give GiB, or nothing for %d", s.StoreCache, defaultCache))
	}
	return nil
}

// formatFile is where the file is that is to be copied with the key.
func (s settings) formatFile() string {
	if s.inBucket() {
		return strings.TrimSuffix(folder.FormatFile, ".f") + " of the bucket"
	}
	return filepath.Join(s.Store, folder.FormatFile)
}

// Clocks that differ by more make a service refuse requests (15 min) or a collection refuse to run (5 min).
const (
	skewWarn = 30 * time.Second
	skewFail = 5 * time.Minute
)

// examineBucket says what the store's bucket is like.
func examineBucket(ctx context.Context, s settings) []api.Finding {
	found := func(name, state, fix, format string, args ...any) api.Finding {
		return api.Finding{Name: name, State: state, Detail: fmt.Sprintf(format, args...), Fix: fix}
	}
	d, err := s.bucket()
	if err != nil {
		return []api.Finding{found("bucket", "fail", "", "%v", err)}
	}
	h, err := d.Examine(ctx)
	if err != nil {
		return []api.Finding{found("bucket", "fail", "", "%s cannot be used: %v", d, err)}
	}
	all := []api.Finding{found("bucket", "ok", "", "%s answers in %s", d, h.Took.Round(time.Millisecond))}
	if d.Plain {
		all[0] = found("bucket", "warn", "", "%s answers in %s, without TLS: whoever listens sees when what is stored, and can answer in its place", d, h.Took.Round(time.Millisecond))
	}
	switch skew := max(h.Skew, -h.Skew).Round(time.Second); {
	case skew > skewFail:
		all = append(all, found("bucket clock", "fail", "timedatectl set-ntp true", "this host's clock and the service's differ by %s: requests or collections are refused", skew))
	case skew > skewWarn:
		all = append(all, found("bucket clock", "warn", "timedatectl set-ntp true", "this host's clock and the service's differ by %s", skew))
	default:
		all = append(all, found("bucket clock", "ok", "", "this host's clock and the service's agree"))
	}
	days := int(d.Retention.Hours() / 24)
	switch {
	case d.Retention > 0 && !h.Locks:
		all = append(all, found("bucket lock", "fail", "", "the store asks for locks of %d days, and bucket %s has no object lock: it can only be chosen when a bucket is made", days, d.Bucket))
	case h.Default != "":
		all = append(all, found("bucket lock", "warn", "", "bucket %s locks everything by itself (%s), also what is replaced every few seconds: remove that default, the store locks what it keeps", d.Bucket, h.Default))
	case d.Retention > 0:
		all = append(all, found("bucket lock", "ok", "", "what is kept is locked for %d days, and again before that ends", days))
	case h.Locks:
		all = append(all, found("bucket lock", "warn", "", "bucket %s has object lock and the store does not use it: add lock-days to its address", d.Bucket))
	default:
		all = append(all, found("bucket lock", "warn", "", "nothing is locked: whoever has the credentials can remove the store"))
	}
	return all
}
