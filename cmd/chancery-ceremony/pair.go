package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/ceremony/durable"
	"github.com/chancery-ca/chancery/hsm"
)

const (
	// pairingsFolder has what a rehearsal's tokens share, a file for each pair.
	// Nothing in it is secret.
	pairingsFolder = "pairings"
	// officerSuffix ends the name of the file with a practice token's SO-PIN.
	officerSuffix = ".so"
	// maxPairing bounds the file of a pair, in octets.
	maxPairing = 16 << 10
)

// pair is a token whose keys have a backup, and the one that gets it, by the
// names of the definition.
type pair struct{ source, target string }

// pairs are those that a definition's backups need.
func pairs(def *ceremony.Definition) []pair {
	var all []pair
	for _, k := range def.Keys {
		if k.Protection == ceremony.WrappedBackup && k.Backup != nil && !slices.Contains(all, pair{k.Token, k.Backup.Token}) {
			all = append(all, pair{k.Token, k.Backup.Token})
		}
	}
	slices.SortFunc(all, func(a, b pair) int { return strings.Compare(a.source+"\x00"+a.target, b.source+"\x00"+b.target) })
	return all
}

// pairUp pairs the software tokens of a rehearsal, as the security officers of
// the real ones do before the ceremony (chancery hsm pair). It is called before
// any of them is open. One that was killed after the wrapping key was made, and
// before that was written down, leaves a key that nothing uses.
func (s *tokenSource) pairUp(ctx context.Context) error {
	for _, p := range pairs(s.def) {
		if _, err := os.Stat(s.pairingFile(p)); err == nil {
			continue
		} else if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("look for pairing: %w", err)
		}
		made, err := s.pairNow(ctx, p)
		if err != nil {
			return fmt.Errorf("pair practice tokens %s and %s: %w", p.source, p.target, err)
		}
		text, err := json.MarshalIndent(made, "", "  ")
		if err != nil {
			return fmt.Errorf("encode pairing: %w", err)
		}
		if err := errors.Join(durable.MakeFolder(filepath.Dir(s.pairingFile(p)), 0o755),
			durable.Replace(s.pairingFile(p), append(text, '\n'), 0o644)); err != nil {
			return fmt.Errorf("write pairing: %w", err)
		}
	}
	return nil
}

// pairNow makes both tokens, if they are not there, and a wrapping key in them.
func (s *tokenSource) pairNow(ctx context.Context, p pair) (hsm.Pairing, error) {
	var offices [2]officer
	for i, name := range []string{p.source, p.target} {
		var err error
		if offices[i].module, offices[i].uri, err = s.makeSoft(name); err != nil {
			return hsm.Pairing{}, err
		}
		if offices[i].pin, err = loadPIN(filepath.Join(s.dir, pinsFolder, name+officerSuffix)); err != nil {
			return hsm.Pairing{}, err
		}
		defer clear(offices[i].pin)
	}
	return pairPKCS11(ctx, "practice-"+rand.Text()[:8], offices[0], offices[1])
}

// officer is a token and the PIN of its security officer.
type officer struct {
	module, uri string
	pin         []byte
}

func (s *tokenSource) pairingFile(p pair) string {
	return filepath.Join(s.dir, pairingsFolder, p.source+"-"+p.target+".json")
}

// pairing is what Options.Pairing wants.
func (s *tokenSource) pairing(source, target string) (hsm.Pairing, error) {
	var made hsm.Pairing
	text, err := readFile(s.pairingFile(pair{source, target}), maxPairing)
	if err == nil {
		err = json.Unmarshal(text, &made)
	}
	if err != nil {
		return made, fmt.Errorf("read pairing: %w", err)
	}
	return made, nil
}
