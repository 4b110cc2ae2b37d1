package hsmtool

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/chancery-ca/chancery/hsm"
)

// MaxSignatures bounds the signatures that one measurement keeps times of.
const MaxSignatures = 5_000_000

// Run is what a number of callers, each waiting for its signature before it asks
// for the next, got from a key. Each signature was verified.
type Run struct {
	Parallel   int           `json:"parallel"`
	Signatures int           `json:"signatures"`
	Took       time.Duration `json:"tookNanoseconds"`
	// Rate is in signatures per second.
	Rate float64 `json:"rate"`
	// P50 and P99 are of the time that one caller waited.
	P50 time.Duration `json:"p50Nanoseconds"`
	P99 time.Duration `json:"p99Nanoseconds"`
}

// measureText is what Measure has signed.
const measureText = "chancery measurement v1\x00"

// Measure lets parallel callers sign for the duration, at least once each. done
// is called after each signature, from any of them; nil means nobody looks. The
// first error ends it and is returned, hsm.ErrBusy too.
func Measure(ctx context.Context, key hsm.Key, parallel int, duration time.Duration, done func()) (Run, error) {
	algorithm, err := hsm.AlgorithmOf(key.Public())
	if err != nil {
		return Run{}, err
	}
	h := algorithm.Hash().New()
	h.Write([]byte(measureText))
	digest := h.Sum(nil)
	if done == nil {
		done = func() {}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	times := make([][]time.Duration, parallel)
	began := time.Now()
	var wg sync.WaitGroup
	for i := range parallel {
		wg.Go(func() {
			for {
				start := time.Now()
				if _, err := key.SignContext(ctx, digest, algorithm.Hash()); err != nil {
					cancel(err) // the first one counts
					return
				}
				times[i] = append(times[i], time.Since(start))
				done()
				if time.Since(began) >= duration || len(times[i]) >= MaxSignatures/parallel {
					return
				}
			}
		})
	}
	wg.Wait()
	if err := context.Cause(ctx); err != nil {
		return Run{}, fmt.Errorf("measure %d at once: %w", parallel, err)
	}
	return summarise(parallel, time.Since(began), slices.Concat(times...)), nil
}

// summarise makes a Run of at least one time.
func summarise(parallel int, took time.Duration, times []time.Duration) Run {
	slices.Sort(times)
	return Run{
		Parallel: parallel, Signatures: len(times), Took: took,
		Rate: float64(len(times)) / took.Seconds(),
		P50:  quantile(times, 50), P99: quantile(times, 99),
	}
}

// quantile returns the smallest of the sorted times that at least percent of
// them do not exceed (the nearest rank).
func quantile(sorted []time.Duration, percent int) time.Duration {
	rank := (len(sorted)*percent + 99) / 100
	return sorted[max(rank, 1)-1]
}

// Tested is what a test of a key found.
type Tested struct {
	Token     string        `json:"token"`
	Role      hsm.Role      `json:"role"`
	URI       string        `json:"uri"`
	SPKI      string        `json:"spkiSHA256"`
	Algorithm hsm.Algorithm `json:"algorithm"`
	// SelfTest is the text that the key signed, Signatures how many signatures
	// of one digest have pairwise different r.
	SelfTest   string `json:"selfTest"`
	Signature  []byte `json:"signature"`
	Signatures int    `json:"distinctR"`
	Run        Run    `json:"run"`
}

// Test proves the key and its randomness (hsm.SelfTest), then measures one
// caller for the duration.
func (t Target) Test(ctx context.Context, key hsm.Key, now time.Time, duration time.Duration) (Tested, error) {
	r := t.tested(key)
	proof, err := hsm.SelfTest(ctx, key, now)
	if err != nil {
		return r, fmt.Errorf("self-test: %w", err)
	}
	r.SelfTest, r.Signature, r.Signatures = proof.Text, proof.Signature, hsm.SelfTestSignatures
	r.Run, err = Measure(ctx, key, 1, duration, nil)
	return r, err
}

// tested names the key.
func (t Target) tested(key hsm.Key) Tested {
	ref := key.Ref()
	algorithm, _ := hsm.AlgorithmOf(key.Public()) // "" of a key that was opened cannot be
	return Tested{Token: t.Place.Name, Role: t.Role, URI: ref.URI, SPKI: hex.EncodeToString(ref.SPKI[:]), Algorithm: algorithm}
}

// Benched is a Run for each number of callers.
type Benched struct {
	Token string   `json:"token"`
	Role  hsm.Role `json:"role"`
	URI   string   `json:"uri"`
	Runs  []Run    `json:"runs"`
}

// The bounds of Bench.
const (
	MaxParallel = 1024
	MaxDuration = time.Hour
)

// ErrBounds: parallel is not 1 to MaxParallel, or a duration not above 0 and at
// most MaxDuration.
var ErrBounds = errors.New("out of bounds")

// CheckBounds refuses what Bench would refuse, before a token is opened.
func CheckBounds(parallel int, duration time.Duration) error {
	if parallel < 1 || parallel > MaxParallel || duration <= 0 || duration > MaxDuration {
		return fmt.Errorf("%w: %d at once for %s: want 1 to %d and at most %s", ErrBounds, parallel, duration, MaxParallel, MaxDuration)
	}
	return nil
}

// Bench measures 1, 2, 4 … and parallel callers, each for an equal part of the
// duration. watch is called before each run and gives the function that is
// called after each signature.
func (t Target) Bench(ctx context.Context, key hsm.Key, parallel int, duration time.Duration, watch func(parallel int) (done func())) (Benched, error) {
	b := Benched{Token: t.Place.Name, Role: t.Role, URI: key.Ref().URI, Runs: []Run{}}
	if err := CheckBounds(parallel, duration); err != nil {
		return b, err
	}
	steps := steps(parallel)
	for _, n := range steps {
		r, err := Measure(ctx, key, n, duration/time.Duration(len(steps)), watch(n))
		if err != nil {
			return b, err
		}
		b.Runs = append(b.Runs, r)
	}
	return b, nil
}

// steps doubles from 1 up to parallel, which comes last.
func steps(parallel int) []int {
	var all []int
	for n := 1; n < parallel; n *= 2 {
		all = append(all, n)
	}
	return append(all, parallel)
}
