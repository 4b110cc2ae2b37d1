package ceremony

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

// pinTokens are two tokens with their PINs, which a ceremony opens and changes.
type pinTokens struct {
	t      testing.TB
	tokens map[string]hsmtest.SoftHSMToken
	pins   map[string][]byte // what people have on paper
	next   map[string][]byte
	// cutOff, when it is not nil, is asked before and after each C_SetPIN.
	cutOff  func(after bool) error
	changed []bool // what each finished change returned
}

func newPINTokens(t testing.TB) *pinTokens {
	t.Helper()
	p := &pinTokens{t: t, tokens: map[string]hsmtest.SoftHSMToken{}, pins: map[string][]byte{}, next: map[string][]byte{}}
	for _, name := range []string{DemoRootToken, DemoOnlineToken} {
		p.tokens[name] = hsmtest.NewSoftHSM(t)
		p.pins[name], p.next[name] = p.tokens[name].PIN, []byte("the-next-pin-of-"+name)
	}
	return p
}

func (p *pinTokens) open(ctx context.Context, name string) (hsm.Token, error) {
	tok, err := pkcs11.Open(ctx, pkcs11.Config{Module: p.tokens[name].Module, URI: p.tokens[name].URI, PIN: p.pins[name]})
	if err != nil {
		return nil, err
	}
	return tok, nil
}

func (p *pinTokens) change(ctx context.Context, name string, begun bool) (bool, error) {
	if p.cutOff != nil {
		if err := p.cutOff(false); err != nil {
			return false, err
		}
	}
	already, err := pkcs11.ChangePIN(ctx, pkcs11.PINChange{
		Module: p.tokens[name].Module, URI: p.tokens[name].URI, Old: p.pins[name], New: p.next[name], Begun: begun,
	})
	if err == nil && p.cutOff != nil {
		err = p.cutOff(true)
	}
	if err == nil {
		p.changed = append(p.changed, already)
	}
	return already, err
}

func (p *pinTokens) options(t testing.TB) Options {
	return Options{Open: p.open, ChangePIN: p.change, Dir: filepath.Join(memoryFolder(t), "out"), Now: fixedClock, Resume: true}
}

// pinDefinition has the root's PIN changed.
func pinDefinition(t testing.TB) *Definition {
	t.Helper()
	source := string(demoDefinition(t).Source())
	changed := strings.Replace(source, `token=root"`, `token=root", change-pin: true`, 1)
	if changed == source {
		t.Fatal("the definition has no root token")
	}
	d, err := ParseDefinition([]byte(changed))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// check wants the new PIN in the root token and the old one in the other, no PIN
// in any output, and a ceremony that verifies.
func (p *pinTokens) check(t *testing.T, dir string) {
	t.Helper()
	if err := Verify(dir).Err(); err != nil {
		t.Error(err)
	}
	p.pins[DemoRootToken] = p.next[DemoRootToken]
	for name := range p.tokens {
		tok, err := p.open(t.Context(), name)
		if err != nil {
			t.Errorf("token %s: %v", name, err)
			continue
		}
		if err := tok.Close(); err != nil {
			t.Error(err)
		}
	}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		for name, token := range p.tokens {
			if bytes.Contains(content, token.PIN) || bytes.Contains(content, p.next[name]) {
				t.Errorf("a PIN of %s is in %s", name, d.Name())
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestChangePIN: the PIN is changed once, whether the ceremony is killed before a
// record, before C_SetPIN, or between it and the record.
func TestChangePIN(t *testing.T) {
	killed := errors.New("killed at C_SetPIN")
	for _, row := range []struct {
		name  string
		after bool // the kill is after C_SetPIN
		kills int
		want  []bool // whether the new PIN was found
	}{
		{"at once", false, 0, []bool{false}},
		{"killed before C_SetPIN", false, 1, []bool{false}},
		{"killed before the record", true, 1, []bool{true}},
		{"killed twice before the record", true, 2, []bool{true}},
	} {
		t.Run(row.name, func(t *testing.T) {
			p := newPINTokens(t)
			kills := 0
			p.cutOff = func(after bool) error {
				if after == row.after && kills < row.kills {
					kills++
					return killed
				}
				return nil
			}
			d, opts := pinDefinition(t), p.options(t)
			for range row.kills {
				if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, killed) {
					t.Fatalf("error %v, want a kill", err)
				}
			}
			if _, err := Rehearse(t.Context(), d, opts); err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(p.changed, row.want) {
				t.Errorf("changes %v, want %v", p.changed, row.want)
			}
			p.check(t, opts.Dir)
		})
	}
	t.Run("killed again and again", func(t *testing.T) {
		p := newPINTokens(t)
		d, opts := pinDefinition(t), p.options(t)
		for kills := 0; ; kills++ {
			opts.Now = killAfter(11 + kills%5)
			_, err := Rehearse(t.Context(), d, opts)
			if err == nil {
				break
			}
			if !errors.Is(err, errKilled) || kills > 60 {
				t.Fatalf("after %d kills: %v", kills, err)
			}
			tear(t, opts.Dir)
		}
		p.check(t, opts.Dir)
	})
}

// TestChangePINRefused: a PIN that the token does not take leaves the ceremony as
// it was, to be resumed with another; and forged records.
func TestChangePINRefused(t *testing.T) {
	p := newPINTokens(t)
	d, opts := pinDefinition(t), p.options(t)
	good := p.next[DemoRootToken]
	p.next[DemoRootToken] = []byte("1")
	if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, hsm.ErrPIN) {
		t.Fatalf("a short PIN: %v, want ErrPIN", err)
	}
	opts.ChangePIN = nil
	if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, hsm.ErrUnsupported) {
		t.Fatalf("nobody to change it: %v, want ErrUnsupported", err)
	}
	p.next[DemoRootToken], opts.ChangePIN = good, p.change
	if _, err := Rehearse(t.Context(), d, opts); err != nil {
		t.Fatal(err)
	}
	p.check(t, opts.Dir)

	records, err := readTranscriptFile(filepath.Join(opts.Dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name     string
		typ      RecordType
		old, new string
	}{
		{"announced for another token", Intent, `"serial":"`, `"serial":"0`},
		{"changed in another token", Done, `"label":"`, `"label":"x`},
		{"changed without a word", Intent, `{"token"`, `{"nothing":1,"token"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			resealedIsRefused(t, d, records, "pin/root", tc.typ, tc.old, tc.new)
		})
	}
	tpm := strings.Replace(string(d.Source()), `"pkcs11:token=root", change-pin`, `"tpm2:?device=/dev/tpmrm0", change-pin`, 1)
	if _, err := ParseDefinition([]byte(tpm)); !errors.Is(err, ErrDefinition) || !strings.Contains(err.Error(), "change-pin") {
		t.Errorf("a TPM: %v, want ErrDefinition", err)
	}
}

// TestAnotherDevice: a token with the label of the one on record gets no PIN
// typed, neither to be opened nor to be changed.
func TestAnotherDevice(t *testing.T) {
	for _, tc := range []struct {
		name  string
		after int // looks at the clock, or 0: at the PIN
	}{
		{"to make keys", 24},
		{"to change its PIN", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPINTokens(t)
			d, opts := pinDefinition(t), p.options(t)
			killed := errors.New("cut off")
			if tc.after > 0 {
				opts.Now, killed = killAfter(tc.after), errKilled
			} else {
				p.cutOff = func(bool) error { return killed }
			}
			if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, killed) {
				t.Fatalf("error %v, want %v", err, killed)
			}
			asked := 0
			swapped := opts
			swapped.Now = fixedClock
			swapped.Inspect = func(_ context.Context, name string) (hsm.Inspection, error) {
				return hsm.Inspection{Token: hsm.TokenInfo{Label: name, Serial: "of another"}}, nil
			}
			swapped.Open = func(context.Context, string) (hsm.Token, error) { asked++; return nil, hsm.ErrPIN }
			swapped.ChangePIN = func(context.Context, string, bool) (bool, error) { asked++; return false, hsm.ErrPIN }
			if _, err := Rehearse(t.Context(), d, swapped); !errors.Is(err, hsm.ErrMismatch) || asked != 0 {
				t.Errorf("another device: %v, and %d PINs asked for; want ErrMismatch and none", err, asked)
			}
			swapped.Inspect, swapped.Open, p.cutOff = nil, func(ctx context.Context, name string) (hsm.Token, error) {
				if name == DemoRootToken {
					name = DemoOnlineToken
				} else {
					name = DemoRootToken
				}
				return p.open(ctx, name)
			}, nil
			if tc.after > 0 { // one that is seen when it is open
				if _, err := Rehearse(t.Context(), d, swapped); !errors.Is(err, hsm.ErrMismatch) {
					t.Errorf("the other token was opened: %v, want ErrMismatch", err)
				}
			}
			opts.Now = fixedClock
			if _, err := Rehearse(t.Context(), d, opts); err != nil {
				t.Fatal(err)
			}
			p.check(t, opts.Dir)
		})
	}
}

// TestAbortAfterPIN: who ends a ceremony in which a PIN may have been changed is
// told to keep both; before, there is nothing to say.
func TestAbortAfterPIN(t *testing.T) {
	killed := errors.New("killed at C_SetPIN")
	for _, tc := range []struct {
		name   string
		cutOff func(bool) error
		want   []Fact
	}{
		{"after C_SetPIN", func(after bool) error {
			if after {
				return killed
			}
			return nil
		}, []Fact{{"PIN", "token root has its new PIN, or still the one before: keep both"}}},
		{"before it was announced", nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPINTokens(t)
			p.cutOff = tc.cutOff
			d, opts := pinDefinition(t), p.options(t)
			if tc.cutOff == nil {
				opts.Now, killed = killAfter(24), errKilled
			}
			if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, killed) {
				t.Fatalf("error %v, want %v", err, killed)
			}
			people := &scripted{}
			opts.Now, opts.People = fixedClock, people
			if err := Abort(t.Context(), d, opts, "w1", "enough"); err != nil {
				t.Fatal(err)
			}
			if len(people.asked) == 0 || !slices.Equal(people.asked[0].Facts, tc.want) {
				t.Errorf("asked %+v, want first with facts %v", people.asked, tc.want)
			}
		})
	}
}

// TestPINSteps: where a PIN is changed, and what the plan says of it.
func TestPINSteps(t *testing.T) {
	pinSteps := func(d *Definition) (found []Step) {
		t.Helper()
		steps, err := Plan(d)
		if err != nil {
			t.Fatal(err)
		}
		outputs := slices.IndexFunc(steps, func(s Step) bool { return s.Kind == StepOutputs })
		checkpoint := slices.IndexFunc(steps, func(s Step) bool { return s.Kind == StepCheckpoint })
		for i, s := range steps {
			if s.Kind != StepPIN {
				continue
			}
			if i < outputs || i > checkpoint {
				t.Errorf("%s is step %d, want it between %d and %d", s.ID, i, outputs, checkpoint)
			}
			found = append(found, s)
		}
		return found
	}
	if got := pinSteps(demoDefinition(t)); len(got) != 0 {
		t.Errorf("%d PINs are changed, want none", len(got))
	}
	source := strings.Replace(string(pinDefinition(t).Source()), "change-pin: true", "change-pin: true, pin-parts: 2", 1)
	d, err := ParseDefinition([]byte(source))
	if err != nil {
		t.Fatal(err)
	}
	if got := pinSteps(d); len(got) != 1 || got[0].ID != "pin/root" || !slices.Contains(got[0].Details, "in 2 parts, each by another person") {
		t.Errorf("steps %+v, want pin/root in 2 parts", got)
	}
	two := strings.NewReplacer(`token=root", `, `token=root", machine: offline, `, `token=online", `, `token=online", machine: online, change-pin: true, `).Replace(source)
	if d, err = ParseDefinition([]byte(two)); err != nil {
		t.Fatal(err)
	}
	for machine, want := range map[Machine]string{Offline: "pin/root", Online: "pin/online"} {
		part, err := d.On(machine)
		if err != nil {
			t.Fatal(err)
		}
		if got := pinSteps(part); len(got) != 1 || got[0].ID != want {
			t.Errorf("on the %s machine %+v, want %s alone", machine, got, want)
		}
	}
}
