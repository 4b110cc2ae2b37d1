package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/sigstore/sigstore-go/pkg/verify"
)

// report prints what a verification found, for people.
func report(w io.Writer, file string, result *verify.VerificationResult) error {
	tw := tabwriter.NewWriter(w, 0, 0, 4, ' ', 0)
	row := func(name, value string) {
		if value != "" {
			_, _ = fmt.Fprintf(tw, "%s\t%s\n", name, value)
		}
	}
	row("verified", file)
	if s := result.Signature; s != nil && s.Certificate != nil {
		row("signer", s.Certificate.SubjectAlternativeName)
		row("issuer", s.Certificate.Issuer)
	}
	for _, t := range result.VerifiedTimestamps {
		row("time", fmt.Sprintf("%s (%s)", t.Timestamp.UTC().Format(time.RFC3339), t.Type))
	}
	return tw.Flush()
}
