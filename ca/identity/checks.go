package identity

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"net/url"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// checkEmail is what type email asks of a token.
func checkEmail(issuer Issuer, c claims) error {
	verified, ok := c.verified("email_verified")
	if !ok {
		return refuse("email_verified is not a boolean")
	}
	if !verified && !issuer.SkipEmailVerification {
		return refuse("e-mail address is not verified")
	}
	if !isMailbox(c.text("email")) {
		return refuse("email is not an e-mail address")
	}
	return nil
}

// isMailbox says whether s is dot-atom@domain in ASCII (RFC 5321, Section
// 4.1.2), the domain of at least two labels. Quoted local parts and literals
// are not names of people, and an rfc822Name is ASCII (RFC 5280, 4.2.1.6).
func isMailbox(s string) bool {
	local, domain, ok := strings.Cut(s, "@")
	if !ok || len(s) > 254 || len(local) > 64 || len(domain) > 253 {
		return false
	}
	for atom := range strings.SplitSeq(local, ".") {
		if atom == "" || strings.ContainsFunc(atom, func(r rune) bool { return !isAtext(r) }) {
			return false
		}
	}
	labels := strings.Split(domain, ".")
	for _, label := range labels {
		if !isLabel(label) {
			return false
		}
	}
	top := labels[len(labels)-1]
	return len(labels) >= 2 && isLetter(rune(top[0]))
}

// isAtext is RFC 5322, Section 3.2.3.
func isAtext(r rune) bool {
	return isLetter(r) || isDigit(r) || strings.ContainsRune("!#$%&'*+-/=?^_`{|}~", r)
}

// isLabel is a label of letters, digits and inner hyphens (RFC 1123, 2.1).
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool { return !isLetter(r) && !isDigit(r) && r != '-' })
}

func isLetter(r rune) bool { return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' }
func isDigit(r rune) bool  { return '0' <= r && r <= '9' }

// checkUsername is what type username asks of a token: the subject is neither
// an address nor already a name in a domain.
func checkUsername(_ Issuer, c claims) error {
	sub := c.text("sub")
	if strings.Contains(sub, "!") || looksLikeEmail(sub) {
		return refuse("subject is not a bare user name")
	}
	return nil
}

// looksLikeEmail is wider than isMailbox: what somebody could take for an
// address must not pass for another kind of name.
func looksLikeEmail(s string) bool {
	local, domain, ok := strings.Cut(s, "@")
	return ok && local != "" && domain != "" && !strings.ContainsAny(s, "/:")
}

// checkURISubject is what type uri asks of a token: the subject is a URL of the
// configured scheme and host, and of the port and below the path if the
// configuration has them, which Fulcio would not look at.
func checkURISubject(i Issuer, c claims) error {
	sub := c.text("sub")
	if looksLikeEmail(sub) {
		return refuse("subject is an e-mail address")
	}
	subject, err := url.Parse(sub)
	if err != nil {
		return refuse("subject is not a URI")
	}
	domain, err := url.Parse(i.SubjectDomain)
	if err != nil || subject.Scheme != domain.Scheme || subject.Hostname() != domain.Hostname() || subject.User != nil {
		return refuse("subject is not a URI in subject-domain")
	}
	if domain.Port() != "" && subject.Port() != domain.Port() {
		return refuse("subject is not a URI in subject-domain")
	}
	if err := checkPath(subject.EscapedPath()); err != nil {
		return err
	}
	if path := strings.TrimSuffix(domain.EscapedPath(), "/"); !strings.HasPrefix(subject.EscapedPath()+"/", path+"/") {
		return refuse("subject is not a URI in subject-domain")
	}
	return nil
}

// checkSPIFFE is what type spiffe asks of a token (SPIFFE-ID, Section 2).
func checkSPIFFE(i Issuer, c claims) error {
	domain, err := spiffeid.TrustDomainFromString(i.SPIFFETrustDomain)
	if err != nil {
		return fmt.Errorf("%w: spiffe-trust-domain", ErrConfig)
	}
	id, err := spiffeid.FromString(c.text("sub"))
	if err != nil || !id.MemberOf(domain) {
		return refuse("subject is not a SPIFFE ID of the trust domain")
	}
	return nil
}

// checkChainguard: a token with an address signs the address, so that it must
// be verified.
func checkChainguard(_ Issuer, c claims) error {
	if c.text("email") == "" {
		return nil
	}
	if verified, ok := c.verified("email_verified"); !ok || !verified {
		return refuse("e-mail address is not verified")
	}
	return nil
}

// checkGitLabRunner wants the number of a runner.
func checkGitLabRunner(_ Issuer, c claims) error {
	n, ok := c["runner_id"].(json.Number)
	if !ok {
		return refuse("claim runner_id is missing")
	}
	if id, err := n.Int64(); err != nil || id == 0 {
		return refuse("claim runner_id is not a number of a runner")
	}
	return nil
}

// checkUsernameDomain is what type username asks of its configuration.
func checkUsernameDomain(i Issuer) error {
	u, err := url.Parse(i.IssuerURL)
	switch {
	case i.SubjectDomain == "":
		return fmt.Errorf("subject-domain is missing")
	case err != nil:
		return fmt.Errorf("parse issuer-url: %w", err)
	case strings.ContainsAny(i.SubjectDomain, ":/@!"):
		return fmt.Errorf("subject-domain %.80q is not a host name", i.SubjectDomain)
	}
	return sameOwner(i.SubjectDomain, u.Hostname())
}

// checkURIDomain is what type uri asks of its configuration.
func checkURIDomain(i Issuer) error {
	u, err := url.Parse(i.IssuerURL)
	if err != nil {
		return fmt.Errorf("parse issuer-url: %w", err)
	}
	domain, err := url.Parse(i.SubjectDomain)
	if err != nil || domain.Scheme == "" || domain.Hostname() == "" {
		return fmt.Errorf("subject-domain %.80q is not a URL of scheme and host", i.SubjectDomain)
	}
	if domain.Scheme != u.Scheme {
		return fmt.Errorf("subject-domain has another scheme than issuer-url")
	}
	return sameOwner(domain.Hostname(), u.Hostname())
}

// sameOwner says whether an issuer at one host may speak for names of another:
// they are the same, or end in the same two labels. Where a registry hands out
// third labels (co.uk) two labels do not show one owner; the configuration is
// the operator's own, and Fulcio has the same rule.
func sameOwner(subject, issuer string) error {
	if subject == issuer {
		return nil
	}
	if _, err := netip.ParseAddr(issuer); err == nil {
		return fmt.Errorf("subject-domain is not the issuer's address")
	}
	a, b := strings.Split(subject, "."), strings.Split(issuer, ".")
	if len(a) < 2 || len(b) < 2 || a[len(a)-1] != b[len(b)-1] || a[len(a)-2] != b[len(b)-2] {
		return fmt.Errorf("subject-domain is not of the issuer's domain")
	}
	return nil
}

// checkTrustDomain is what type spiffe asks of its configuration.
func checkTrustDomain(i Issuer) error {
	if i.SPIFFETrustDomain == "" {
		return fmt.Errorf("spiffe-trust-domain is missing")
	}
	if _, err := spiffeid.TrustDomainFromString(i.SPIFFETrustDomain); err != nil {
		return fmt.Errorf("spiffe-trust-domain is not one: %w", err)
	}
	return nil
}
