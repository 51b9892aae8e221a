package probe

import (
	"reflect"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// maxSpan bounds every duration a guest may claim.
const maxSpan = 100 * 365 * 24 * time.Hour

// Tame makes an answer safe to keep and to print: every text is Clean and at most so many bytes, every list has at most
// so many items, every number is one that a machine can have. It walks the whole value by reflection, so that a field
// added later cannot be forgotten.
func (a *Answer) Tame(items, text int) { tamer{items, text}.tame(reflect.ValueOf(a).Elem()) }

type tamer struct{ items, text int }

var timeType = reflect.TypeFor[time.Time]()

func (t tamer) tame(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			t.tame(v.Elem())
		}
	case reflect.Struct:
		if v.Type() == timeType {
			return
		}
		for i := range v.NumField() {
			if f := v.Field(i); f.CanSet() {
				t.tame(f)
			}
		}
	case reflect.Slice:
		if v.Len() > t.items {
			// A copy, so that the long list behind it can be collected.
			short := reflect.MakeSlice(v.Type(), t.items, t.items)
			reflect.Copy(short, v)
			v.Set(short)
		}
		for i := range v.Len() {
			t.tame(v.Index(i))
		}
	case reflect.String:
		v.SetString(Clean(v.String(), t.text))
	case reflect.Int, reflect.Int64:
		v.SetInt(min(max(v.Int(), 0), int64(maxSpan)))
	case reflect.Float64:
		v.SetFloat(min(max(v.Float(), 0), 1e9))
	}
}

// Clean makes a guest's text safe to print and to keep: one line of valid UTF-8, at most limit bytes, with nothing that
// a terminal would obey. What is cut is marked with "…".
func Clean(text string, limit int) string {
	cut := len(text) > limit
	if cut {
		text = text[:max(limit-len("…"), 0)]
		for len(text) > 0 && !utf8.RuneStart(text[len(text)-1]) {
			text = text[:len(text)-1]
		}
		if n := len(text); n > 0 && text[n-1] >= utf8.RuneSelf {
			text = text[:n-1] // a rune that lost its tail
		}
	}
	clean := strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\r' || r == '\u2028' || r == '\u2029':
			return ' '
		case r == utf8.RuneError, unicode.IsControl(r):
			return '?'
		case unicode.Is(unicode.Cf, r):
			return -1 // invisible, or turns the direction of the line around
		}
		return r
	}, text)
	if cut && limit >= len("…") {
		clean += "…"
	}
	return clean
}
