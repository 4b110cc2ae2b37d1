package identity

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// ErrUsed: the token was used as often, or for as many keys, as its issuer's
// configuration allows.
var ErrUsed = errors.New("identity token used too often")

// TokenUse names a token without containing it, and says how often it may be
// used.
type TokenUse struct {
	// ID is the SHA-256 of what the issuer signed: the token without its
	// signature. Whoever has a token can write the signature in other ways
	// that verify too (ECDSA: s and its negative), and would have a new token.
	ID [sha256.Size]byte
	// Expires is when the token does.
	Expires time.Time
	// MaxUses and MaxKeys are the issuer's limits, 0 without.
	MaxUses, MaxKeys int
}

// use says how the token may be used.
func (t *token) use(i Issuer) TokenUse {
	expires, _ := t.claims.time("exp")
	return TokenUse{ID: sha256.Sum256([]byte(t.signed)), Expires: expires, MaxUses: i.MaxUses, MaxKeys: i.MaxKeys}
}

// Uses counts the uses of tokens until they expire, so that a token that was
// stolen is worth little, and so that its second use can be seen. It is safe for
// concurrent use. It forgets at a restart: a limit is then counted afresh.
type Uses struct {
	most int

	mu     sync.Mutex
	tokens map[[sha256.Size]byte]*useCount // guarded by mu
	swept  time.Time                       // when expired ones were last removed; guarded by mu
}

// useCount is what is remembered of one token.
type useCount struct {
	uses    int
	keys    [][sha256.Size]byte // those it was used for, if they are limited
	expires time.Time
}

// sweepEvery is how often expired tokens are removed.
const sweepEvery = time.Minute

// NewUses makes a memory of at most so many tokens (about 150 octets each).
func NewUses(most int) *Uses {
	return &Uses{most: most, tokens: map[[sha256.Size]byte]*useCount{}}
}

// Count notes that the token is used for the public key with this SPKI hash
// and says how often it was used so far, this use included. It is 0 when the
// memory is full and the token without limits. Errors: ErrUsed; ErrUnavailable
// when the memory is full and the token has a limit.
func (u *Uses) Count(t TokenUse, spki [sha256.Size]byte, now time.Time) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.sweep(now)
	c, known := u.tokens[t.ID]
	if !known {
		if len(u.tokens) >= u.most {
			if t.MaxUses > 0 || t.MaxKeys > 0 {
				return 0, fmt.Errorf("%w: the memory of used tokens is full", ErrUnavailable)
			}
			return 0, nil
		}
		c = &useCount{expires: t.Expires}
		u.tokens[t.ID] = c
	}
	if t.MaxUses > 0 && c.uses >= t.MaxUses {
		return c.uses, fmt.Errorf("%w: %d times", ErrUsed, c.uses)
	}
	if t.MaxKeys > 0 && !slices.Contains(c.keys, spki) {
		if len(c.keys) >= t.MaxKeys {
			return c.uses, fmt.Errorf("%w: for %d keys", ErrUsed, len(c.keys))
		}
		c.keys = append(c.keys, spki)
	}
	c.uses++
	return c.uses, nil
}

// Undo takes one use back, of which nothing came: the client may try again
// with the same key.
func (u *Uses) Undo(t TokenUse) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if c, ok := u.tokens[t.ID]; ok && c.uses > 0 {
		c.uses--
	}
}

// sweep removes expired tokens, now and then. The caller holds mu.
func (u *Uses) sweep(now time.Time) {
	if now.Sub(u.swept) < sweepEvery && len(u.tokens) < u.most {
		return
	}
	if len(u.tokens) >= u.most && now.Sub(u.swept) < time.Second {
		return // full of living ones: not at every call
	}
	u.swept = now
	for id, c := range u.tokens {
		if !c.expires.After(now) {
			delete(u.tokens, id)
		}
	}
}
