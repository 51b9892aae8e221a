package dr

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Windows say how many bytes a second may be sent when. The first that an instant lies in counts; outside of all of them there
// is no limit. They are wall-clock time: on the day on which the clock is put forward a window in the missing hour does not
// happen, and on the day on which it is put back one in the doubled hour happens twice.
type Windows []Window

// Window is a span of the day on some days of the week.
type Window struct {
	Days     [7]bool // on which it begins, time.Sunday first
	From, To int     // minutes since midnight; To not after From: until that time on the next day
	Rate     int64   // bytes a second; 0: no limit, negative: nothing may be sent
}

// maxWindows bounds the number of windows.
const maxWindows = 64

const dayMinutes = 24 * 60

// ParseWindows reads windows as people write them, separated by semicolons:
//
//	mon-fri 08:00-18:00 2MB/s; sat,sun 22:00-06:00 none; else 50Mbit/s
//
// A rate is a number with B, KB, MB, GB, KiB, MiB, GiB, kbit, Mbit or Gbit and "/s", or "unlimited", or "none" for nothing at all.
// Without days a window is every day's; "else" is all the rest. Empty text is no limit.
func ParseWindows(text string) (Windows, error) {
	var out Windows
	for _, part := range strings.Split(text, ";") {
		fields := strings.Fields(part)
		if len(fields) == 0 {
			continue
		}
		w, err := parseWindow(fields)
		if err != nil {
			return nil, fmt.Errorf("read bandwidth window %q: %w", strings.TrimSpace(part), err)
		}
		out = append(out, w)
	}
	if len(out) > maxWindows {
		return nil, fmt.Errorf("read bandwidth windows: there are %d; the most is %d", len(out), maxWindows)
	}
	return out, nil
}

func parseWindow(fields []string) (w Window, err error) {
	if w.Rate, err = parseRate(fields[len(fields)-1]); err != nil {
		return w, err
	}
	span := fields[:len(fields)-1]
	switch {
	case len(span) == 1 && span[0] == "else":
		w.Days, w.To = everyDay, dayMinutes
		return w, nil
	case len(span) == 1:
		w.Days = everyDay
	case len(span) == 2:
		if w.Days, err = parseDays(span[0]); err != nil {
			return w, err
		}
	default:
		return w, fmt.Errorf("write it as 'mon-fri 08:00-18:00 2MB/s'")
	}
	from, to, ok := strings.Cut(span[len(span)-1], "-")
	if !ok {
		return w, fmt.Errorf("%q is no span of time: write it as 08:00-18:00", span[len(span)-1])
	}
	if w.From, err = parseMinute(from); err != nil {
		return w, err
	}
	if w.To, err = parseMinute(to); err != nil {
		return w, err
	}
	if w.From == dayMinutes {
		return w, fmt.Errorf("a span does not begin at 24:00: write 00:00")
	}
	return w, nil
}

var everyDay = [7]bool{true, true, true, true, true, true, true}

var dayNames = []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

func parseDays(text string) (days [7]bool, err error) {
	day := func(name string) int {
		for i, n := range dayNames {
			if n == strings.ToLower(name) {
				return i
			}
		}
		err = fmt.Errorf("%q is no day: use mon, tue, wed, thu, fri, sat, sun", name)
		return 0
	}
	for _, part := range strings.Split(text, ",") {
		first, last, span := strings.Cut(part, "-")
		if !span {
			last = first
		}
		i, end := day(first), day(last)
		if err != nil {
			return days, err
		}
		for ; i != end; i = (i + 1) % 7 {
			days[i] = true
		}
		days[end] = true
	}
	return days, nil
}

func parseMinute(text string) (int, error) {
	h, m, ok := strings.Cut(text, ":")
	hour, err1 := strconv.Atoi(h)
	minute, err2 := strconv.Atoi(m)
	n := hour*60 + minute
	if !ok || len(m) != 2 || err1 != nil || err2 != nil || hour < 0 || minute < 0 || minute > 59 || n > dayMinutes {
		return 0, fmt.Errorf("%q is no time of day: write it as 08:00", text)
	}
	return n, nil
}

// The units of rates, in bytes; longer names first, so that "MB" is not taken for "B".
var rateUnits = []struct {
	name  string
	bytes float64
}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"kbit", 125}, {"Mbit", 125e3}, {"Gbit", 125e6}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"B", 1}}

func parseRate(text string) (int64, error) {
	switch text {
	case "unlimited", "0":
		return 0, nil
	case "none":
		return -1, nil
	}
	if number, ok := strings.CutSuffix(text, "/s"); ok {
		for _, u := range rateUnits {
			if n, ok := strings.CutSuffix(number, u.name); ok {
				f, err := strconv.ParseFloat(n, 64)
				if err == nil && f*u.bytes >= 1 && f*u.bytes < 1<<50 {
					return int64(f * u.bytes), nil
				}
			}
		}
	}
	return 0, fmt.Errorf("%q is no rate: write it as 2MB/s, 16Mbit/s, unlimited or none", text)
}

// Rate says how many bytes a second may be sent at an instant, given in the time zone that the windows mean: 0 is no limit,
// negative nothing.
func (ws Windows) Rate(at time.Time) int64 {
	minute, today := at.Hour()*60+at.Minute(), int(at.Weekday())
	for _, w := range ws {
		if w.holds(today, minute) {
			return w.Rate
		}
	}
	return 0
}

func (w Window) holds(today, minute int) bool {
	if w.From < w.To {
		return w.Days[today] && minute >= w.From && minute < w.To
	}
	return w.Days[today] && minute >= w.From || w.Days[(today+6)%7] && minute < w.To
}
