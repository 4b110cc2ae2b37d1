package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/hsm"
)

// custodianTokens are the software tokens of an unattended rehearsal's
// custodians: each has one of their own, with one key.
type custodianTokens struct {
	source *tokenSource
	open   []hsm.Token
	keys   map[string]hsm.Key
}

// custodians returns what Options.Custodian wants, and nil where custodians
// bring their signatures: in production, and when people practise.
func (f *runFlags) custodians(source *tokenSource, def *ceremony.Definition) *custodianTokens {
	if def.Environment != ceremony.Rehearsal || def.TUF == nil || f.ask {
		return nil
	}
	return &custodianTokens{source: source, keys: map[string]hsm.Key{}}
}

// key opens a custodian's key, after making the token and the key the first
// time.
func (c *custodianTokens) key(ctx context.Context, id string) (hsm.Key, error) {
	if key, ok := c.keys[id]; ok {
		return key, nil
	}
	label := "custodian-" + id
	if _, taken := c.source.def.Tokens[label]; taken {
		return nil, fmt.Errorf("the definition has a token %s: %w", label, hsm.ErrExists)
	}
	pin, err := loadPIN(filepath.Join(c.source.dir, pinsFolder, label))
	if err != nil {
		return nil, err
	}
	defer clear(pin)
	module, err := c.source.soft.make(filepath.Join(c.source.dir, tokensFolder), label, []byte(rand.Text()), pin) // no officer ever comes
	if err != nil {
		return nil, err
	}
	tok, err := openPKCS11(ctx, module, "pkcs11:token="+url.PathEscape(label), pin)
	if err != nil {
		return nil, err
	}
	c.open = append(c.open, tok)
	sum := sha256.Sum256([]byte(label))
	key, err := tok.Find(ctx, sum[:hsm.IDSize])
	if errors.Is(err, hsm.ErrNotFound) {
		key, err = tok.Generate(ctx, hsm.Spec{Label: "tuf", ID: sum[:hsm.IDSize], Algorithm: hsm.ECDSAP256})
	}
	if err == nil {
		c.keys[id] = key
	}
	return key, err
}

// close logs out of every custodian's token.
func (c *custodianTokens) close() error {
	if c == nil {
		return nil
	}
	var all []error
	for _, tok := range c.open {
		all = append(all, tok.Close())
	}
	c.open = nil
	return errors.Join(all...)
}
