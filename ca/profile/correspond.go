package profile

import (
	"bytes"
	"encoding/asn1"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Correspond says whether a precertificate and a final certificate (DER) are
// two forms of one: the precertificate has the poison (critical, NULL) and no
// SCT list, the final one has a list of exactly one v1 SCT and no poison, and
// without these two extensions their TBSCertificates are equal, octet by octet
// and in the same order (RFC 6962, 3.1 and 3.3). It does not look at any
// signature. Errors: ErrCorrespondence.
//
// It shares no code with the builder, and is right for certificates of others.
func Correspond(precertificate, final []byte) error {
	pre, err := tbsOf(precertificate)
	if err != nil {
		return err
	}
	fin, err := tbsOf(final)
	if err != nil {
		return err
	}
	return correspond(pre, fin)
}

// correspond is Correspond on TBSCertificates.
func correspond(precertificate, final []byte) error {
	pre, err := cut(precertificate)
	if err != nil {
		return err
	}
	fin, err := cut(final)
	if err != nil {
		return err
	}
	switch {
	case pre.poison == nil || !bytes.Equal(pre.poison, asn1.NullBytes) || !pre.poisonCritical:
		return fmt.Errorf("%w: precertificate without critical NULL poison", ErrCorrespondence)
	case pre.scts != nil:
		return fmt.Errorf("%w: precertificate with an SCT list", ErrCorrespondence)
	case fin.poison != nil:
		return fmt.Errorf("%w: final certificate with poison", ErrCorrespondence)
	case fin.scts == nil:
		return fmt.Errorf("%w: final certificate without an SCT list", ErrCorrespondence)
	case !bytes.Equal(pre.head, fin.head):
		return fmt.Errorf("%w: fields before the extensions differ", ErrCorrespondence)
	case !bytes.Equal(pre.rest, fin.rest):
		return fmt.Errorf("%w: other extensions differ", ErrCorrespondence)
	}
	if err := parseSCTList(fin.scts); err != nil {
		return fmt.Errorf("%w: %w", ErrCorrespondence, err)
	}
	return nil
}

// cutTBS is a TBSCertificate taken apart.
type cutTBS struct {
	head           []byte // all before the extensions
	rest           []byte // the extensions but poison and SCT list, concatenated
	poison, scts   []byte // extension values; nil: absent
	poisonCritical bool
}

// tbsOf returns the TBSCertificate element of a DER Certificate.
func tbsOf(certificate []byte) ([]byte, error) {
	var inner, tbs, alg, signature cryptobyte.String
	in := cryptobyte.String(certificate)
	if !in.ReadASN1(&inner, casn1.SEQUENCE) || !in.Empty() || !inner.ReadASN1Element(&tbs, casn1.SEQUENCE) ||
		!inner.ReadASN1(&alg, casn1.SEQUENCE) || !inner.ReadASN1(&signature, casn1.BIT_STRING) || !inner.Empty() {
		return nil, fmt.Errorf("%w: not a certificate", ErrCorrespondence)
	}
	return tbs, nil
}

// cut takes a TBSCertificate apart. An extension that occurs twice is
// malformed.
func cut(tbs []byte) (*cutTBS, error) {
	var inner cryptobyte.String
	in := cryptobyte.String(tbs)
	if !in.ReadASN1(&inner, casn1.SEQUENCE) || !in.Empty() {
		return nil, fmt.Errorf("%w: not a TBSCertificate", ErrCorrespondence)
	}
	var out cutTBS
	tagExtensions := casn1.Tag(3).ContextSpecific().Constructed()
	for !inner.PeekASN1Tag(tagExtensions) {
		var field cryptobyte.String
		var tag casn1.Tag
		if !inner.ReadAnyASN1Element(&field, &tag) {
			return nil, fmt.Errorf("%w: malformed TBSCertificate, or one without extensions", ErrCorrespondence)
		}
		out.head = append(out.head, field...)
	}
	var explicit, list cryptobyte.String
	if !inner.ReadASN1(&explicit, tagExtensions) || !inner.Empty() || !explicit.ReadASN1(&list, casn1.SEQUENCE) || !explicit.Empty() {
		return nil, fmt.Errorf("%w: malformed extensions", ErrCorrespondence)
	}
	for !list.Empty() {
		if err := out.take(&list); err != nil {
			return nil, err
		}
	}
	return &out, nil
}

// take reads one extension and puts it where it belongs.
func (c *cutTBS) take(list *cryptobyte.String) error {
	var element, body, value cryptobyte.String
	var id asn1.ObjectIdentifier
	var critical bool
	if !list.ReadASN1Element(&element, casn1.SEQUENCE) {
		return fmt.Errorf("%w: malformed extension", ErrCorrespondence)
	}
	whole := []byte(element)
	if !element.ReadASN1(&body, casn1.SEQUENCE) || !body.ReadASN1ObjectIdentifier(&id) ||
		(body.PeekASN1Tag(casn1.BOOLEAN) && !body.ReadASN1Boolean(&critical)) ||
		!body.ReadASN1(&value, casn1.OCTET_STRING) || !body.Empty() {
		return fmt.Errorf("%w: malformed extension", ErrCorrespondence)
	}
	switch {
	case id.Equal(oidPoison) && c.poison == nil:
		c.poison, c.poisonCritical = append([]byte{}, value...), critical
	case id.Equal(oidSCTList) && c.scts == nil:
		if critical {
			return fmt.Errorf("%w: critical SCT list", ErrCorrespondence)
		}
		c.scts = append([]byte{}, value...)
	case id.Equal(oidPoison), id.Equal(oidSCTList):
		return fmt.Errorf("%w: extension %s twice", ErrCorrespondence, id)
	default:
		c.rest = append(c.rest, whole...)
	}
	return nil
}
