package dr

// Progress is told how far long work has come: which part of the work, and how much of it in which unit ("bytes",
// "blocks", "checks"; total 0 if unknown). It is called from any goroutine, often, and returns at once.
type Progress func(part string, done, total int64, unit string)

// Report calls p if there is one.
func (p Progress) Report(part string, done, total int64, unit string) {
	if p != nil {
		p(part, done, total, unit)
	}
}
