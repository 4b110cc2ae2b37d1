package service

import (
	"errors"
	"fmt"
	"testing"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/ct"
	"github.com/chancery-ca/chancery/log/tree"
)

func TestPassing(t *testing.T) {
	tests := []struct {
		name              string
		err               error
		busy, unavailable bool
	}{
		{"none", nil, false, false},
		{"queue of the log full", fmt.Errorf("append: %w", tree.ErrBusy), true, false},
		{"queue of the token full", fmt.Errorf("sign SCT: %w: %w", ct.ErrUnavailable, hsm.ErrBusy), false, true},
		{"clock", fmt.Errorf("read clock: %w", ct.ErrUnavailable), false, true},
		{"shutting down", fmt.Errorf("append: %w", tree.ErrClosed), false, true},
		{"disk", fmt.Errorf("append: %w", tree.ErrStorage), false, true},
		{"conflict", ct.ErrConflict, false, false},
		{"damaged", tree.ErrCorrupt, false, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := passing(test.err)
			if errors.Is(got, ca.ErrBusy) != test.busy || errors.Is(got, ca.ErrUnavailable) != test.unavailable {
				t.Errorf("passing(%v) = %v", test.err, got)
			}
			if !errors.Is(got, test.err) {
				t.Errorf("passing(%v) = %v loses the error", test.err, got)
			}
		})
	}
}
