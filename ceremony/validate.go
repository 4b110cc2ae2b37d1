package ceremony

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/ceremony/internal/sshsig"
	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
)

var (
	// names become labels, file names and record fields.
	namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,30}[a-z0-9])?$`)
	idPattern   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{1,62})[a-z0-9]$`)
	originRule  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9./:_-]{0,199}$`)
	generation  = regexp.MustCompile(`-g?[0-9]+$`)
	tufDuration = regexp.MustCompile(`^[1-9][0-9]{0,3}[dy]$`)
)

// use is what one key is for.
type use struct {
	role        hsm.Role
	certificate string // name in Definition.Certificates, or ""
}

// faults collects what is wrong with a definition.
type faults struct{ list []error }

func (f *faults) add(format string, args ...any) {
	f.list = append(f.list, fmt.Errorf(format, args...))
}

// validate checks the whole definition and works out each key's use.
func (d *Definition) validate() error {
	var f faults
	d.checkHead(&f)
	d.checkPeople(&f)
	d.checkTokens(&f)
	d.checkKeys(&f)
	d.checkMachines(&f)
	d.checkCertificates(&f)
	d.checkService(&f)
	d.checkTUF(&f)
	d.checkPrevious(&f)
	d.checkApart(&f)
	d.checkRotation(&f)
	d.checkCRL(&f)
	d.checkBackups(&f)
	d.checkDrills(&f)
	d.checkDestroy(&f)
	if len(f.list) == 0 {
		d.assignUses(&f)
		d.checkBackupRoles(&f)
	}
	if len(f.list) > 0 {
		return fmt.Errorf("%w: %w", ErrDefinition, errors.Join(f.list...))
	}
	return nil
}

func (d *Definition) checkHead(f *faults) {
	if d.Version != 1 {
		f.add("version: %d, want 1", d.Version)
	}
	if !idPattern.MatchString(d.ID) {
		f.add("id: %.80q: want 3 to 64 of a-z, 0-9 and -", d.ID)
	}
	if !slices.Contains(kinds, d.Kind) {
		f.add("kind: unknown %.40q", d.Kind)
	}
	if d.Environment != Production && d.Environment != Rehearsal {
		f.add("environment: %.40q: want production or rehearsal", d.Environment)
	}
	w := d.Window
	if w.NotBefore.IsZero() != w.NotAfter.IsZero() || d.Environment == Production && w.NotBefore.IsZero() {
		f.add("window: both not-before and not-after are needed")
	} else if !w.NotBefore.IsZero() && !w.NotBefore.Before(w.NotAfter) {
		f.add("window: not-after is not after not-before")
	}
	// The output folder is inside the folder of the ceremony.
	dir := d.Outputs.Dir
	if dir == "" || !filepath.IsLocal(dir) || path.Clean(dir) != dir || dir == "." || strings.ContainsAny(dir, "\\\x00") {
		f.add("outputs: dir %.80q: want a relative path that stays inside", dir)
	}
}

// maxPeople is how many take part at most: each is asked one by one.
const maxPeople = 32

func (d *Definition) checkPeople(f *faults) {
	count := map[PersonRole]int{}
	seen := map[string]bool{}
	keys := map[string]string{}
	for i, p := range d.People {
		switch {
		case !namePattern.MatchString(p.ID):
			f.add("people: entry %d: id %.40q", i+1, p.ID)
		case seen[p.ID]:
			f.add("people: id %s twice", p.ID)
		}
		seen[p.ID] = true
		count[p.Role]++
		if !slices.Contains([]PersonRole{Administrator, Witness, Custodian, Operator}, p.Role) {
			f.add("people: %s: unknown role %.40q", p.ID, p.Role)
		}
		if strings.TrimSpace(p.Name) == "" || !printable(p.Name) {
			f.add("people: %s: name missing or not printable", p.ID)
		}
		if p.Key == "" && d.Environment == Rehearsal {
			continue
		}
		key, err := sshsig.ParsePublicKey(p.Key)
		if err != nil {
			f.add("people: %s: key: %w", p.ID, err)
			continue
		}
		if other, ok := keys[key.String()]; ok {
			f.add("people: %s and %s have one key", other, p.ID)
		}
		keys[key.String()] = p.ID
	}
	if len(d.People) > maxPeople {
		f.add("people: %d, at most %d", len(d.People), maxPeople)
	}
	for _, role := range sorted(d.Quorum) {
		if n := d.Quorum[role]; n < 1 || n > count[role] {
			f.add("quorum: %.40q: %d of %d people", role, n, count[role])
		}
	}
	if d.Environment == Production && (count[Administrator] == 0 || d.Quorum[Witness] == 0) {
		f.add("people: production needs an administrator, and a quorum of witnesses")
	}
	if wanted := d.Entropy.Mode != "" || d.hasOwn(profile.Root) || len(d.Entropy.Contributors) > 0; wanted && d.Entropy.Mode != CommitReveal {
		f.add("entropy: mode %.40q, want %s", d.Entropy.Mode, CommitReveal)
	}
	for i, id := range d.Entropy.Contributors {
		if !seen[id] || slices.Contains(d.Entropy.Contributors[:i], id) {
			f.add("entropy: contributor %.40q is not one of the people, or is there twice", id)
		}
	}
}

// maxPINParts is how many people share a PIN at most.
const maxPINParts = 4

func (d *Definition) checkTokens(f *faults) {
	for _, name := range sorted(d.Modules) {
		m := d.Modules[name]
		if !namePattern.MatchString(name) || !filepath.IsAbs(m.Path) {
			f.add("modules: %.40q: path %.80q is not absolute, or the name is bad", name, m.Path)
		}
		if b, err := hex.DecodeString(m.SHA256); err != nil || len(b) != 32 || m.SHA256 != strings.ToLower(m.SHA256) {
			f.add("modules: %.40q: sha256: want 64 hexadecimal digits in lower case", name)
		}
	}
	if len(d.Tokens) == 0 {
		f.add("tokens: none")
	}
	uris := map[string]string{}
	for _, name := range sorted(d.Tokens) {
		t := d.Tokens[name]
		if !namePattern.MatchString(name) {
			f.add("tokens: name %.40q", name)
		}
		if err := checkTokenURI(t.URI); err != nil {
			f.add("tokens: %s: %w", name, err)
		}
		if other, ok := uris[t.URI]; ok {
			f.add("tokens: %s and %s have one URI", other, name)
		}
		uris[t.URI] = name
		if _, ok := d.Modules[t.Module]; t.Module != "" && !ok {
			f.add("tokens: %s: unknown module %.40q", name, t.Module)
		}
		if t.PINParts < 0 || t.PINParts > maxPINParts {
			f.add("tokens: %s: pin-parts: %d, want 1 to %d", name, t.PINParts, maxPINParts)
		}
		if err := t.checkPIN(); err != nil {
			f.add("tokens: %s: %w", name, err)
		}
		pkcs11 := strings.HasPrefix(t.URI, "pkcs11:")
		if t.Module != "" && !pkcs11 || t.Module == "" && pkcs11 && d.Environment == Production {
			f.add("tokens: %s: a PKCS#11 token has a module, a TPM has none", name)
		}
	}
}

func (d *Definition) checkKeys(f *faults) {
	if len(d.Keys) == 0 && d.makesKeys() {
		f.add("keys: none")
	}
	for _, name := range sorted(d.Keys) {
		k := d.Keys[name]
		if !namePattern.MatchString(name) {
			f.add("keys: name %.40q: want 1 to 32 of a-z, 0-9, . and -", name)
		}
		if _, ok := d.Tokens[k.Token]; !ok && !d.madeElsewhere() {
			f.add("keys: %s: unknown token %.40q", name, k.Token)
		}
		if k.Algorithm.Curve() == nil {
			f.add("keys: %s: unknown alg %.40q", name, k.Algorithm)
		}
		if !slices.Contains([]Protection{"", NonExtractable, NativeBackup, WrappedBackup}, k.Protection) {
			f.add("keys: %s: unknown protection %.40q", name, k.Protection)
		}
	}
}

// The longest life of a certificate, in years.
const maxYears = 30

func (d *Definition) checkCertificates(f *faults) {
	if d.Kind == Genesis && len(d.Certificates) == 0 {
		f.add("certificates: none")
	}
	for _, name := range sorted(d.Certificates) {
		c := d.Certificates[name]
		bad := func(format string, args ...any) {
			f.add("certificates: %.40s: %w", name, fmt.Errorf(format, args...))
		}
		if !namePattern.MatchString(name) {
			bad("bad name")
		}
		if _, ok := d.Keys[c.Key]; !ok {
			bad("unknown key %.40q", c.Key)
		}
		if c.Years < 1 || c.Years > maxYears {
			bad("years: %d, want 1 to %d", c.Years, maxYears)
		}
		d.checkSubject(c.Subject, bad)
		if c.PathLen != nil && (*c.PathLen < 0 || *c.PathLen > 3) {
			bad("path-len: %d, want 0 to 3", *c.PathLen)
		}
		d.checkIssuer(name, c, bad)
	}
}

func (d *Definition) checkSubject(s Subject, bad func(string, ...any)) {
	cn := d.CommonName(s)
	if s.Organization == "" || s.CommonName == "" {
		bad("subject: o and cn are needed")
	}
	// The upper bounds of RFC 5280, Appendix A.1: 64 characters each.
	if len([]rune(s.Organization)) > 64 || len([]rune(cn)) > 64 {
		bad("subject: o and cn (with the rehearsal's prefix) have at most 64 characters")
	}
	if !printable(s.Organization) || !printable(s.CommonName) {
		bad("subject: not printable")
	}
	if s.Country != "" && !regexp.MustCompile(`^[A-Z]{2}$`).MatchString(s.Country) {
		bad("subject: c: %.8q: want two capital letters", s.Country)
	}
	if d.Environment == Production && strings.HasPrefix(strings.ToUpper(s.CommonName), "REHEARSAL") {
		bad("subject: cn: a production name does not begin with REHEARSAL")
	}
}

func (d *Definition) checkIssuer(name string, c Certificate, bad func(string, ...any)) {
	if c.SelfSigned {
		if c.Issuer != "" || len(c.EKU) > 0 || c.PathLen == nil {
			bad("a self-signed certificate has a path-len, no issuer and no eku")
		}
		return
	}
	issuer, ok := d.Certificates[c.Issuer]
	switch {
	case d.isPrevious(c.Issuer): // its dates are looked at when it signs
	case !ok || !issuer.SelfSigned:
		bad("issuer %.40q is not a self-signed certificate of this definition", c.Issuer)
		return
	case c.Years > issuer.Years:
		bad("lives longer (%d years) than its issuer (%d)", c.Years, issuer.Years)
	case c.Key == issuer.Key:
		bad("has its issuer's key")
	}
	switch {
	case slices.Equal(c.EKU, []Usage{CodeSigning}):
		if c.PathLen == nil || *c.PathLen != 0 {
			bad("an intermediate has path-len: 0")
		}
		if issuer.PathLen != nil && *issuer.PathLen < 1 {
			bad("its issuer's path-len allows no intermediate")
		}
	case slices.Equal(c.EKU, []Usage{TimeStamping}):
		if c.PathLen != nil {
			bad("a timestamp certificate has no path-len")
		}
	default:
		bad("eku: want [codeSigning] or [timeStamping]")
	}
}

func (d *Definition) checkService(f *faults) {
	if d.Kind != Genesis {
		d.checkNextService(f)
	} else if err := checkServiceURL(d.Service.URL, d.Environment); err != nil {
		f.add("service: url: %w", err)
	}
	if len(d.Service.OIDC) == 0 && d.Kind == Genesis {
		f.add("service: oidc: no issuer")
	}
	for i, issuer := range d.Service.OIDC {
		u, err := url.Parse(issuer)
		switch {
		case err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "",
			u.Scheme != "https" && !(u.Scheme == "http" && loopback(u.Hostname()) && d.Environment == Rehearsal):
			f.add("service: oidc: %.200q: want an https URL", issuer)
		case strings.HasSuffix(issuer, "/"):
			f.add("service: oidc: %.200q: final slash", issuer)
		case slices.Contains(d.Service.OIDC[:i], issuer):
			f.add("service: oidc: %.200q twice", issuer)
		}
	}
	logs := d.Service.Logs
	if d.Kind == Genesis && (logs.CT == nil || logs.Rekor == nil) {
		f.add("service: logs: ct and rekor are needed")
	}
	shards := map[string]string{}
	for _, l := range d.logs() {
		if !namePattern.MatchString(l.Shard.Shard) {
			f.add("service: logs: %s: shard %.40q", l.role, l.Shard.Shard)
		}
		if other, ok := shards[l.Shard.Shard]; ok {
			f.add("service: logs: %s and %s have one shard name", other, l.role)
		}
		shards[l.Shard.Shard] = string(l.role)
		if l.Origin != "" && (l.role != hsm.RoleCT || !originRule.MatchString(l.Origin)) {
			f.add("service: logs: %s: origin %.80q cannot be set, or is malformed", l.role, l.Origin)
		}
	}
}

func (d *Definition) checkTUF(f *faults) {
	t := d.TUF
	if t == nil {
		return
	}
	if t.Threshold < 1 || t.Threshold > len(t.Custodians) {
		f.add("tuf: threshold: %d of %d custodians", t.Threshold, len(t.Custodians))
	}
	if !tufDuration.MatchString(t.RootExpires) || !tufDuration.MatchString(t.TimestampExpires) {
		f.add("tuf: root-expires and timestamp-expires: want a number of days or years, as 7d or 1y")
	}
	ids, keys := map[string]bool{}, map[string]bool{}
	if len(t.Leaving) > 0 && d.Previous == nil {
		f.add("tuf: leaving: there are no custodians of before")
	}
	for _, c := range t.signers() {
		if !namePattern.MatchString(c.ID) || ids[c.ID] {
			f.add("tuf: custodian %.40q: bad id, or twice", c.ID)
		}
		if err := checkTokenURI(c.Key); err != nil {
			f.add("tuf: custodian %.40q: %w", c.ID, err)
		}
		if _, err := hsm.ParseSPKIHash(c.SPKISHA256); err != nil || keys[strings.ToLower(c.SPKISHA256)] {
			f.add("tuf: custodian %.40q: spki-sha256 malformed, or twice", c.ID)
		}
		ids[c.ID], keys[strings.ToLower(c.SPKISHA256)] = true, true
	}
}

// namedShard is a log of the definition with its role.
type namedShard struct {
	role hsm.Role
	*Shard
}

func (d *Definition) logs() []namedShard {
	var out []namedShard
	for _, l := range []namedShard{
		{hsm.RoleCT, d.Service.Logs.CT},
		{hsm.RoleRekor, d.Service.Logs.Rekor},
		{hsm.RoleRekorV1, d.Service.Logs.RekorV1},
	} {
		if l.Shard != nil {
			out = append(out, l)
		}
	}
	return out
}

// certificateKind says which place in the hierarchy a certificate has.
func (d *Definition) certificateKind(name string) profile.Kind {
	c := d.Certificates[name]
	switch {
	case slices.Contains(c.EKU, CodeSigning):
		return profile.Intermediate
	case slices.Contains(c.EKU, TimeStamping):
		return profile.TSA
	}
	for _, child := range d.Certificates {
		if child.Issuer == name && slices.Contains(child.EKU, CodeSigning) {
			return profile.Root
		}
	}
	return profile.TSARoot
}

// kindRole maps a certificate's kind to its key's role.
var kindRole = map[profile.Kind]hsm.Role{
	profile.Root: hsm.RoleRoot, profile.TSARoot: hsm.RoleTSARoot,
	profile.Intermediate: hsm.RoleIntermediate, profile.TSA: hsm.RoleTSA,
}

// assignUses gives every key its one use, or says which key has none or two.
func (d *Definition) assignUses(f *faults) {
	d.uses = map[string]use{}
	roles := map[hsm.Role]string{}
	assign := func(key string, u use) {
		if other, ok := d.uses[key]; ok {
			f.add("keys: %s has two uses, %s and %s: one key, one role", key, other.role, u.role)
			return
		}
		if other, ok := roles[u.role]; ok {
			f.add("role %s has two keys, %s and %s", u.role, other, key)
			return
		}
		d.uses[key], roles[u.role] = u, key
	}
	for _, name := range sorted(d.Certificates) {
		assign(d.Certificates[name].Key, use{kindRole[d.certificateKind(name)], name})
	}
	for _, l := range d.logs() {
		if key := d.logKey(l, f); key != "" {
			assign(key, use{role: l.role})
		}
	}
	for _, name := range sorted(d.Keys) {
		if _, ok := d.uses[name]; !ok && baseName(name) == string(hsm.RoleTUFOnline) {
			assign(name, use{role: hsm.RoleTUFOnline})
		} else if !ok {
			f.add("keys: %s has no use: no certificate and no log names it", name)
		}
	}
	d.checkRoles(f, roles)
}

// checkRoles wants every role filled and the key types that all clients can
// verify: logs, timestamps and TUF are P-256.
func (d *Definition) checkRoles(f *faults, roles map[hsm.Role]string) {
	for _, role := range trust.Roles() {
		key, ok := roles[role]
		if d.Kind == Genesis && !ok && !trust.Optional(role) {
			f.add("role %s has no key", role)
		}
		switch role {
		case hsm.RoleCT, hsm.RoleRekor, hsm.RoleRekorV1, hsm.RoleTSA, hsm.RoleTUFOnline:
			if ok && d.Keys[key].Algorithm != hsm.ECDSAP256 {
				f.add("keys: %s: the role %s needs %s", key, role, hsm.ECDSAP256)
			}
		}
	}
}

// logKey finds a shard's key: the named one, or the one that has its name.
func (d *Definition) logKey(l namedShard, f *faults) string {
	if l.Key != "" {
		if _, ok := d.Keys[l.Key]; !ok {
			f.add("service: logs: %s: unknown key %.40q", l.role, l.Key)
			return ""
		}
		return l.Key
	}
	var found []string
	for _, name := range sorted(d.Keys) {
		if baseName(name) == string(l.role) {
			found = append(found, name)
		}
	}
	if len(found) != 1 {
		f.add("service: logs: %s: %d keys have its name: say which with key:", l.role, len(found))
		return ""
	}
	return found[0]
}

// baseName cuts the generation from a key's name: "ct-1" and "ct-g1" are "ct".
func baseName(key string) string {
	if key == string(hsm.RoleRekorV1) {
		return key
	}
	return generation.ReplaceAllString(key, "")
}

// CommonName returns the name that is certified: a rehearsal's has the prefix.
func (d *Definition) CommonName(s Subject) string {
	if d.Environment == Rehearsal && !strings.HasPrefix(s.CommonName, RehearsalPrefix) {
		return RehearsalPrefix + s.CommonName
	}
	return s.CommonName
}

// checkTokenURI accepts "pkcs11:token=…" and "tpm2:…" of printable ASCII
// without a PIN.
func checkTokenURI(uri string) error {
	ref := hsm.Ref{URI: uri}
	lower := strings.ToLower(uri)
	switch {
	case len(uri) > 1024 || strings.ContainsFunc(uri, func(r rune) bool { return r <= ' ' || r > '~' }):
		return fmt.Errorf("uri %.80q: want printable ASCII without space", uri)
	case strings.Contains(lower, "pin-value=") || strings.Contains(lower, "pin-source="):
		return errors.New("uri: a PIN has no place in a definition")
	case ref.Scheme() == "pkcs11" && tokenLabel(uri) != "":
		return nil
	case ref.Scheme() == "tpm2" && len(uri) > len("tpm2:"):
		return checkKeyFolder(uri)
	}
	return fmt.Errorf("uri %.80q: want pkcs11:token=… or tpm2:…", uri)
}

// checkKeyFolder wants the folder of a TPM's key files, if a URI names one, in
// plain: absolute, or one inside of the outputs.
func checkKeyFolder(uri string) error {
	escaped, _, _ := strings.Cut(strings.TrimPrefix(uri, "tpm2:"), "?")
	folder, err := url.PathUnescape(escaped)
	switch {
	case err != nil || !printable(folder):
		return fmt.Errorf("uri %.80q: folder malformed", uri)
	case folder == "":
		return nil
	case path.Clean(folder) != folder || folder == "." || folder == "/" || !path.IsAbs(folder) && !filepath.IsLocal(folder):
		return fmt.Errorf("uri %.80q: want a folder inside of the outputs, or an absolute one, without . and ..", uri)
	}
	return nil
}

// tokenLabel returns the token attribute of a PKCS#11 URI, or "".
func tokenLabel(uri string) string {
	rest, _, _ := strings.Cut(strings.TrimPrefix(uri, "pkcs11:"), "?")
	for _, attr := range strings.Split(rest, ";") {
		if v, ok := strings.CutPrefix(attr, "token="); ok {
			label, err := url.PathUnescape(v)
			if err != nil || len(label) > 32 {
				return ""
			}
			return label
		}
	}
	return ""
}

// checkServiceURL wants https (a rehearsal's may be http on loopback), a host
// and no path: clients drop a path or the scheme.
func checkServiceURL(s string, env Environment) error {
	u, err := url.Parse(s)
	if err != nil || u.Hostname() == "" || u.User != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("%.200q: want scheme, host and port alone", s)
	}
	if u.Scheme == "https" || env == Rehearsal && u.Scheme == "http" && loopback(u.Hostname()) {
		return nil
	}
	return fmt.Errorf("%.200q: want https", s)
}

func loopback(host string) bool {
	return host == "127.0.0.1" || host == "::1" || host == "localhost"
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// sorted returns a map's names in order, so that equal definitions give equal
// plans and equal errors.
func sorted[K ~string, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
