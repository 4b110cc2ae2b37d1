package tuf

import "testing"

// BenchmarkNew is what a verifier or a service pays at its start.
func BenchmarkNew(b *testing.B) {
	p := newPeople(3)
	first := p.genesis(b, someTargets())
	root2 := signed(b, must(NewRoot(p.layout, first.Root(), start))(b), p.custodians...)
	files := p.assemble(b, append(first.RootFiles(), root2), 2, someTargets(), start).Files()
	for b.Loop() {
		if _, err := New(files); err != nil {
			b.Fatal(err)
		}
	}
}
