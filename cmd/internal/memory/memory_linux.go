package memory

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Seal sees to it that the process leaves no core file (RLIMIT_CORE 0, which
// its children inherit) and that no other process of its user can read its
// memory, its environment or its registers: /proc/PID belongs to root and
// ptrace is refused (PR_SET_DUMPABLE, prctl(2)). Root can still read it all.
//
// Both can only be undone by the process itself, which does not, and by
// executing another program. A sandbox that forbids setting limits is content
// if it has set this one.
func Seal() error {
	err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	var now unix.Rlimit
	if err != nil && (unix.Getrlimit(unix.RLIMIT_CORE, &now) != nil || now.Cur != 0) {
		return fmt.Errorf("forbid core files: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid reading the memory: %w", err)
	}
	return nil
}
