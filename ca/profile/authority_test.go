package profile

import (
	"testing"
)

func TestHierarchy(t *testing.T) {
	h := newHierarchy(t)
	i := newIssuer(t, h)
	if _, err := i.Leaf(emailSpec(newKey(t, ecdsaSHA256.curve).Public())); err != nil {
		t.Fatal(err)
	}
}
