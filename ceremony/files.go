package ceremony

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/chancery-ca/chancery/ceremony/durable"
)

// ErrOutputExists: a file that the ceremony would write exists already.
var ErrOutputExists = errors.New("output exists")

// File is one output: its slash-separated name below the output folder and
// the SHA-256 of its octets, in hexadecimal.
type File struct {
	Name   string `json:"name"`
	SHA256 string `json:"sha256"`
	Size   int    `json:"size"`

	content []byte
}

func newFile(name string, content []byte) File {
	h := sha256.Sum256(content)
	return File{name, hex.EncodeToString(h[:]), len(content), content}
}

// write puts the file below dir, so that its name is either absent or complete
// (durable.Publish). A file that exists with the same octets is left (an
// interrupted ceremony wrote it); with others it is ErrOutputExists.
func (f File) write(dir string) error {
	path := filepath.Join(dir, filepath.FromSlash(f.Name))
	err := durable.MakeFolder(filepath.Dir(path), 0o755)
	if err == nil {
		err = durable.Publish(path, f.content, 0o644)
	}
	if errors.Is(err, fs.ErrExist) {
		err = fmt.Errorf("%w: %w", ErrOutputExists, err)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", f.Name, err)
	}
	return nil
}
