package sshsig

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const namespace = "chancery-ceremony@v1"

var message = []byte("chancery-ceremony/example\n3\nAAAA\n")

// fixedKey is the same in every run.
func fixedKey(b byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{b}, ed25519.SeedSize))
}

func public(t testing.TB, key ed25519.PrivateKey) PublicKey {
	t.Helper()
	k, err := NewPublicKey(key.Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func signature(t testing.TB, key ed25519.PrivateKey) []byte {
	t.Helper()
	armored, err := Sign(key, message, namespace)
	if err != nil {
		t.Fatal(err)
	}
	return armored
}

// keygen runs ssh-keygen with standard input.
func keygen(t *testing.T, dir string, stdin []byte, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		const reason = "ssh-keygen is not installed"
		if os.Getenv("CHANCERY_REQUIRE_HSM") == "1" { // as hsmtest.Missing, which needs cgo
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
	cmd := exec.CommandContext(t.Context(), "ssh-keygen", args...)
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// What ssh-keygen signs we verify, and what we sign ssh-keygen verifies.
func TestOpenSSH(t *testing.T) {
	dir := t.TempDir()
	if out, err := keygen(t, dir, nil, "-q", "-t", "ed25519", "-N", "", "-C", "w1", "-f", "key"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	line, err := os.ReadFile(filepath.Join(dir, "key.pub"))
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := ParsePublicKey(string(line))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "message"), message, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := keygen(t, dir, nil, "-Y", "sign", "-f", "key", "-n", namespace, "message"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	armored, err := os.ReadFile(filepath.Join(dir, "message.sig"))
	if err != nil {
		t.Fatal(err)
	}
	if err := theirs.Verify(message, namespace, armored); err != nil {
		t.Errorf("a signature of ssh-keygen: %v", err)
	}
	ours := fixedKey(7)
	files := map[string]string{"allowed": "w1 " + public(t, ours).String() + "\n", "ours.sig": string(signature(t, ours))}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := keygen(t, dir, message, "-Y", "verify", "-f", "allowed", "-I", "w1", "-n", namespace, "-s", "ours.sig"); err != nil {
		t.Errorf("ssh-keygen refuses our signature: %v: %s", err, out)
	}
	if out, err := keygen(t, dir, append([]byte("x"), message...), "-Y", "verify", "-f", "allowed", "-I", "w1", "-n", namespace, "-s", "ours.sig"); err == nil {
		t.Errorf("ssh-keygen accepts our signature for another message: %s", out)
	}
}

func TestVerifyRefuses(t *testing.T) {
	key := fixedKey(1)
	good := signature(t, key)
	if err := public(t, key).Verify(message, namespace, good); err != nil {
		t.Fatal(err)
	}
	raw, err := unarmor(good)
	if err != nil {
		t.Fatal(err)
	}
	at := func(old, new string) []byte { return armor(bytes.Replace(raw, []byte(old), []byte(new), 1)) }
	for _, tc := range []struct {
		name      string
		key       PublicKey
		message   string
		namespace string
		armored   []byte
		want      error
	}{
		{"another message", public(t, key), "x", namespace, good, ErrSignature},
		{"another namespace", public(t, key), string(message), "file", good, ErrSignature},
		{"another key", public(t, fixedKey(2)), string(message), namespace, good, ErrSignature},
		{"another hash", public(t, key), string(message), namespace, at("sha512", "sha256"), ErrSignature},
		{"another algorithm", public(t, key), string(message), namespace, at("\x00\x00\x00\x53\x00\x00\x00\x0bssh-ed25519", "\x00\x00\x00\x53\x00\x00\x00\x0bssh-ed25518"), ErrSignature},
		{"another version", public(t, key), string(message), namespace, at("SSHSIG\x00\x00\x00\x01", "SSHSIG\x00\x00\x00\x02"), ErrFormat},
		{"another magic", public(t, key), string(message), namespace, at("SSHSIG", "SSHSIX"), ErrFormat},
		{"something after", public(t, key), string(message), namespace, armor(append(bytes.Clone(raw), 0)), ErrFormat},
		{"cut", public(t, key), string(message), namespace, armor(raw[:len(raw)-1]), ErrFormat},
		{"nothing", public(t, key), string(message), namespace, nil, ErrFormat},
		{"no armor", public(t, key), string(message), namespace, raw, ErrFormat},
		{"other line breaks", public(t, key), string(message), namespace, bytes.ReplaceAll(good, []byte("\n"), []byte("\r\n")), ErrFormat},
		{"text before", public(t, key), string(message), namespace, append([]byte("x"), good...), ErrFormat},
		{"text after", public(t, key), string(message), namespace, append(bytes.Clone(good), 'x'), ErrFormat},
		{"one long line", public(t, key), string(message), namespace, []byte(begin + "\n" + base64.StdEncoding.EncodeToString(raw) + "\n" + end + "\n"), ErrFormat},
		{"huge", public(t, key), string(message), namespace, bytes.Repeat([]byte("A"), MaxArmored+1), ErrFormat},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := tc.key.Verify([]byte(tc.message), tc.namespace, tc.armored); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
		})
	}
	for i := range good { // a signature has one form
		changed := bytes.Clone(good)
		changed[i] ^= 1
		if err := public(t, key).Verify(message, namespace, changed); err == nil {
			t.Errorf("octet %d changed from %q to %q: accepted", i, good[i], changed[i])
		}
	}
}

func TestParsePublicKey(t *testing.T) {
	good := public(t, fixedKey(1)).String()
	fields := strings.Fields(good)
	for _, tc := range []struct{ name, line string }{
		{"empty", ""},
		{"no key", "ssh-ed25519"},
		{"another algorithm", "ssh-rsa " + fields[1]},
		{"another algorithm inside", "ssh-ed25519 " + strings.Replace(fields[1], "AAAAC3NzaC1lZDI1NTE5", "AAAAC3NzaC1lZDI1NTE4", 1)},
		{"not base64", "ssh-ed25519 ****"},
		{"cut", "ssh-ed25519 " + fields[1][:len(fields[1])-8]},
		{"something after", "ssh-ed25519 " + fields[1] + "AAAA"},
		{"options before", "no-pty " + good},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := ParsePublicKey(tc.line); !errors.Is(err, ErrFormat) {
				t.Errorf("error %v, want ErrFormat", err)
			}
		})
	}
	if k, err := ParsePublicKey(good + " a comment"); err != nil || !k.Equal(public(t, fixedKey(1))) {
		t.Errorf("a good line: %v", err)
	}
	if _, err := NewPublicKey(nil); !errors.Is(err, ErrFormat) {
		t.Errorf("no key: %v, want ErrFormat", err)
	}
	if _, err := Sign(nil, message, namespace); !errors.Is(err, ErrFormat) {
		t.Errorf("sign without a key: %v, want ErrFormat", err)
	}
}

func FuzzVerify(f *testing.F) {
	key := fixedKey(1)
	good := signature(f, key)
	k := public(f, key)
	f.Add(good)
	f.Add([]byte(begin + "\n" + end + "\n"))
	raw, err := unarmor(good)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(armor(raw[:40]))
	f.Fuzz(func(t *testing.T, armored []byte) {
		if err := k.Verify(message, namespace, armored); err == nil && !bytes.Equal(armored, good) {
			t.Fatal("a second form of one signature was accepted")
		}
	})
}

func FuzzParsePublicKey(f *testing.F) {
	f.Add(public(f, fixedKey(1)).String())
	f.Add("ssh-ed25519 AAAA")
	f.Fuzz(func(t *testing.T, line string) {
		k, err := ParsePublicKey(line)
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatalf("error %v is not ErrFormat", err)
			}
			return
		}
		if again, err := ParsePublicKey(k.String()); err != nil || !again.Equal(k) {
			t.Fatalf("%q gives another key again: %v", line, err)
		}
	})
}
