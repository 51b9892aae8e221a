package s3

import "time"

// Hasty makes leases that end within a test.
func (d Driver) Hasty(renew time.Duration) Driver {
	d.lease = lease{renew: renew, valid: 3 * renew, patience: 8 * renew}
	return d
}

// Brisk waits a tenth as long before it reads again what was cut off. All its tries still take longer than it takes until a
// second one asks as well.
func (d Driver) Brisk() Driver {
	d.pause = firstPause / 10
	return d
}
