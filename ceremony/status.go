package ceremony

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/goccy/go-yaml"
)

// ErrNotBegun: the ceremony was interrupted before its first record. Nothing
// was done: it begins again, in the same folder, with Run or Rehearse.
var ErrNotBegun = errors.New("nothing was recorded yet")

// OpenFolder reads the definition of the ceremony whose outputs are in dir, in
// the environment in which the ceremony runs. Errors: ErrNotBegun,
// ErrDefinition, ErrTranscript.
func OpenFolder(dir string) (*Definition, error) {
	def, _, err := openFolder(dir)
	return def, err
}

func openFolder(dir string) (*Definition, []Record, error) {
	source, err := readBounded(filepath.Join(dir, definitionName), MaxDefinition)
	if err != nil {
		_, transcript := os.Lstat(filepath.Join(dir, TranscriptName))
		if errors.Is(err, fs.ErrNotExist) && errors.Is(transcript, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", ErrNotBegun, err)
		}
		return nil, nil, fmt.Errorf("read definition: %w", err)
	}
	def, err := ParseDefinition(source)
	if err != nil {
		return nil, nil, err
	}
	records, err := readTranscriptFile(filepath.Join(dir, TranscriptName))
	switch {
	case errors.Is(err, errEmpty), errors.Is(err, fs.ErrNotExist) && checkFresh(dir, def) == nil:
		return nil, nil, ErrNotBegun
	case err != nil && !errors.Is(err, ErrTorn):
		return nil, nil, err
	}
	def, err = environmentOf(def, records)
	return def, records, err
}

// Status says how far a ceremony is.
type Status struct {
	ID          string      `json:"id"`
	Kind        Kind        `json:"kind"`
	Environment Environment `json:"environment"`
	// Machine is the side of an exchange of bundles that this is, "" if there is
	// none. The online machine exports first.
	Machine Machine `json:"machine,omitempty"`
	// Steps are the plan, of which the first Done are over.
	Steps   []Step `json:"steps"`
	Done    int    `json:"done"`
	Records int    `json:"records"`
	// Began and Last are the times of the first and the last record.
	Began time.Time `json:"began"`
	Last  time.Time `json:"last"`
	Head  Hash      `json:"head"`
	// Ending is "" for a ceremony that is not over.
	Ending Ending `json:"ending,omitempty"`
	// Quarantined is the key that is not what was announced, or "".
	Quarantined string `json:"quarantined,omitempty"`
	// Keys and Certificates are those that were made.
	Keys         []string `json:"keys"`
	Certificates []string `json:"certificates"`
	// Signed are the witnesses who signed, Waiting those who are expected to,
	// when everything else is done.
	Signed  []string `json:"signed"`
	Waiting []string `json:"waiting"`
}

// Hash is a SHA-256, in JSON hexadecimal.
type Hash [32]byte

// MarshalText gives 64 hexadecimal digits.
func (h Hash) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h[:])), nil }

// ReadStatus reads and checks what is in the output folder dir of a ceremony,
// finished or not. It needs no token and changes nothing.
func ReadStatus(dir string) (Status, error) {
	def, records, err := openFolder(dir)
	if err != nil {
		return Status{}, err
	}
	steps, err := Plan(def)
	if err != nil {
		return Status{}, err
	}
	f := newFacts(def, steps)
	if err := f.replay(records); err != nil {
		return Status{}, err
	}
	signed, _ := f.signatures()
	s := Status{
		ID: def.ID, Kind: def.Kind, Environment: def.Environment, Machine: def.side(), Steps: f.plan, Done: f.next,
		Records: len(records), Head: f.head, Ending: f.status, Quarantined: f.quarantined,
		Keys: sorted(f.keys), Certificates: sorted(f.certs), Signed: signed, Waiting: []string{},
		Began: records[0].Time, Last: records[len(records)-1].Time,
	}
	if f.next < len(f.plan) && f.plan[f.next].Kind == StepWitnesses {
		for _, p := range f.expected() {
			if _, ok := f.answers[p.ID]; !ok {
				s.Waiting = append(s.Waiting, p.label())
			}
		}
	}
	return s, nil
}

// Sign records the answer of a witness to a ceremony that waits for it: the
// file with their signature of the checkpoint or, if decline is not "", why
// there is none. It needs no token. When all witnesses have answered the
// ceremony is closed. Errors: ErrUnfinished (recorded; others have not
// answered), ErrEnded (nobody waits for this person), ErrAnswer, and those of
// Run.
func Sign(ctx context.Context, def *Definition, opts Options, person, signature, decline string) error {
	state, err := ReadStatus(opts.Dir)
	if err != nil {
		return err
	}
	p := def.person(person)
	waits := false
	for _, label := range state.Waiting {
		waits = waits || p.ID != "" && label == p.label()
	}
	if !waits {
		return fmt.Errorf("sign: nobody waits for %.40q: %w", person, ErrEnded)
	}
	answer := signature
	if decline != "" {
		answer = declinePrefix + " " + decline
	}
	opts.Resume = true
	opts.People = &Prepared{Answers: map[string]string{string(StepWitnesses) + ":" + person: answer}, Next: absentees{}}
	_, err = Run(ctx, def, opts)
	return err
}

// absentees sign later, and see what was wrong with an answer as an error.
type absentees struct{}

// Show makes an error of a warning, which nobody is there to read.
func (absentees) Show(_ context.Context, n Notice) error {
	if n.Warning {
		return fmt.Errorf("%s: %w", n.Title, ErrAnswer)
	}
	return nil
}

// Ask puts off what is asked of those who are not there.
func (absentees) Ask(context.Context, Question) (string, error) { return later, nil }

// maxAnswers bounds an answers file, in questions.
const maxAnswers = 1000

// ParseAnswers reads an answers file: one strict YAML map from the ids of
// questions to answers. Errors: ErrDefinition.
func ParseAnswers(content []byte) (map[string]string, error) {
	if len(content) > MaxDefinition {
		return nil, fmt.Errorf("answers: %w: more than %d octets", ErrDefinition, MaxDefinition)
	}
	if err := checkPlainYAML(content); err != nil {
		return nil, fmt.Errorf("answers: %w", err)
	}
	var answers map[string]string
	if err := yaml.UnmarshalWithOptions(content, &answers, yaml.Strict()); err != nil {
		return nil, fmt.Errorf("answers: %w: %s", ErrDefinition, yamlError(err))
	}
	if len(answers) > maxAnswers {
		return nil, fmt.Errorf("answers: %w: more than %d", ErrDefinition, maxAnswers)
	}
	return answers, nil
}
