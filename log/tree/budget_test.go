package tree

import (
	"bytes"
	"errors"
	"testing"
)

func TestBudget(t *testing.T) {
	const most = 4 * Answer
	b := NewBudget(most)
	octets := func(n int) func() ([]byte, error) {
		return func() ([]byte, error) { return bytes.Repeat([]byte{7}, n), nil }
	}
	none := func([]byte) error { return nil }
	// serve holds answers of these sizes, one in the other, and tries one more.
	var serve func(sizes []int, then func() error) error
	serve = func(sizes []int, then func() error) error {
		if len(sizes) == 0 {
			return then()
		}
		return b.Serve(octets(sizes[0]), func([]byte) error { return serve(sizes[1:], then) })
	}
	broken := errors.New("broken")
	for _, tc := range []struct {
		name  string
		held  []int
		read  func() ([]byte, error)
		write func([]byte) error
		want  error
	}{
		{"the first", nil, octets(10), none, nil},
		{"small ones", []int{10, 10, 10, 10, 10, 10}, octets(10), none, nil},
		{"as many as fit", []int{Answer, Answer, Answer}, octets(Answer), none, nil},
		{"no room to begin", []int{Answer, Answer, Answer, 1}, octets(1), none, ErrBusy},
		{"no room for its size", []int{Answer, Answer}, octets(2*Answer + 1), none, ErrBusy},
		{"larger than all, alone", nil, octets(2 * most), none, nil},
		{"beside one that is larger than all", []int{2 * most}, octets(1), none, ErrBusy},
		{"read fails", nil, func() ([]byte, error) { return nil, broken }, none, broken},
		{"write fails", nil, octets(1), func([]byte) error { return broken }, broken},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := serve(tc.held, func() error { return b.Serve(tc.read, tc.write) }); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
			if b.used != 0 {
				t.Errorf("%d octets are held by nobody", b.used)
			}
		})
	}
}
