package master

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// Witness writes down what happened to a node, once however often it is told.
func (m *Master) Witness(ctx context.Context, at time.Time, what, node, message string) {
	err := m.Catalog.AddEventOnce(ctx, dr.Event{At: at, Kind: "node." + what, Subject: node, Message: message})
	if err != nil {
		m.Log.ErrorContext(ctx, "write event", "kind", "node."+what, "node", node, "error", err)
	}
}

// nodes says how the nodes stand, with when each was heard of.
func (m *Master) nodes(ctx context.Context) ([]api.NodeFigures, error) {
	if m.Nodes == nil {
		return nil, nil
	}
	all, err := m.Nodes()
	if err != nil {
		return nil, err
	}
	silos, err := m.Catalog.Silos(ctx)
	if err != nil {
		return nil, err
	}
	seen, skew := map[string]time.Time{}, map[string]time.Duration{} // a name is used once, whatever the role
	for _, s := range silos {
		seen[s.Name], skew[s.Name] = s.Seen, m.skew(s.Name)
	}
	m.mu.Lock()
	for name, s := range m.sites {
		seen[name], skew[name] = s.Seen, s.Skew
	}
	m.mu.Unlock()
	for i := range all {
		all[i].Seen, all[i].Skew = seen[all[i].Name], skew[all[i].Name]
	}
	return all, nil
}

// lowCertificate is how much of a certificate's life is left when a node that renews it should long have done so.
const lowCertificate = 36 * time.Hour

// maxNodesTold bounds how many nodes health says something of.
const maxNodesTold = 20

// checkNodes says who is away, and whose certificate ends. None of that keeps the master from its work.
func (m *Master) checkNodes(ctx context.Context) (string, error) {
	all, err := m.nodes(ctx)
	if err != nil {
		return "", err
	}
	now := m.Now()
	expected, connected := 0, 0
	var told []string
	tell := func(format string, args ...any) {
		if len(told) < maxNodesTold {
			told = append(told, fmt.Sprintf(format, args...))
		}
	}
	for _, n := range all {
		switch {
		case n.Revoked:
			tell("%s %s is revoked", n.Role, n.Name)
			continue
		case n.Expires.IsZero():
			tell("%s %s has not joined yet", n.Role, n.Name)
			continue
		}
		expected++
		if n.Connected {
			connected++
		} else if n.Seen.IsZero() {
			tell("%s %s is away and was never heard of", n.Role, n.Name)
		} else {
			tell("%s %s is away, last heard of %s ago", n.Role, n.Name, now.Sub(n.Seen).Round(time.Second))
		}
		if off := dr.ClockOff(n.Skew); off != "" {
			tell("the clock of %s %s is %s", n.Role, n.Name, off)
		}
		if left := n.Expires.Sub(now); left <= 0 {
			tell("the certificate of %s has expired: enrol it again", n.Name)
		} else if left < lowCertificate {
			tell("the certificate of %s ends in %s", n.Name, left.Round(time.Minute))
		}
	}
	return strings.Join(append([]string{fmt.Sprintf("%d of %d connected", connected, expected)}, told...), "; "), nil
}
