package ct

import (
	"bytes"
	"encoding/asn1"
	"errors"
	"math/big"
	"time"

	ctx509 "github.com/google/certificate-transparency-go/x509"
	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

var (
	errPrecertificate = errors.New("not a DER X.509 v3 certificate")
	errPoison         = errors.New("not exactly one poison extension")
)

// oidPoison is the poison (RFC 6962, Section 3.1).
var oidPoison = asn1.ObjectIdentifier(ctx509.OIDExtensionCTPoison)

// defang returns the TBSCertificate of a DER precertificate without its
// poison extension. Exactly one poison must be there, and another extension.
//
// It keeps every other octet and recomputes the lengths around them, which
// for DER is what parsing and encoding again gives, but cheaper. For that it
// must not let through what an encoder would write in another way; so each
// field up to the extensions is read to its end, and what this log's own
// authority never writes (versions 1 and 2, unique identifiers) is refused.
func defang(precert []byte) ([]byte, error) {
	var cert, tbs cryptobyte.String
	in := cryptobyte.String(precert)
	if !in.ReadASN1(&cert, casn1.SEQUENCE) || !in.Empty() || !cert.ReadASN1(&tbs, casn1.SEQUENCE) {
		return nil, errPrecertificate
	}
	head := tbs
	if !skipFields(&tbs) {
		return nil, errPrecertificate
	}
	head = head[:len(head)-len(tbs)]
	var explicit, list cryptobyte.String
	if !tbs.ReadASN1(&explicit, tagExtensions) || !tbs.Empty() ||
		!explicit.ReadASN1(&list, casn1.SEQUENCE) || !explicit.Empty() {
		return nil, errPrecertificate
	}
	before, after, err := cutPoison(list)
	if err != nil {
		return nil, err
	}
	out := cryptobyte.NewBuilder(make([]byte, 0, len(precert)))
	out.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(head)
		b.AddASN1(tagExtensions, func(b *cryptobyte.Builder) {
			b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddBytes(before)
				b.AddBytes(after)
			})
		})
	})
	return out.Bytes()
}

// The context tags of a TBSCertificate (RFC 5280, Section 4.1).
var (
	tagVersion    = casn1.Tag(0).ContextSpecific().Constructed()
	tagExtensions = casn1.Tag(3).ContextSpecific().Constructed()
)

// cutPoison returns the extensions before and after the poison.
func cutPoison(list cryptobyte.String) (before, after cryptobyte.String, err error) {
	all, found := list, false
	for !list.Empty() {
		start := len(all) - len(list)
		var id asn1.ObjectIdentifier
		if !readExtension(&list, &id) {
			return nil, nil, errPrecertificate
		}
		if !id.Equal(oidPoison) {
			continue
		}
		if found {
			return nil, nil, errPoison
		}
		found, before, after = true, all[:start], list
	}
	switch {
	case !found:
		return nil, nil, errPoison
	case len(before)+len(after) == 0:
		return nil, nil, errPrecertificate
	}
	return before, after, nil
}

// readExtension reads one Extension: critical is TRUE or absent (DER).
func readExtension(in *cryptobyte.String, id *asn1.ObjectIdentifier) bool {
	var body, value cryptobyte.String
	critical := true
	return in.ReadASN1(&body, casn1.SEQUENCE) && body.ReadASN1ObjectIdentifier(id) &&
		(!body.PeekASN1Tag(casn1.BOOLEAN) || body.ReadASN1Boolean(&critical)) && critical &&
		body.ReadASN1(&value, casn1.OCTET_STRING) && body.Empty()
}

// skipFields reads version to subjectPublicKeyInfo.
func skipFields(tbs *cryptobyte.String) bool {
	var version, name cryptobyte.String
	var number int
	var serial big.Int
	return tbs.ReadASN1(&version, tagVersion) && version.ReadASN1Integer(&number) && version.Empty() && number == 2 &&
		tbs.ReadASN1Integer(&serial) &&
		skipAlgorithm(tbs) &&
		tbs.ReadASN1(&name, casn1.SEQUENCE) &&
		skipValidity(tbs) &&
		tbs.ReadASN1(&name, casn1.SEQUENCE) &&
		skipKey(tbs)
}

// skipAlgorithm reads an AlgorithmIdentifier: an identifier and at most one
// element of any kind.
func skipAlgorithm(in *cryptobyte.String) bool {
	var body, parameters cryptobyte.String
	var tag casn1.Tag
	var id asn1.ObjectIdentifier
	return in.ReadASN1(&body, casn1.SEQUENCE) && body.ReadASN1ObjectIdentifier(&id) &&
		(body.Empty() || body.ReadAnyASN1Element(&parameters, &tag)) && body.Empty()
}

// skipKey reads a SubjectPublicKeyInfo.
func skipKey(in *cryptobyte.String) bool {
	var body cryptobyte.String
	var bits asn1.BitString
	return in.ReadASN1(&body, casn1.SEQUENCE) && skipAlgorithm(&body) && body.ReadASN1BitString(&bits) && body.Empty()
}

// skipValidity reads two times.
func skipValidity(in *cryptobyte.String) bool {
	var body cryptobyte.String
	return in.ReadASN1(&body, casn1.SEQUENCE) && skipTime(&body) && skipTime(&body) && body.Empty()
}

// skipTime reads a Time in the one form that RFC 5280, Section 4.1.2.5, has
// for it: to the second, in UTC, GeneralizedTime from 2050 on.
func skipTime(in *cryptobyte.String) bool {
	const shortUTC, shortGeneralized = len("060102150405Z"), len("20060102150405Z")
	content := *in
	var text cryptobyte.String
	var tag casn1.Tag
	var at time.Time
	if !content.ReadAnyASN1(&text, &tag) || !bytes.HasSuffix(text, []byte("Z")) {
		return false
	}
	if tag == casn1.UTCTime {
		return len(text) == shortUTC && in.ReadASN1UTCTime(&at)
	}
	return len(text) == shortGeneralized && in.ReadASN1GeneralizedTime(&at) && at.Year() >= 2050
}
