// Package bundle carries files between the two machines of a ceremony on a USB
// stick: one tar file, of which every octet but the contents is known before
// it is read.
//
// # Form
//
// A bundle is a POSIX ustar archive of regular files with mode 0644, owner 0
// and time 0. The first is manifest.json; the others follow in the order of
// its list, which is the order of the names that both machines know from the
// definition; then come two blocks of zeros, and nothing. The manifest says
// which ceremony the bundle belongs to, whether it is a request or the response
// to one (and to which), the head of the sender's transcript, and of each file
// the size and the SHA-256. It ends with the words (BIP-39, 24 of them) of its
// own hash, which people read aloud from both screens.
//
// # What it promises
//
// Read parses no archive. It computes what each header must be and compares:
// so there are no links, devices, folders, paths, sparse files, extensions,
// double or other names, and no other order, because there is no code for them.
// It reads at most MaxSize octets, whatever a header says. What it returns is
// in memory and complete, or nothing. Extract writes into a folder that it
// makes itself, under names that have no slash.
//
// # What it trusts
//
// Nothing on the stick. That a bundle comes from the other machine is not
// shown by its octets: the words are compared by people, and what is in it has
// signatures of its own.
package bundle

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/tyler-smith/go-bip39"

	"github.com/chancery-ca/chancery/ceremony/durable"
)

// Errors that callers branch on.
var (
	// ErrFormat: not a bundle, or one with something in it that does not belong.
	ErrFormat = errors.New("not a valid bundle")
	// ErrTooLarge: more than a bundle may have.
	ErrTooLarge = errors.New("bundle too large")
	// ErrTruncated: the bundle ends early: the stick was pulled, or is full.
	ErrTruncated = errors.New("bundle is cut short")
	// ErrOther: a bundle, but of another ceremony, of the other kind, or the
	// response to another request.
	ErrOther = errors.New("not the expected bundle")
	// ErrContent: a file is not the one that the manifest lists.
	ErrContent = errors.New("file differs from the manifest")
)

// The bounds of a bundle.
const (
	// MaxFile is the most octets of one file.
	MaxFile = 4 << 20
	// MaxSize is the most octets of a whole bundle.
	MaxSize = 16 << 20
	// MaxFiles is how many files a bundle may have beside the manifest.
	MaxFiles = 256
)

// ManifestName is the name of the first entry.
const ManifestName = "manifest.json"

const (
	maxManifest = 64 << 10
	block       = 512 // octets of a tar block
	version     = 1
)

// Kind says in which direction a bundle goes.
type Kind string

// The kinds: from the online machine to the offline one, and back.
const (
	Request  Kind = "request"
	Response Kind = "response"
)

var (
	fileName   = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,98}$`)
	ceremonyID = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{1,62}[a-z0-9]$`)
)

// File is a file in a bundle.
type File struct {
	// Name is [a-z0-9][a-z0-9._-]{0,98}: never a path.
	Name    string
	Content []byte
}

// Header is what a bundle says of itself.
type Header struct {
	// Ceremony is the id of the ceremony.
	Ceremony string
	Kind     Kind
	// Head is the hash of the last record of the sender's transcript.
	Head [sha256.Size]byte
	// InReplyTo is the Hash of the request that a response answers; zero in a
	// request.
	InReplyTo [sha256.Size]byte
}

func (h Header) check() error {
	switch {
	case !ceremonyID.MatchString(h.Ceremony):
		return fmt.Errorf("ceremony id %.80q: %w", h.Ceremony, ErrFormat)
	case h.Kind != Request && h.Kind != Response:
		return fmt.Errorf("kind %.20q: %w", h.Kind, ErrFormat)
	case h.Head == [sha256.Size]byte{}:
		return fmt.Errorf("no head of a transcript: %w", ErrFormat)
	case (h.Kind == Response) != (h.InReplyTo != [sha256.Size]byte{}):
		return fmt.Errorf("a response answers a request, a request nothing: %w", ErrFormat)
	}
	return nil
}

// Bundle is a bundle in memory: checked, whole.
type Bundle struct {
	Header
	Files []File
	hash  [sha256.Size]byte
	words string
}

// Hash returns the SHA-256 of the manifest without its words. It covers every
// octet of the bundle.
func (b *Bundle) Hash() [sha256.Size]byte { return b.hash }

// Words returns Hash as the 24 words of BIP-39's English list.
func (b *Bundle) Words() string { return b.words }

// File returns the content of a file, or nil if the bundle has none of the name.
func (b *Bundle) File(name string) []byte {
	for _, f := range b.Files {
		if f.Name == name {
			return f.Content
		}
	}
	return nil
}

// The wire form of the manifest.
type manifest struct {
	Version   int             `json:"version"`
	Ceremony  string          `json:"ceremony"`
	Kind      Kind            `json:"kind"`
	Head      string          `json:"head"`
	InReplyTo string          `json:"in-reply-to,omitempty"`
	Files     []manifestEntry `json:"files"`
	Words     string          `json:"words,omitempty"`
}

type manifestEntry struct {
	Name   string `json:"name"`
	Size   int    `json:"size"`
	SHA256 string `json:"sha256"`
}

// New makes a bundle of files in this order. It fails with ErrFormat or
// ErrTooLarge.
func New(h Header, files []File) (*Bundle, error) {
	if err := h.check(); err != nil {
		return nil, fmt.Errorf("make bundle: %w", err)
	}
	if len(files) == 0 || len(files) > MaxFiles {
		return nil, fmt.Errorf("make bundle: %d files, want 1 to %d: %w", len(files), MaxFiles, ErrTooLarge)
	}
	seen := map[string]bool{ManifestName: true}
	total := maxManifest + 3*block
	for _, f := range files {
		if !fileName.MatchString(f.Name) || seen[f.Name] {
			return nil, fmt.Errorf("make bundle: name %.120q is not plain, or twice: %w", f.Name, ErrFormat)
		}
		seen[f.Name] = true
		if total += block + padded(len(f.Content)); len(f.Content) > MaxFile || total > MaxSize {
			return nil, fmt.Errorf("make bundle: %s: at most %d octets a file, %d in all: %w", f.Name, MaxFile, MaxSize, ErrTooLarge)
		}
	}
	b := &Bundle{Header: h, Files: files}
	m := b.manifest()
	raw, err := m.encode()
	if err != nil {
		return nil, err
	}
	b.hash = sha256.Sum256(raw)
	if b.words, err = bip39.NewMnemonic(b.hash[:]); err != nil {
		return nil, fmt.Errorf("make bundle: words: %w", err)
	}
	return b, nil
}

// padded rounds up to whole blocks.
func padded(n int) int { return (n + block - 1) / block * block }

func (b *Bundle) manifest() manifest {
	m := manifest{Version: version, Ceremony: b.Ceremony, Kind: b.Kind, Head: hex.EncodeToString(b.Head[:]), Words: b.words}
	if b.Kind == Response {
		m.InReplyTo = hex.EncodeToString(b.InReplyTo[:])
	}
	for _, f := range b.Files {
		h := sha256.Sum256(f.Content)
		m.Files = append(m.Files, manifestEntry{f.Name, len(f.Content), hex.EncodeToString(h[:])})
	}
	return m
}

func (m manifest) encode() ([]byte, error) {
	raw, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	return append(raw, '\n'), nil
}

// tarHeader returns the one header that a file of this name and size has.
func tarHeader(name string, size int) ([]byte, error) {
	var b bytes.Buffer
	err := tar.NewWriter(&b).WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: name, Size: int64(size), Mode: 0o644, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR,
	})
	if err != nil || b.Len() != block {
		return nil, fmt.Errorf("make header of %s (%d octets): %w", name, b.Len(), errors.Join(ErrFormat, err))
	}
	return b.Bytes(), nil
}

// Encode returns the octets of the bundle.
func (b *Bundle) Encode() ([]byte, error) {
	raw, err := b.manifest().encode()
	if err != nil {
		return nil, err
	}
	if len(raw) > maxManifest {
		return nil, fmt.Errorf("manifest of %d octets: %w", len(raw), ErrTooLarge)
	}
	var out bytes.Buffer
	for _, f := range append([]File{{ManifestName, raw}}, b.Files...) {
		header, err := tarHeader(f.Name, len(f.Content))
		if err != nil {
			return nil, err
		}
		out.Write(header)
		out.Write(f.Content)
		out.Write(make([]byte, padded(len(f.Content))-len(f.Content)))
	}
	out.Write(make([]byte, 2*block))
	return out.Bytes(), nil
}

// WriteFile writes the bundle to a file that does not exist yet, and to the
// medium: when it returns nil the stick may be pulled after it is unmounted.
// On an error the file is removed.
func (b *Bundle) WriteFile(path string) error {
	data, err := b.Encode()
	if err != nil {
		return err
	}
	err = durable.Create(path, data, 0o644)
	if err == nil {
		err = durable.SyncFolder(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	return nil
}

// Extract makes the folder dir, which must not exist, and writes every file of
// the bundle into it, each exclusively and to disk. The manifest is not one of
// them.
func (b *Bundle) Extract(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("extract bundle: %w", err)
	}
	for _, f := range b.Files { // their names are no paths
		if err := durable.Create(filepath.Join(dir, f.Name), f.Content, 0o644); err != nil {
			return fmt.Errorf("extract %s: %w", f.Name, err)
		}
	}
	for _, d := range []string{dir, filepath.Dir(filepath.Clean(dir))} {
		if err := durable.SyncFolder(d); err != nil {
			return fmt.Errorf("extract bundle: %w", err)
		}
	}
	return nil
}

// Expect is what the receiver knows of the bundle that should come.
type Expect struct {
	// Ceremony and Kind are those of Header; InReplyTo is the Hash of the
	// request that was sent, zero when a request is expected.
	Ceremony  string
	Kind      Kind
	InReplyTo [sha256.Size]byte
	// Names are the files that may be in it, in the order of the bundle. Which
	// of them must be is the caller's to say.
	Names []string
}

// check compares a manifest with what is expected.
func (e Expect) check(h Header, files []manifestEntry) error {
	switch {
	case h.Ceremony != e.Ceremony:
		return fmt.Errorf("of ceremony %s, not %s: %w", h.Ceremony, e.Ceremony, ErrOther)
	case h.Kind != e.Kind:
		return fmt.Errorf("a %s, not a %s: %w", h.Kind, e.Kind, ErrOther)
	case h.InReplyTo != e.InReplyTo:
		return fmt.Errorf("the response to another request: %w", ErrOther)
	}
	at := 0
	for _, f := range files {
		next := slices.Index(e.Names[at:], f.Name)
		if next < 0 {
			return fmt.Errorf("file %.120q is unknown, or out of order: %w", f.Name, ErrFormat)
		}
		at += next + 1
	}
	return nil
}

// ReadFile reads the bundle at path, which must be a regular file of at most
// MaxSize octets. See Read.
func ReadFile(path string, want Expect) (*Bundle, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("read bundle: %s is no regular file: %w", filepath.Base(path), ErrFormat)
	}
	if info.Size() > MaxSize {
		return nil, fmt.Errorf("read bundle: %d octets, at most %d: %w", info.Size(), MaxSize, ErrTooLarge)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	defer f.Close()
	return Read(f, want)
}

// Read reads a bundle to its end and checks all of it. Errors: ErrFormat,
// ErrTooLarge, ErrTruncated, ErrOther, ErrContent, or the reader's.
func Read(r io.Reader, want Expect) (*Bundle, error) {
	in := &reader{r: io.LimitReader(r, MaxSize+1)}
	b, err := in.bundle(want)
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	return b, nil
}

// reader takes blocks from a stream that it does not believe.
type reader struct{ r io.Reader }

// take reads exactly n octets.
func (in *reader) take(n int) ([]byte, error) {
	b := make([]byte, n)
	_, err := io.ReadFull(in.r, b)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, ErrTruncated
	}
	return b, err
}

// entry reads the content of a file whose header was compared, and its padding.
func (in *reader) entry(size int) ([]byte, error) {
	b, err := in.take(padded(size))
	if err != nil {
		return nil, err
	}
	if !zero(b[size:]) {
		return nil, fmt.Errorf("padding is not zero: %w", ErrFormat)
	}
	return b[:size:size], nil
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

func (in *reader) bundle(want Expect) (*Bundle, error) {
	raw, err := in.manifest()
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	h, entries, err := parseManifest(raw)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if err := want.check(h, entries); err != nil {
		return nil, err
	}
	var files []File
	for _, e := range entries {
		content, err := in.file(e)
		if err != nil {
			return nil, fmt.Errorf("file %s: %w", e.Name, err)
		}
		files = append(files, File{e.Name, content})
	}
	if err := in.end(); err != nil {
		return nil, err
	}
	b, err := New(h, files)
	if err != nil {
		return nil, err
	}
	if again, err := b.manifest().encode(); err != nil || !bytes.Equal(again, raw) {
		return nil, fmt.Errorf("manifest: not in our form, or words of another hash: %w", ErrFormat)
	}
	return b, nil
}

// manifest reads the first entry. Its size is the one thing in a header that is
// not known before.
func (in *reader) manifest() ([]byte, error) {
	header, err := in.take(block)
	if err != nil {
		return nil, err
	}
	var size int
	if n, err := fmt.Sscanf(string(header[124:136]), "%o", &size); n != 1 || err != nil || size < 1 || size > maxManifest {
		return nil, fmt.Errorf("first header: %w", ErrFormat)
	}
	if err := sameHeader(header, ManifestName, size); err != nil {
		return nil, err
	}
	return in.entry(size)
}

func sameHeader(header []byte, name string, size int) error {
	expected, err := tarHeader(name, size)
	if err != nil {
		return err
	}
	if !bytes.Equal(header, expected) {
		return fmt.Errorf("not a regular file of this name, size and mode: %w", ErrFormat)
	}
	return nil
}

// parseManifest reads the manifest. That it is in our form is found out when it
// is written again.
func parseManifest(raw []byte) (Header, []manifestEntry, error) {
	var m manifest
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&m); err != nil {
		return Header{}, nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	h := Header{Ceremony: m.Ceremony, Kind: m.Kind}
	if m.Version != version || len(m.Files) == 0 || len(m.Files) > MaxFiles {
		return h, nil, fmt.Errorf("version %d, %d files: %w", m.Version, len(m.Files), ErrFormat)
	}
	if !hash(m.Head, &h.Head) || m.InReplyTo != "" && !hash(m.InReplyTo, &h.InReplyTo) {
		return h, nil, fmt.Errorf("a hash is not 64 hexadecimal digits: %w", ErrFormat)
	}
	total := 0
	for _, e := range m.Files {
		if total += padded(max(e.Size, 0)); e.Size < 0 || e.Size > MaxFile || total > MaxSize {
			return h, nil, fmt.Errorf("file %.120q of %d octets: at most %d, %d in all: %w", e.Name, e.Size, MaxFile, MaxSize, ErrTooLarge)
		}
		if !fileName.MatchString(e.Name) {
			return h, nil, fmt.Errorf("file name %.120q: %w", e.Name, ErrFormat)
		}
	}
	return h, m.Files, h.check()
}

func hash(s string, into *[sha256.Size]byte) bool {
	b, err := hex.DecodeString(s)
	return err == nil && copy(into[:], b) == sha256.Size && len(b) == sha256.Size
}

func (in *reader) file(e manifestEntry) ([]byte, error) {
	header, err := in.take(block)
	if err != nil {
		return nil, err
	}
	if err := sameHeader(header, e.Name, e.Size); err != nil {
		return nil, err
	}
	content, err := in.entry(e.Size)
	if err != nil {
		return nil, err
	}
	if h := sha256.Sum256(content); hex.EncodeToString(h[:]) != e.SHA256 {
		return nil, ErrContent
	}
	return content, nil
}

// end reads the two blocks of zeros and then nothing.
func (in *reader) end() error {
	tail, err := in.take(2 * block)
	if err != nil {
		return err
	}
	if !zero(tail) {
		return fmt.Errorf("more files than the manifest lists: %w", ErrFormat)
	}
	if n, err := io.ReadFull(in.r, make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		return fmt.Errorf("something follows the end: %w", ErrFormat)
	}
	return nil
}
