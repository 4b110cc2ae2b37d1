package tpm

import (
	"context"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// What the tests of the package's outside need from its inside.

// Handles lists the transient objects and the sessions in the TPM.
func (t *Token) Handles(ctx context.Context) (objects, sessions int, err error) {
	err = t.do(ctx, hsm.ShareRest, true, func(c *connection) error {
		transient, err := c.handles(tpm2.TPMHandle(tpm2.TPMHTTransient) << 24)
		if err != nil {
			return err
		}
		loaded, err := c.handles(0x02000000)
		objects, sessions = len(transient), len(loaded)
		return err
	})
	return objects, sessions, err
}

// SetRetryWait changes how long a call that lost its connection waits for a new
// one. Nobody uses the token yet.
func (t *Token) SetRetryWait(d time.Duration) { t.retryWait = d }

// RetryWait is how long that is.
func (t *Token) RetryWait() time.Duration { return t.retryWait }

// WithTPM is withTPM.
func (t *Token) WithTPM(ctx context.Context, f func(tpm transport.TPM) error) error {
	return t.withTPM(ctx, hsm.ShareRest, f)
}

// RawSign returns a function that makes a TPM2_Sign with key and go-tpm alone:
// one reused session, salted to the storage key, HMAC with the key's value, the
// digest encrypted. The TPM is the caller's until release.
func (t *Token) RawSign(k hsm.Key, digest []byte) (sign func() error, release func(), err error) {
	t.gate <- struct{}{}
	c, own := t.conn, k.(*key)
	release = func() { <-t.gate }
	handle, err := c.load(own)
	if err != nil {
		return nil, release, err
	}
	above, err := c.parent(c.srk)
	if err != nil {
		return nil, release, err
	}
	s, end, err := tpm2.HMACSession(c, tpm2.TPMAlgSHA256, 32, tpm2.Auth(c.cfg.Auth),
		tpm2.AESEncryption(128, tpm2.EncryptIn), tpm2.Salted(above.Handle, *above.public))
	if err != nil {
		return nil, release, err
	}
	sign = func() error {
		_, err := tpm2.Sign{
			KeyHandle:  tpm2.AuthHandle{Handle: handle, Name: own.public.name, Auth: s},
			Digest:     tpm2.TPM2BDigest{Buffer: digest},
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck},
		}.Execute(rawTPM{c.device})
		return err
	}
	return sign, func() { _ = end(); <-t.gate }, nil
}

// rawTPM is a device without anything before it.
type rawTPM struct{ device }

func (r rawTPM) Send(command []byte) ([]byte, error) {
	return r.exchange(command, time.Now().Add(time.Minute))
}

// The parsers, for fuzzing.

// ParseURI reads a URI and writes it again.
func ParseURI(text string) (string, error) {
	u, err := parseURI(text)
	return u.String(), err
}

// ParseKeyFile reads a key file and writes it again.
func ParseKeyFile(text []byte) ([]byte, error) {
	f, err := parseKeyFile(text)
	if err != nil {
		return nil, err
	}
	return f.marshal()
}

// ParseCreation reads a creation file and writes it again.
func ParseCreation(text []byte) ([]byte, error) {
	c, err := parseCreation(text)
	if err != nil {
		return nil, err
	}
	return c.marshal()
}
