package ceremony

import (
	"bytes"
	_ "embed"
	"fmt"
	"text/template"
	"time"
)

//go:embed demo.yaml.tmpl
var demoTemplate string

// DemoParameters is what differs from demonstration to demonstration.
type DemoParameters struct {
	// URL is the service's base URL, for example "https://127.0.0.1:8443".
	URL string
	// Issuers are the OpenID providers, at least one.
	Issuers []string
	// Now is the time, for the ceremony's id.
	Now time.Time
	// Custodians are those of a TUF repository; more than half of them sign. None
	// means no repository.
	Custodians []TUFSigner
}

// Threshold is how many of the custodians sign.
func (p DemoParameters) Threshold() int { return len(p.Custodians)/2 + 1 }

// ID is the ceremony's id.
func (p DemoParameters) ID() string { return "demo-" + p.Now.UTC().Format("20060102t150405z") }

// DemoTokens are the names of the tokens in a demonstration's definition.
const (
	DemoRootToken   = "root"
	DemoOnlineToken = "online"
)

// DemoDefinition returns the definition of a rehearsal that makes every key a
// demonstration needs, in two tokens. It is the example's (config/example/
// genesis.yaml) with another URL and a CT origin that does not depend on it.
func DemoDefinition(p DemoParameters) (*Definition, error) {
	t, err := template.New("demo").Option("missingkey=error").Parse(demoTemplate)
	if err != nil {
		return nil, fmt.Errorf("parse demo definition: %w", err)
	}
	var b bytes.Buffer
	if err := t.Execute(&b, p); err != nil {
		return nil, fmt.Errorf("make demo definition: %w", err)
	}
	d, err := ParseDefinition(b.Bytes())
	if err != nil {
		return nil, fmt.Errorf("make demo definition: %w", err)
	}
	return d, nil
}
