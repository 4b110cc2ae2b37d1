package pkcs11

import "time"

// SetRetryWait changes how long a call that lost its connection waits for a new
// one. Nobody uses the token yet.
func (t *Token) SetRetryWait(d time.Duration) { t.retryWait = d }

// RetryWait is how long that is.
func (t *Token) RetryWait() time.Duration { return t.retryWait }
