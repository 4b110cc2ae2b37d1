package ceremony

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Errors that callers branch on.
var (
	// ErrAnswer: a question was not answered as it must be, however often it
	// was put. Nothing was done; the ceremony can be resumed.
	ErrAnswer = errors.New("no acceptable answer")
	// ErrLive: an answers file answers what a person must say in a production
	// ceremony.
	ErrLive = errors.New("only a person can answer this")
)

// maxAttempts is how often a question is put before the ceremony stops.
const maxAttempts = 5

// maxAnswer bounds an answer, in octets. The longest is an armored signature.
const maxAnswer = 4096

// People is how a ceremony speaks with the people in the room. A ceremony
// calls it from one goroutine. Show and Ask return early, with the context's
// error, when ctx ends.
type People interface {
	// Show tells something that needs no answer.
	Show(ctx context.Context, n Notice) error
	// Ask puts one question and returns what was typed, without its line end.
	// It does not judge the answer.
	Ask(ctx context.Context, q Question) (string, error)
}

// Notice is something that people should know.
type Notice struct {
	// Title is one sentence.
	Title string
	// Facts are shown in order, one under the other.
	Facts []Fact
	// Warning says that the title is one.
	Warning bool
}

// Fact is a named value in a Notice. Text may be long; it is broken at spaces.
type Fact struct{ Name, Text string }

// hashFact is a hash as people compare it: in hexadecimal and in words.
func hashFact(name string, hash [32]byte) []Fact {
	return []Fact{{name, fmt.Sprintf("%x", hash)}, {"in words", Words(hash)}}
}

// Question is one question to one person.
type Question struct {
	// ID names it in an answers file: the step, and after a colon the person.
	ID string
	// Person is who answers: an id of the definition, or "" for anyone.
	Person string
	// Title says in one sentence what will happen after the answer, and Why
	// why it is asked.
	Title, Why string
	// Facts are what the answer is about.
	Facts []Fact
	// Prompt is what to type, without a colon.
	Prompt string
	// Confirmation says that the answer is a decision. In production a person
	// at the terminal makes it; see Live.
	Confirmation bool
	// Live says that the answer must not come from a file. A ceremony sets it.
	Live bool
	// Secret says that the answer must not be shown.
	Secret bool
	// Practice is what an unattended rehearsal answers, "" if it cannot.
	Practice string
	// Check returns nil for an answer that is acceptable, or what is wrong
	// with it, in words for people. nil accepts everything but nothing.
	Check func(answer string) error
}

// ask puts q until its answer is acceptable, at most maxAttempts times.
func (r *run) ask(ctx context.Context, q Question) (string, error) {
	rehearsal := r.def.Environment == Rehearsal
	q.Live = q.Confirmation && !rehearsal
	if !rehearsal {
		q.Practice = ""
	}
	for range maxAttempts {
		answer, err := r.people.Ask(ctx, q)
		if err != nil {
			return "", fmt.Errorf("ask %s: %w", q.ID, err)
		}
		answer = strings.TrimSpace(answer)
		if answer == "" {
			answer = strings.TrimSpace(q.Practice)
		}
		if err = q.accept(answer); err == nil {
			return answer, nil
		}
		if err := r.people.Show(ctx, Notice{Title: "Not accepted: " + err.Error() + ".", Warning: true}); err != nil {
			return "", fmt.Errorf("ask %s: %w", q.ID, err)
		}
	}
	return "", fmt.Errorf("%s, asked %d times: %w", q.ID, maxAttempts, ErrAnswer)
}

func (q Question) accept(answer string) error {
	switch {
	case answer == "":
		return errors.New("nothing was typed")
	case len(answer) > maxAnswer:
		return fmt.Errorf("longer than %d characters", maxAnswer)
	case q.Check == nil:
		return nil
	}
	return q.Check(answer)
}

// Practice answers every question as an unattended rehearsal does, and asks
// nobody. A question without a practice answer is ErrAnswer.
type Practice struct{}

// Show shows nothing.
func (Practice) Show(ctx context.Context, _ Notice) error { return ctx.Err() }

// Ask returns the practice answer.
func (Practice) Ask(ctx context.Context, q Question) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if q.Practice == "" {
		return "", fmt.Errorf("question %s: no practice answer: %w", q.ID, ErrAnswer)
	}
	return q.Practice, nil
}

// Prepared answers from a list that was written before, and asks Next what is
// not in it. Each answer is given once: a wrong one is then asked for.
type Prepared struct {
	// Answers are by Question.ID.
	Answers map[string]string
	Next    People

	given map[string]bool
}

// Show passes on to Next.
func (p *Prepared) Show(ctx context.Context, n Notice) error { return p.Next.Show(ctx, n) }

// Ask returns the prepared answer. For a question that only a person can
// answer a prepared one is ErrLive.
func (p *Prepared) Ask(ctx context.Context, q Question) (string, error) {
	answer, ok := p.Answers[q.ID]
	if !ok || p.given[q.ID] {
		return p.Next.Ask(ctx, q)
	}
	if q.Live {
		return "", fmt.Errorf("question %s: %w", q.ID, ErrLive)
	}
	if p.given == nil {
		p.given = map[string]bool{}
	}
	p.given[q.ID] = true
	return answer, nil
}

// person returns the person with this id, or a zero one.
func (d *Definition) person(id string) Person {
	if i := slices.IndexFunc(d.People, func(p Person) bool { return p.ID == id }); i >= 0 {
		return d.People[i]
	}
	return Person{}
}

// label is how a prompt calls a person: name, role and id.
func (p Person) label() string { return fmt.Sprintf("%s (%s %s)", p.Name, p.Role, p.ID) }
