package server

import (
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/chancery-ca/chancery/ca"
)

const (
	// smallBody is how much of its body every request may have in memory, in
	// octets: more than the requests of most clients.
	smallBody = 16 << 10
	// largeBodies is how many requests may have more at a time, up to MaxBody.
	largeBodies = 16
)

// errBodies: as many large bodies arrive as there is memory for.
var errBodies = fmt.Errorf("%w: too many large requests at once", ca.ErrBusy)

// LimitBody lets the request's body be read beyond 16 KiB only if few others are
// so large at the time: who opens many connections and sends most of a large
// body on each would have as much of our memory as he likes. release is for when
// the request is answered. The interfaces over HTTP use it themselves.
func (s *Server) LimitBody(r *http.Request) (release func()) {
	if r.Body == nil || r.Body == http.NoBody {
		return func() {}
	}
	body := &limitedBody{ReadCloser: r.Body, slots: s.largeBodies, left: smallBody}
	r.Body = body
	return func() {
		if body.large {
			<-body.slots
		}
	}
}

// limitedBody is a body that needs a slot when it is large. One goroutine reads.
type limitedBody struct {
	io.ReadCloser
	slots chan struct{}
	left  int  // octets that need no slot
	large bool // it has a slot
	full  bool // there was none
}

// Read implements io.Reader. It fails with errBodies when the body is large and
// there is no slot.
func (l *limitedBody) Read(p []byte) (int, error) {
	if l.full {
		return 0, errBodies
	}
	n, err := l.ReadCloser.Read(p)
	if l.large || n <= l.left {
		l.left -= n
		return n, err
	}
	select {
	case l.slots <- struct{}{}:
		l.large = true
		return n, err
	default:
		l.full = true
		return 0, errors.Join(errBodies, err)
	}
}
