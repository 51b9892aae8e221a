package fileset

import (
	"errors"
	"fmt"
	"path"
	"strings"
)

// Set says which names belong to a file set.
type Set struct {
	Roots   []string // absolute, clean, of folders; none lies below another
	Exclude []string // a pattern of path.Match: with a / in front of the whole path, otherwise of any one name
}

// Limits of a set.
const (
	MaxRoots   = 64
	MaxExclude = 256
)

// Validate says what is wrong with a set, all at once.
func (s Set) Validate() error {
	var errs []error
	add := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if len(s.Roots) == 0 || len(s.Roots) > MaxRoots {
		add("%d folders are named: name 1 to %d", len(s.Roots), MaxRoots)
	}
	if len(s.Exclude) > MaxExclude {
		add("%d patterns are left out: the most is %d", len(s.Exclude), MaxExclude)
	}
	for i, r := range s.Roots {
		switch {
		case badPath(r) != "":
			add("folder %q: give an absolute path without . and .. and without a / at its end", r)
		case r == "/":
			add("folder /: that is the whole system; capture it as an image, and name the folders that hold data")
		}
		for j, other := range s.Roots {
			if i != j && Below(r, other) && (r != other || i > j) {
				add("folder %q lies below %q: name one of them", r, other)
			}
		}
	}
	for _, p := range s.Exclude {
		if _, err := path.Match(p, "x"); err != nil || p == "" || strings.HasSuffix(p, "/") || strings.IndexByte(p, 0) >= 0 ||
			(!strings.HasPrefix(p, "/") && strings.Contains(p, "/")) {
			add("pattern %q: give a pattern of one name (*.tmp), or of a whole path that begins with / (/srv/cache)", p)
		}
	}
	return errors.Join(errs...)
}

// Below says whether a path is another one or lies below it.
func Below(p, root string) bool {
	return p == root || root == "/" || strings.HasPrefix(p, root) && p[len(root)] == '/'
}

// Excluded says whether a pattern names this path. What lies below an excluded folder is excluded with it.
func (s Set) Excluded(p string) bool {
	name := path.Base(p)
	for _, pattern := range s.Exclude {
		subject := name
		if strings.HasPrefix(pattern, "/") {
			subject = p
		}
		if ok, _ := path.Match(pattern, subject); ok { // Validate has seen the pattern
			return true
		}
	}
	return false
}

// Root gives the root a path lies below, "" if it belongs to none.
func (s Set) Root(p string) string {
	for _, r := range s.Roots {
		if Below(p, r) {
			return r
		}
	}
	return ""
}

// Compare orders paths: a folder comes before what is in it, and all that before its next neighbour. Names are compared by
// their bytes.
func Compare(a, b string) int {
	for i := range min(len(a), len(b)) {
		x, y := a[i], b[i]
		if x == y {
			continue
		}
		switch {
		case x == '/':
			return -1
		case y == '/':
			return 1
		case x < y:
			return -1
		}
		return 1
	}
	return len(a) - len(b)
}

// Checker says of a sequence of entries whether it is a file set: sorted, each below a root, each in a folder that came before
// and is not a link, so that nobody who makes the entries in this order is led astray.
type Checker struct {
	Set     Set
	last    string
	folders []string // from the root down to the one in which the last entry lies
}

// Next takes the next entry.
func (c *Checker) Next(e *Entry) error {
	root := c.Set.Root(e.Path)
	switch {
	case root == "":
		return fmt.Errorf("entry %.100q lies outside of the file set: %w", e.Path, ErrBad)
	case c.last != "" && Compare(c.last, e.Path) >= 0:
		return fmt.Errorf("entry %.100q comes after %.100q: %w", e.Path, c.last, ErrBad)
	case e.Kind == Link && (c.Set.Root(e.Target) == "" || Compare(e.Target, e.Path) >= 0):
		return fmt.Errorf("link %.100q to %.100q: %w", e.Path, e.Target, ErrBad)
	}
	for len(c.folders) > 0 && !Below(e.Path, c.folders[len(c.folders)-1]) {
		c.folders = c.folders[:len(c.folders)-1]
	}
	if e.Path == root {
		if e.Kind != Folder {
			return fmt.Errorf("entry %.100q is no folder: %w", e.Path, ErrBad)
		}
	} else if len(c.folders) == 0 || c.folders[len(c.folders)-1] != path.Dir(e.Path) {
		return fmt.Errorf("entry %.100q lies in no folder of the file set: %w", e.Path, ErrBad)
	}
	c.last = e.Path
	if e.Kind == Folder && !e.Edge {
		c.folders = append(c.folders, e.Path)
	}
	return nil
}
