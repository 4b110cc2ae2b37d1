package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore/pkg/oauthflow"
	"golang.org/x/term"
)

// clientID is the audience that every Sigstore client asks for.
const clientID = "sigstore"

// Login asks the OpenID provider of the signing configuration for a token: in
// the browser when there is a terminal, else by the device flow (RFC 8628),
// whose code is printed to out.
func Login(ctx context.Context, trust Trust, in io.Reader, out io.Writer) (string, error) {
	services, err := readSigningConfig(trust.SigningConfig)
	if err != nil {
		return "", err
	}
	provider, err := root.SelectService(services.OIDCProviderURLs(), []uint32{1}, time.Now())
	if err != nil {
		return "", fmt.Errorf("select OpenID provider: %w", err)
	}
	type answer struct {
		token *oauthflow.OIDCIDToken
		err   error
	}
	got := make(chan answer, 1)
	go func() {
		token, err := oauthflow.OIDConnect(provider.URL, clientID, "", "", tokenGetter(provider.URL, in, out))
		got <- answer{token, err}
	}()
	select {
	case <-ctx.Done():
		return "", fmt.Errorf("log in: %w", ctx.Err())
	case a := <-got:
		if a.err != nil {
			return "", fmt.Errorf("log in at %s: %w", provider.URL, a.err)
		}
		if a.token == nil || a.token.RawString == "" {
			return "", errors.New("log in: the provider gave no token")
		}
		return a.token.RawString, nil
	}
}

func tokenGetter(issuer string, in io.Reader, out io.Writer) oauthflow.TokenGetter {
	if f, ok := in.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return &oauthflow.InteractiveIDTokenGetter{HTMLPage: loggedIn, Input: in, Output: out}
	}
	device := oauthflow.NewDeviceFlowTokenGetterForIssuer(issuer)
	device.MessagePrinter = func(message string) { _, _ = fmt.Fprintln(out, message) }
	return device
}

// loggedIn is what the browser shows at the end.
const loggedIn = `<!doctype html><html lang="en"><meta charset="utf-8"><title>Chancery</title>
<body style="font-family:sans-serif;margin:4em"><h1>Logged in</h1><p>You may close this page.</p></body></html>`
