package rekor

import (
	"container/list"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/chancery-ca/chancery/log/tree"
)

// admission lets only those in whose certificate leads to an authority.
// A nil admission lets everybody in.
type admission struct {
	anchors *x509.CertPool
}

// newAdmission checks the intermediates against the roots once. They are then
// anchors themselves, so that an entry costs one signature check.
func newAdmission(roots, intermediates []*x509.Certificate) (*admission, error) {
	if len(roots) == 0 {
		if len(intermediates) > 0 {
			return nil, fmt.Errorf("%d intermediates but no root", len(intermediates))
		}
		return nil, nil
	}
	anchors, between := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range roots {
		anchors.AddCert(c)
	}
	for _, c := range intermediates {
		between.AddCert(c)
	}
	rootsOnly := anchors.Clone()
	for _, c := range intermediates {
		opts := x509.VerifyOptions{Roots: rootsOnly, Intermediates: between, CurrentTime: c.NotBefore, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
		if _, err := c.Verify(opts); err != nil {
			return nil, fmt.Errorf("intermediate %q: %w", c.Subject, err)
		}
		anchors.AddCert(c)
	}
	return &admission{anchors}, nil
}

var oidSAN = asn1.ObjectIdentifier{2, 5, 29, 17}

// admits says whether the certificate leads to an anchor, may sign code, and
// was valid when it began to be: entries may come after it has expired.
func (a *admission) admits(cert *x509.Certificate) error {
	if a == nil {
		return nil
	}
	if cert == nil {
		return fmt.Errorf("no certificate")
	}
	// An otherName is all that Sigstore's username certificates have in their
	// critical SAN; Go does not know it.
	c := *cert
	c.UnhandledCriticalExtensions = nil
	for _, oid := range cert.UnhandledCriticalExtensions {
		if !oid.Equal(oidSAN) {
			c.UnhandledCriticalExtensions = append(c.UnhandledCriticalExtensions, oid)
		}
	}
	_, err := c.Verify(x509.VerifyOptions{
		Roots:       a.anchors,
		CurrentTime: c.NotBefore,
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
	})
	return err
}

// buckets is a token bucket per client, of the clients seen last.
type buckets struct {
	limit rate.Limit
	burst int
	max   int

	mu     sync.Mutex
	byName map[string]*list.Element // guarded by mu
	recent *list.List               // of *bucket, newest first; guarded by mu
}

type bucket struct {
	name string
	*rate.Limiter
}

// newBuckets returns nil, which allows everything, if limit is 0.
func newBuckets(limit rate.Limit, burst, maxClients int) *buckets {
	if limit == 0 {
		return nil
	}
	return &buckets{limit: limit, burst: max(burst, 1), max: maxClients, byName: make(map[string]*list.Element), recent: list.New()}
}

// allow takes a token from the client's bucket. A client that was forgotten
// begins with a full one: the map is bounded, and so is what that gives away.
func (b *buckets) allow(client string, now time.Time) bool {
	if b == nil {
		return true
	}
	client = network(client)
	b.mu.Lock()
	defer b.mu.Unlock()
	e, ok := b.byName[client]
	if ok {
		b.recent.MoveToFront(e)
	} else {
		if b.recent.Len() >= b.max {
			oldest := b.recent.Remove(b.recent.Back()).(*bucket)
			delete(b.byName, oldest.name)
		}
		e = b.recent.PushFront(&bucket{client, rate.NewLimiter(b.limit, b.burst)})
		b.byName[client] = e
	}
	return e.Value.(*bucket).AllowN(now, 1)
}

// network is the address, or the /64 of an IPv6 address, which one client
// commonly has whole.
func network(client string) string {
	addr, err := netip.ParseAddr(client)
	if err != nil || addr.Unmap().Is4() {
		return client
	}
	p, err := addr.WithZone("").Prefix(64)
	if err != nil {
		return client
	}
	return p.String()
}

// replays remembers leaves whose submission may be repeated with success: for
// a while after they were logged if the configuration says so, and longer if
// their answer failed on our side. It holds two generations, bounded each.
type replays struct {
	window time.Duration // for answered leaves
	life   time.Duration // of a generation: no memory is asked for longer

	mu         sync.Mutex
	young, old map[tree.Hash]time.Time // until when; guarded by mu
	turned     time.Time               // when young began; guarded by mu
}

const (
	// unanswered is how long a leaf that got no answer can be asked for.
	unanswered = 10 * time.Minute
	// maxReplays bounds each of the two generations.
	maxReplays = 1 << 16
)

func newReplays(window time.Duration) *replays {
	return &replays{
		window: window,
		life:   max(window, unanswered),
		young:  make(map[tree.Hash]time.Time),
	}
}

// answered remembers a leaf whose answer was given.
func (r *replays) answered(h tree.Hash, now time.Time) {
	if r.window > 0 {
		r.add(h, now, r.window)
	}
}

// failed remembers a leaf that may be in the log without an answer.
func (r *replays) failed(h tree.Hash, now time.Time) { r.add(h, now, unanswered) }

func (r *replays) add(h tree.Hash, now time.Time, d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Sub(r.turned) >= r.life || len(r.young) >= maxReplays {
		r.old, r.young, r.turned = r.young, make(map[tree.Hash]time.Time), now
	}
	r.young[h] = now.Add(d)
}

// allowed says whether a repeated submission of the leaf gets its entry.
func (r *replays) allowed(h tree.Hash, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	until, ok := r.young[h]
	if !ok {
		until = r.old[h]
	}
	return now.Before(until)
}
