package head

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/tree"
)

// Epochs tie the anchor to a counter in hardware that only goes up, so that an
// old anchor with the old database that fits it cannot be put back.
//
// Every record carries the number of its epoch, which is the counter's value,
// and how the epoch began: the head that was the last one then, signed by the
// head key together with the number. A record with another number than the
// counter's is refused, and so is one whose head is older than its epoch's
// beginning: a number that was written over has no signature.
//
// A new epoch begins in three steps, in this order:
//
//  1. its beginning is signed,
//  2. the last head is stored again, with the number c+1: one anchor write,
//  3. the counter advances from c to c+1.
//
// A crash before step 2 leaves epoch c. A crash between 2 and 3 leaves a record
// one ahead of the counter, which the next start recognises by its signature
// and finishes. Heads go on between 2 and 3, with the number c+1; only a next
// epoch waits for step 3. The counter is asked in a goroutine of its own, never
// by the one that signs heads, and a counter that is lost delays nothing.
//
// An epoch begins EpochInterval after the one before if the tree has grown in
// it, when a Publisher closes if the tree has grown, and at once after a new
// anchor and after an operator's act. It does not begin because a process
// starts, so a crash loop costs the counter nothing. A counter is written at
// most 3600/900 = 4 times an hour, and once for each clean shutdown after which
// something was logged: 35,040 times in a year of uninterrupted writing, and
// not at all while nothing is logged.
//
// What remains possible is to go back within one epoch: to at most
// EpochInterval of heads, more while the counter is out of reach (CounterErr).

// Counter is a counter in hardware that only goes up, of one log alone: two
// logs, or two copies of a log, that share one stop each other. Its calls
// return when their context ends. hsm/tpm has one in a TPM's NV memory.
type Counter interface {
	// Value reads the counter.
	Value(ctx context.Context) (uint64, error)
	// Advance adds one, durably, and returns the new value. After an error it
	// may have been done or not.
	Advance(ctx context.Context) (uint64, error)
}

// ErrEpoch: the anchor's epoch is not the hardware counter's. It comes with
// ErrFork: the log is latched.
var ErrEpoch = errors.New("anchor and hardware counter disagree")

const (
	// DefaultEpochInterval is how long heads share an epoch. A year of writing
	// advances the counter 35,040 times.
	DefaultEpochInterval = 15 * time.Minute

	counterTimeout    = 5 * time.Second // of reading and advancing together
	firstCounterPause = time.Second     // after a failure, doubling
	lastCounterPause  = time.Minute
	// turnPatience is how long an epoch that is due waits for a moment in which
	// no head is due.
	turnPatience = 10 * time.Second
)

// EpochStart is how an epoch began: after which head, and when.
type EpochStart struct {
	// Head has the size and root of the last head before, and the time when the
	// epoch began.
	Head
	// Signature is the head key's, DER ECDSA over SHA-256 of the message. It is
	// empty in an anchor that is new and after AcceptLoss and AcceptEpoch.
	Signature []byte
}

// message is what is signed about the beginning of an epoch:
//
//	 0  0xff "CHANEPOCH" NUL NUL NUL NUL NUL NUL
//	16  epoch, 8 octets
//	24  tree size, 8 octets
//	32  root, 32 octets
//	64  time, 8 octets: milliseconds since 1970
//
// No other message that a head key signs begins with 0xff: a checkpoint is
// UTF-8, a structure of RFC 6962 begins with its version 0, a Rekor SET with a
// brace.
func (s EpochStart) message(epoch uint64) []byte {
	b := make([]byte, 16, 72)
	copy(b, "\xffCHANEPOCH")
	b = binary.BigEndian.AppendUint64(b, epoch)
	b = binary.BigEndian.AppendUint64(b, s.Size)
	b = append(b, s.Root[:]...)
	return binary.BigEndian.AppendUint64(b, uint64(s.Time.UnixMilli()))
}

// CheckEpoch compares a record's epoch with the counter, nil if there is none,
// and its beginning with the record and the head key. behind says that the
// counter is one short: a crash came between the record and the advance, and
// the next Publisher finishes it. It does not look at the tree. Errors: ErrEpoch
// with ErrFork, ErrUnavailable if the counter cannot be read.
func (r Record) CheckEpoch(ctx context.Context, counter Counter, pub *ecdsa.PublicKey) (behind bool, err error) {
	switch {
	case counter == nil && r.Epoch == 0:
		return false, nil
	case counter == nil:
		return false, epochError("the anchor is bound to a hardware counter (epoch %d) and none is configured: configure it, or give it up with chancery log accept-loss", r.Epoch)
	case r.Epoch == 0:
		return false, epochError("a hardware counter is configured but the anchor is not bound to it: bind it with chancery log accept-loss, or take the counter out of the configuration")
	}
	value, err := counter.Value(ctx)
	if err != nil {
		return false, fmt.Errorf("read counter: %w: %w", err, ErrUnavailable)
	}
	signed := len(r.Start.Signature) > 0
	switch {
	case r.Epoch < value:
		return false, epochError("the anchor is of epoch %d and the hardware counter at %d: an old anchor was put back, or the counter is used by another log. Put the newest anchor and database in place; if there are none, chancery log accept-loss", r.Epoch, value)
	case r.Epoch > value+1, r.Epoch > value && !signed:
		return false, epochError("the anchor is of epoch %d and the hardware counter only at %d: it is not the counter that this log had. Configure the right one; if it is gone, chancery log accept-loss", r.Epoch, value)
	case !signed:
		return false, nil
	}
	if digest := sha256.Sum256(r.Start.message(r.Epoch)); !ecdsa.VerifyASN1(pub, digest[:], r.Start.Signature) {
		return false, epochError("the head key did not sign epoch %d of the anchor: the anchor was changed", r.Epoch)
	}
	if r.Size < r.Start.Size {
		return false, epochError("epoch %d began with %d leaves and the anchored head has %d: the anchor was changed", r.Epoch, r.Start.Size, r.Size)
	}
	return r.Epoch > value, nil
}

func epochError(format string, args ...any) error {
	return fmt.Errorf("%w: %w: %w", fmt.Errorf(format, args...), ErrEpoch, ErrFork)
}

// epochs is the state of a Publisher's counter. It belongs to run, and to Open
// before it.
type epochs struct {
	began time.Time // when last.Epoch began, by this process's clock
	// behind: the counter is one short of last.Epoch.
	behind bool
	// asked: this process has sent an advance to last.Epoch.
	asked   bool
	retry   time.Time // not before this, after a failure
	pause   time.Duration
	advance chan advanced // not nil: a goroutine asks the counter
}

type advanced struct {
	asked bool
	err   error
}

// CounterErr returns why the hardware counter does not follow the epochs, or
// nil: for health. Heads are signed all the same; until it is nil again an old
// anchor of this epoch or the one before could be put back unnoticed.
func (p *Publisher) CounterErr() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counterErr
}

func (p *Publisher) setCounterErr(err error) {
	p.mu.Lock()
	p.counterErr = err
	p.mu.Unlock()
}

// takeEpoch compares the anchored record, which is the one of the tree, with
// the counter.
func (p *Publisher) takeEpoch(ctx context.Context, rec Record) error {
	ctx, cancel := context.WithTimeout(ctx, counterTimeout)
	defer cancel()
	behind, err := rec.CheckEpoch(ctx, p.cfg.Counter, p.pub)
	if err != nil || p.cfg.Counter == nil {
		return err
	}
	p.epoch = epochs{began: time.Now(), behind: behind, pause: firstCounterPause}
	p.epochNow.Store(rec.Epoch)
	if len(rec.Start.Signature) == 0 {
		if rec.Sequence == 0 {
			p.cfg.Logger.Warn("a new anchor is bound to a hardware counter: this log begins now", "epoch", rec.Epoch)
		} else {
			p.cfg.Logger.Error("an operator bound the anchor to a hardware counter: what came before is not proven by it",
				"size", rec.Size, "epoch", rec.Epoch, "sequence", rec.Sequence)
		}
		return nil
	}
	if err := p.extends(ctx, rec.Start.Head, tree.Root{Size: rec.Size, Hash: rec.Root}); err != nil {
		return fmt.Errorf("compare with the beginning of epoch %d: %w", rec.Epoch, err)
	}
	if now, err := p.cfg.Now(); err == nil && now.After(rec.Start.Time) {
		p.epoch.began = p.epoch.began.Add(-now.Sub(rec.Start.Time))
	}
	return nil
}

// epochDue says how long from now the next epoch is to begin, if ever.
func (p *Publisher) epochDue(closing bool) (wait time.Duration, ever bool) {
	if p.cfg.Counter == nil || p.latched.closed.Load() || p.epoch.behind {
		return 0, false
	}
	grown := p.last.Size > p.last.Start.Size
	switch pause := max(0, time.Until(p.epoch.retry)); {
	case len(p.last.Start.Signature) == 0:
		return pause, true
	case grown && closing:
		return 0, true
	case grown:
		return max(pause, time.Until(p.epoch.began.Add(p.cfg.EpochInterval))), true
	}
	return 0, false
}

// epochLate says whether an epoch must begin now although a head is due too.
func (p *Publisher) epochLate() bool {
	return time.Since(p.epoch.began) > p.cfg.EpochInterval+turnPatience
}

// beginEpoch takes steps 1 and 2.
func (p *Publisher) beginEpoch() {
	rec, err := p.signEpoch()
	if err != nil {
		p.counterFailed("epoch not begun", err)
		return
	}
	p.last = rec
	p.epochNow.Store(rec.Epoch)
	p.epoch = epochs{began: time.Now(), behind: true, pause: firstCounterPause}
}

// signEpoch makes the last record that of a new epoch.
func (p *Publisher) signEpoch() (Record, error) {
	at, err := p.time(time.Time{})
	if err != nil {
		return Record{}, err
	}
	rec := p.last
	rec.Sequence++
	rec.Epoch++
	rec.Start = EpochStart{Head: Head{Size: rec.Size, Root: rec.Root, Time: at}}
	digest := sha256.Sum256(rec.Start.message(rec.Epoch))
	if rec.Start.Signature, err = p.ask(p.ctx, digest[:]); err != nil {
		return Record{}, fmt.Errorf("sign epoch: %w", err)
	}
	if !ecdsa.VerifyASN1(p.pub, digest[:], rec.Start.Signature) {
		return Record{}, fmt.Errorf("sign epoch: %w", hsm.ErrBadSignature)
	}
	if err := p.anchor.Store(rec); err != nil {
		return Record{}, fmt.Errorf("anchor epoch: %w", err)
	}
	return rec, nil
}

// counterFailed takes note of a failure and says when to try again.
func (p *Publisher) counterFailed(what string, err error) {
	p.epoch.retry = time.Now().Add(p.epoch.pause)
	p.epoch.pause = min(2*p.epoch.pause, lastCounterPause)
	p.setCounterErr(fmt.Errorf("%s: %w", what, err))
	p.cfg.Logger.Warn("hardware counter does not follow the anchor", "step", what, "epoch", p.last.Epoch, "error", err)
}

// advanceCounter takes step 3 as far as that goes without waiting, and returns
// when to look again, if ever.
func (p *Publisher) advanceCounter() (wait time.Duration, ever bool) {
	select {
	case a := <-p.epoch.advance:
		p.counterAnswered(a)
	default:
	}
	switch {
	case !p.epoch.behind || p.epoch.advance != nil || p.latched.closed.Load():
		return 0, false
	case time.Now().Before(p.epoch.retry):
		return time.Until(p.epoch.retry), true
	}
	p.askCounter()
	return 0, false
}

func (p *Publisher) askCounter() {
	done := make(chan advanced, 1)
	p.epoch.advance = done
	counter, to, asked := p.cfg.Counter, p.last.Epoch, p.epoch.asked
	ctx, cancel := context.WithTimeout(p.ctx, counterTimeout)
	go func() {
		defer cancel()
		done <- advanceTo(ctx, counter, to, asked)
	}()
}

// advanceTo brings counter from to−1 to to. asked says that this was tried
// before, so that the counter may be there already.
func advanceTo(ctx context.Context, counter Counter, to uint64, asked bool) advanced {
	value, err := counter.Value(ctx)
	switch {
	case err != nil:
		return advanced{asked, fmt.Errorf("read counter: %w", err)}
	case value == to && asked:
		return advanced{asked, nil}
	case value != to-1:
		return advanced{asked, foreign(value, to)}
	}
	value, err = counter.Advance(ctx)
	switch {
	case err != nil:
		return advanced{true, fmt.Errorf("advance counter: %w", err)}
	case value != to:
		return advanced{true, foreign(value, to)}
	}
	return advanced{true, nil}
}

func foreign(value, to uint64) error {
	return epochError("the hardware counter is at %d where this log was about to bring it to %d: another log, or another copy of this one, uses it", value, to)
}

// counterAnswered takes the result of askCounter.
func (p *Publisher) counterAnswered(a advanced) {
	p.epoch.advance, p.epoch.asked = nil, a.asked
	switch {
	case errors.Is(a.err, ErrEpoch):
		p.setCounterErr(a.err)
		p.latchOn(p.ctx, a.err, p.cfg.Tree.Root())
	case a.err != nil:
		p.counterFailed("counter not advanced", a.err)
	default:
		p.epoch.behind, p.epoch.retry, p.epoch.pause = false, time.Time{}, firstCounterPause
		p.advances.Add(1)
		p.setCounterErr(nil)
	}
}

// closeEpoch begins the epoch that the next process finds, and waits for the
// counter as long as Close may wait.
func (p *Publisher) closeEpoch() {
	p.settleCounter()
	if wait, ever := p.epochDue(true); !ever || wait > 0 {
		return
	}
	p.beginEpoch()
	p.settleCounter()
}

// settleCounter tries once to bring the counter to the last epoch.
func (p *Publisher) settleCounter() {
	if !p.epoch.behind || p.latched.closed.Load() {
		return
	}
	if p.epoch.advance == nil {
		p.askCounter()
	}
	grace := time.NewTimer(counterTimeout + 100*time.Millisecond)
	defer grace.Stop()
	stop := context.AfterFunc(p.ctx, func() { grace.Reset(100 * time.Millisecond) })
	defer stop()
	select {
	case a := <-p.epoch.advance:
		p.counterAnswered(a)
	case <-grace.C:
		p.counterFailed("counter not advanced", context.DeadlineExceeded)
	}
}
