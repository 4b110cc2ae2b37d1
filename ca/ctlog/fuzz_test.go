package ctlog

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// FuzzAnswer: whatever a log answers is an error, or an SCT of the pinned key,
// of this hour, whose octets are those of the answer.
func FuzzAnswer(f *testing.F) {
	noon := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	l, err := New(Config{
		URL: "https://ct.example", Key: hsmtest.SoftwareKey(hsm.ECDSAP256).Public(),
		Now: func() (time.Time, error) { return noon, nil },
	})
	if err != nil {
		f.Fatal(err)
	}
	id := base64.StdEncoding.EncodeToString(l.logID[:])
	for _, body := range []string{
		`{"sct_version":0,"id":"%s","timestamp":%d,"extensions":"","signature":"BAMAAjAA"}`,
		`{"sct_version":0,"id":"%s","timestamp":%d,"extensions":"AAE=","signature":""}`,
		`{"sct_version":1,"id":"%s","timestamp":%d}`,
		`{"SCT_VERSION":0,"id":"%s","timestamp":%d}`,
		`[{"id":"%s"},%d]`,
	} {
		f.Add(fmt.Appendf(nil, body, "LOGID", noon.UnixMilli()))
	}
	f.Add([]byte(`{}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, body []byte) {
		// The log ID differs from run to run: corpora name it by a placeholder.
		body = bytes.ReplaceAll(body, []byte("LOGID"), []byte(id))
		sct, err := l.sct(body)
		if err != nil {
			if sct != nil || !errors.Is(err, ErrAnswer) {
				t.Fatalf("%x with error %v", sct, err)
			}
			return
		}
		if len(sct) < 43 || sct[0] != 0 || !bytes.Equal(sct[1:33], l.logID[:]) {
			t.Fatalf("SCT %x", sct)
		}
		ours := time.UnixMilli(int64(binary.BigEndian.Uint64(sct[33:41])))
		if skew := ours.Sub(noon).Abs(); skew > maxSkew {
			t.Fatalf("an SCT of %v", ours)
		}
		if n := int(binary.BigEndian.Uint16(sct[41:43])); n > maxExtensions || len(sct) < 43+n {
			t.Fatalf("%d octets of extensions in %x", n, sct)
		}
	})
}
