package hsm

import "context"

// Destroyer is a Token that can destroy keys for good. It takes two acts, with
// people between them: Condemn says what would be destroyed, Destroy does it,
// to exactly that.
type Destroyer interface {
	Token
	// Condemn describes key, which the token has open. Nothing changes.
	Condemn(ctx context.Context, key Key) (Condemned, error)
	// Destroy finds the condemned key again by its id and its public key,
	// destroys both halves, and proves that the token has no object with the id
	// left. Interrupted, it is repeated: one half that is left is destroyed too.
	// Errors: ErrNotFound (neither half is there), ErrMismatch (another key has
	// the id, or it is another token), ErrAmbiguous, ErrPolicy (the token does
	// not let go of it), ErrBusy, ErrLost.
	Destroy(ctx context.Context, c Condemned) error
}

// Condemned names a key that will be destroyed. It holds no secret.
type Condemned struct {
	Token Device `json:"token"`
	Label string `json:"label"`
	ID    string `json:"id"`         // hexadecimal
	SPKI  string `json:"spkiSHA256"` // hexadecimal
}
