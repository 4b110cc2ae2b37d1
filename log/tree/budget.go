package tree

import "sync"

// Answer is what one answer of a Budget takes before its size is known.
const Answer = 256 << 10

// Budget bounds the octets of answers that a front end holds in memory while
// clients take them: who asks for much at once and reads slowly, on many streams
// of one connection, holds no more than that. It is safe for concurrent use.
type Budget struct {
	max int

	mu   sync.Mutex
	used int // guarded by mu
}

// NewBudget returns a Budget of at most so many octets at once. An answer that is
// larger is alone.
func NewBudget(octets int) *Budget { return &Budget{max: octets} }

// Serve calls read, and write with what it returned. It returns ErrBusy, before
// or instead of write, when there is no room.
func (b *Budget) Serve(read func() ([]byte, error), write func([]byte) error) error {
	held := 0
	defer func() { b.resize(&held, 0) }()
	if !b.resize(&held, Answer) {
		return ErrBusy
	}
	data, err := read()
	if err != nil {
		return err
	}
	if !b.resize(&held, len(data)) {
		return ErrBusy
	}
	return write(data)
}

// resize makes what an answer holds n octets, unless there is no room.
func (b *Budget) resize(held *int, n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	others := b.used - *held
	if n > *held && others > 0 && others+n > b.max {
		return false
	}
	b.used, *held = others+n, n
	return true
}
