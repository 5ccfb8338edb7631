package script

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/wait"
)

// terminal opens a pseudo-terminal: ours is the keyboard and the screen.
func terminal(t *testing.T) (ours, theirs *os.File) {
	t.Helper()
	ours, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	if err := unix.IoctlSetPointerInt(int(ours.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(ours.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	return ours, theirs
}

func TestExecGetsAnInterruptOfTheTerminalOnce(t *testing.T) {
	ours, theirs := terminal(t)
	cmd := exec.Command(binary.Deputy(t), "exec", "--socket", "/none", "--",
		"sh", "-c", `trap 'echo got' INT; echo ready; i=0; while [ $i -lt 10 ]; do sleep 0.1; i=$((i+1)); done; echo done; exit 5`)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	watchdog := time.AfterFunc(wait.Patience, func() { cmd.Process.Kill() })
	defer watchdog.Stop()
	theirs.Close()

	got := 0
	for screen := bufio.NewScanner(ours); screen.Scan(); {
		switch line := strings.TrimSpace(screen.Text()); {
		case line == "ready":
			if _, err := ours.Write([]byte{3}); err != nil { // Ctrl-C
				t.Fatal(err)
			}
		case strings.HasSuffix(line, "got"):
			got++
		}
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 5 {
		t.Errorf("got %v, want the command's status 5", err)
	}
	if got != 1 {
		t.Errorf("got %d interrupts, want 1", got)
	}
}
