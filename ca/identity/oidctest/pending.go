package oidctest

import (
	"crypto/rand"
	"sync"
	"time"
)

// maxPending bounds every store of codes; when it is full the request is
// refused until some have expired.
const maxPending = 1024

// pending holds values under random names until they are taken or expire.
type pending[T any] struct {
	now      func() time.Time
	lifetime time.Duration

	mu      sync.Mutex
	entries map[string]pendingEntry[T] // guarded by mu
}

type pendingEntry[T any] struct {
	value   T
	expires time.Time
}

func newPending[T any](now func() time.Time, lifetime time.Duration) *pending[T] {
	return &pending[T]{now: now, lifetime: lifetime, entries: map[string]pendingEntry[T]{}}
}

// put stores value and returns its name, 130 random bits in base32; ok is
// false when the store is full.
func (p *pending[T]) put(value T) (name string, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	if len(p.entries) >= maxPending {
		for name, e := range p.entries {
			if !now.Before(e.expires) {
				delete(p.entries, name)
			}
		}
	}
	if len(p.entries) >= maxPending {
		return "", false
	}
	name = rand.Text()
	p.entries[name] = pendingEntry[T]{value: value, expires: now.Add(p.lifetime)}
	return name, true
}

// take removes and returns the value if ready agrees that its time has come;
// found is false for a name that is unknown or expired.
func (p *pending[T]) take(name string, ready func(T) bool) (value T, taken, found bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e, found := p.entries[name]
	if !found || !p.now().Before(e.expires) {
		delete(p.entries, name)
		return value, false, false
	}
	if !ready(e.value) {
		return e.value, false, true
	}
	delete(p.entries, name)
	return e.value, true, true
}

// update changes every live entry for which change returns true and says
// whether there was one.
func (p *pending[T]) update(change func(*T) bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	changed := false
	for name, e := range p.entries {
		if p.now().Before(e.expires) && change(&e.value) {
			p.entries[name] = e
			changed = true
		}
	}
	return changed
}
