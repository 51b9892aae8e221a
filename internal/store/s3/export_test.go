package s3

import "time"

// Hasty makes leases that end within a test.
func (d Driver) Hasty(renew time.Duration) Driver {
	d.lease = lease{renew: renew, valid: 3 * renew, patience: 8 * renew}
	return d
}
