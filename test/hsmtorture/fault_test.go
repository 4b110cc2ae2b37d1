package hsmtorture

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	p11 "github.com/miekg/pkcs11"
)

// class is what a return value is about, as hsm/pkcs11 documents it.
type class string

const (
	lost    class = "lost"
	fatal   class = "fatal"
	callers class = "caller's"
	busy    class = "busy"
	unknown class = "unknown"
)

// classes in the order of the table.
var classes = []class{lost, fatal, callers, busy, unknown}

// codes are the return values that are injected into every call.
var codes = map[class][]uint{
	lost:    {p11.CKR_DEVICE_ERROR, p11.CKR_SESSION_HANDLE_INVALID, p11.CKR_GENERAL_ERROR, p11.CKR_USER_NOT_LOGGED_IN},
	fatal:   {p11.CKR_PIN_INCORRECT, p11.CKR_PIN_LOCKED, p11.CKR_PIN_EXPIRED},
	callers: {p11.CKR_FUNCTION_FAILED, p11.CKR_MECHANISM_INVALID, p11.CKR_ATTRIBUTE_TYPE_INVALID},
	busy:    {p11.CKR_DEVICE_MEMORY, p11.CKR_SESSION_COUNT},
	unknown: {0x80000001, 0x1FF},
}

// more are return values that are injected into signing alone.
var more = map[class][]uint{
	lost: {
		p11.CKR_SLOT_ID_INVALID, p11.CKR_DEVICE_REMOVED, p11.CKR_KEY_HANDLE_INVALID, p11.CKR_OBJECT_HANDLE_INVALID,
		p11.CKR_OPERATION_ACTIVE, p11.CKR_OPERATION_NOT_INITIALIZED, p11.CKR_SESSION_CLOSED, p11.CKR_TOKEN_NOT_PRESENT,
		p11.CKR_TOKEN_NOT_RECOGNIZED, p11.CKR_CRYPTOKI_NOT_INITIALIZED,
	},
	fatal: {
		p11.CKR_PIN_INVALID, p11.CKR_PIN_LEN_RANGE, p11.CKR_USER_ALREADY_LOGGED_IN, p11.CKR_USER_PIN_NOT_INITIALIZED,
		p11.CKR_USER_TYPE_INVALID, p11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN, p11.CKR_USER_TOO_MANY_TYPES,
	},
	callers: {
		p11.CKR_ARGUMENTS_BAD, p11.CKR_ATTRIBUTE_READ_ONLY, p11.CKR_ATTRIBUTE_SENSITIVE, p11.CKR_ATTRIBUTE_VALUE_INVALID,
		p11.CKR_DATA_INVALID, p11.CKR_DATA_LEN_RANGE, p11.CKR_FUNCTION_CANCELED, p11.CKR_FUNCTION_NOT_SUPPORTED,
		p11.CKR_KEY_SIZE_RANGE, p11.CKR_KEY_TYPE_INCONSISTENT, p11.CKR_KEY_FUNCTION_NOT_PERMITTED, p11.CKR_KEY_UNEXTRACTABLE,
		p11.CKR_MECHANISM_PARAM_INVALID, p11.CKR_SESSION_READ_ONLY, p11.CKR_SIGNATURE_INVALID, p11.CKR_TEMPLATE_INCOMPLETE,
		p11.CKR_TEMPLATE_INCONSISTENT, p11.CKR_TOKEN_WRITE_PROTECTED, p11.CKR_RANDOM_NO_RNG, p11.CKR_BUFFER_TOO_SMALL,
		p11.CKR_CRYPTOKI_ALREADY_INITIALIZED, 0x1B, // CKR_ACTION_PROHIBITED
	},
	busy: {p11.CKR_HOST_MEMORY},
}

// classOf returns the class of a code.
func classOf(code uint) class {
	for c := range codes {
		if slices.Contains(codes[c], code) || slices.Contains(more[c], code) {
			return c
		}
	}
	return unknown
}

// fault is one that is injected now. The nil fault is none.
type fault struct {
	phase, call, kind string
	code              uint    // what a call returns, 0 for a fault of another kind
	also              []error // errors that are documented for it, beyond ErrBusy and ErrLost
}

func (f *fault) String() string {
	if f == nil {
		return "no fault"
	}
	return fmt.Sprintf("%s, %s, %s %#x", f.phase, f.call, f.kind, f.code)
}

// allows says whether a caller may get err while f is injected.
func (f *fault) allows(err error) bool {
	if errors.Is(err, hsm.ErrBusy) || errors.Is(err, hsm.ErrLost) {
		return true
	}
	if f == nil {
		return false
	}
	if f.code != 0 && errors.Is(err, p11.Error(f.code)) {
		return true
	}
	return slices.ContainsFunc(f.also, func(also error) bool { return errors.Is(err, also) })
}

// report counts what was injected and what came of it.
type report struct {
	mu    sync.Mutex
	rows  map[string]*row
	total int
	given atomic.Int64   // signatures that callers of the load got
	all   map[string]int // errors that callers of the load got
}

// row is one line: a kind of fault in a call in a phase.
type row struct {
	phase, call, kind string
	faults            int
	sentinels         map[string]int
	longest           time.Duration // recovery
}

func newReport() *report { return &report{rows: map[string]*row{}, all: map[string]int{}} }

func (p *report) row(f *fault) *row {
	name := f.phase + "|" + f.call + "|" + f.kind
	if p.rows[name] == nil {
		p.rows[name] = &row{phase: f.phase, call: f.call, kind: f.kind, sentinels: map[string]int{}}
	}
	return p.rows[name]
}

// saw counts what a caller got.
func (p *report) saw(f *fault, err error) {
	if err == nil {
		p.given.Add(1)
	}
	if err == nil || errors.Is(err, errClosed) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all[sentinel(err)]++
	if f == nil {
		return
	}
	p.row(f).sentinels[sentinel(err)]++
}

// count says how often callers got an error of this name.
func (p *report) count(name string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.all[name]
}

// injected counts a fault and how long the recovery took.
func (p *report) injected(f *fault, recovery time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.total++
	r := p.row(f)
	r.faults++
	r.longest = max(r.longest, recovery)
}

// sentinel names what an error is, the more telling first.
func sentinel(err error) string {
	for _, s := range []struct {
		err  error
		name string
	}{
		{hsm.ErrBadSignature, "ErrBadSignature"}, {hsm.ErrWedged, "ErrWedged"}, {hsm.ErrPIN, "ErrPIN"}, {hsm.ErrLost, "ErrLost"},
		{hsm.ErrBusy, "ErrBusy"}, {hsm.ErrUnsupported, "ErrUnsupported"}, {hsm.ErrNotFound, "ErrNotFound"}, {hsm.ErrPolicy, "ErrPolicy"},
	} {
		if errors.Is(err, s.err) {
			return s.name
		}
	}
	return "its code"
}

// print writes the table.
func (p *report) print(t *testing.T, l *ledger) {
	p.mu.Lock()
	defer p.mu.Unlock()
	rows := make([]*row, 0, len(p.rows))
	for _, r := range p.rows {
		rows = append(rows, r)
	}
	slices.SortFunc(rows, func(a, b *row) int {
		return cmp.Or(cmp.Compare(a.phase, b.phase), cmp.Compare(a.call, b.call), cmp.Compare(a.kind, b.kind))
	})
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "phase\tcall\tfault\tinjected\tlongest recovery\tcallers got, besides signatures")
	for _, r := range rows {
		var got []string
		for name, n := range r.sentinels {
			got = append(got, fmt.Sprintf("%s %d", name, n))
		}
		slices.Sort(got)
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\n", r.phase, r.call, r.kind, r.faults, r.longest.Round(time.Millisecond), strings.Join(got, ", "))
	}
	_ = w.Flush()
	t.Logf("\n%s%d faults; %d signatures made: %d given and verified, %d for calls that ended with an error, %d self-tests",
		text.String(), p.total, l.made, l.given, l.inFlight, l.selfTest)
}
