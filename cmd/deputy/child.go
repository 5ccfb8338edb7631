package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// childCommand is the argument that makes this binary the child of exec. It is
// no command for people.
const childCommand = "exec-child"

// An order tells the child of exec what to become.
type order struct {
	Path string
	Args []string
	Env  []string
	As   *credential // nil: as it is
}

// A credential is a user that a command runs as.
type credential struct {
	Name   string
	Home   string
	UID    int
	GID    int
	Groups []int
}

// lookup finds a user by name or UID.
func lookup(account string) (*credential, error) {
	u, err := user.Lookup(account)
	if err != nil {
		if _, bad := strconv.ParseUint(account, 10, 32); bad == nil {
			u, err = user.LookupId(account)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("look up user %q: %w", account, err)
	}
	c := &credential{Name: u.Username, Home: u.HomeDir}
	if c.UID, err = strconv.Atoi(u.Uid); err != nil {
		return nil, fmt.Errorf("look up user %q: %w", account, err)
	}
	if c.GID, err = strconv.Atoi(u.Gid); err != nil {
		return nil, fmt.Errorf("look up user %q: %w", account, err)
	}
	groups, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("look up groups of %q: %w", account, err)
	}
	for _, g := range groups {
		gid, err := strconv.Atoi(g)
		if err != nil {
			return nil, fmt.Errorf("look up groups of %q: %w", account, err)
		}
		c.Groups = append(c.Groups, gid)
	}
	return c, nil
}

// becomeCommand is the child of exec: it waits for its order, which comes when
// the daemon knows it under its name, drops to the user and executes the
// command. Until the execve the kernel lets nobody but root trace it: it is
// root's, and from the setuid on not dumpable. It returns only with the exit
// status of a failure.
func becomeCommand() int {
	// What is set for the death of the parent belongs to the thread that executes.
	runtime.LockOSThread()
	parent := os.Getppid()
	o, err := readOrder()
	if err != nil {
		return execFailed // the parent says why
	}
	if err := o.follow(parent); err != nil {
		fmt.Fprintf(os.Stderr, "deputy: %s\n", err)
		return execStatus(err)
	}
	return execFailed
}

func readOrder() (*order, error) {
	unix.CloseOnExec(3)
	pipe := os.NewFile(3, "order")
	defer pipe.Close()
	text, err := io.ReadAll(pipe)
	if err != nil {
		return nil, err
	}
	var o order
	return &o, json.Unmarshal(text, &o)
}

func (o *order) follow(parent int) error {
	if o.As != nil {
		if err := o.As.become(); err != nil {
			return err
		}
	}
	// Who kills the parent means the command; a change of user has cleared this.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("watch parent: %w", err)
	}
	if os.Getppid() != parent {
		return errors.New("parent has ended")
	}
	err := syscall.Exec(o.Path, o.Args, o.Env)
	return cannotStart(o.Args[0], err)
}

// become drops to the user for good: groups first, while that is allowed.
func (c *credential) become() error {
	if err := syscall.Setgroups(c.Groups); err != nil {
		return fmt.Errorf("set groups: %w", err)
	}
	if err := syscall.Setresgid(c.GID, c.GID, c.GID); err != nil {
		return fmt.Errorf("set group %d: %w", c.GID, err)
	}
	if err := syscall.Setresuid(c.UID, c.UID, c.UID); err != nil {
		return fmt.Errorf("set user %d: %w", c.UID, err)
	}
	return nil
}
