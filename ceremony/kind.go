package ceremony

import "fmt"

// ceremonyKind is what makes one kind of ceremony different from another. The
// engine, the transcript, the resume and the verifier are the same for all.
type ceremonyKind struct {
	// plan lists the steps between the opening (definition, people, clock) and
	// the closing (checkpoint, witnesses, end), in order. The last is usually
	// StepOutputs. It refuses with ErrNotInVersion what this version does not
	// do, and opens nothing.
	plan func(*Definition) ([]Step, error)
	// files makes every output but those that all kinds have. It is a pure
	// function of the definition and the records, or verify could not redo it.
	files func(*facts) ([]File, error)
}

// kindOf returns the kind, or ErrNotInVersion.
func kindOf(k Kind) (ceremonyKind, error) {
	switch k {
	case Genesis:
		return ceremonyKind{plan: planGenesis, files: (*facts).genesisFiles}, nil
	case Rotate, LogKey:
		return ceremonyKind{plan: planRotate, files: (*facts).laterFiles}, nil
	case IntermediateCSR:
		return ceremonyKind{plan: planIntermediateCSR, files: (*facts).laterFiles}, nil
	case SignIntermediate:
		return ceremonyKind{plan: planSignIntermediate, files: (*facts).signedFiles}, nil
	case RestoreDrill:
		return ceremonyKind{plan: planDrill, files: (*facts).laterFiles}, nil
	case Decommission:
		return ceremonyKind{plan: planDecommission, files: (*facts).laterFiles}, nil
	case CRL:
		return ceremonyKind{plan: planCRL, files: (*facts).laterFiles}, nil
	}
	return ceremonyKind{}, fmt.Errorf("kind %s: %w", k, ErrNotInVersion)
}
