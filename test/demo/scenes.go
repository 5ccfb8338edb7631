package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// The users of the demonstration, where we may choose: numbers that no
// distribution gives away.
const plannerUID, researcherUID, intruderUID = 61001, 61002, 61003

const (
	plannerID    = "spiffe://demo.example/agent/planner"
	researcherID = "spiffe://demo.example/agent/researcher"
	crawlerID    = "spiffe://demo.example/agent/crawler"
)

func say(format string, args ...any) { fmt.Printf("\n"+format+"\n", args...) }

var errInterrupted = errors.New("interrupted")

// demonstrate sets up, plays and cleans up, in this order also when it is
// interrupted: then the play ends where it is.
func demonstrate() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // who cannot wait for the clean-up asks again
	// Before its first process Go 1.26 tries out clone(2) with signals let
	// through, and an interrupt just then crashes it: do that while there is
	// nothing yet to clean up.
	os.FindProcess(os.Getpid())
	s, err := setUp()
	if s != nil {
		defer s.close()
	}
	if err == nil {
		err = s.play(ctx)
	}
	if err == nil {
		return nil
	}
	// A terminal interrupts the agents too, whose end may be seen before the
	// signal itself.
	select {
	case <-ctx.Done():
		return errInterrupted
	case <-time.After(200 * time.Millisecond):
		return err
	}
}

// play is one scene after the other.
func (s *stage) play(ctx context.Context) error {
	fmt.Println("Deputy gives each agent process an identity of its own, from what the kernel says of it.")
	root := os.Getuid() == 0
	var box *container
	var err error
	if root {
		say("1. A container engine, for the agent that will run in a container.")
		if box, err = s.container(); ctx.Err() != nil {
			return ctx.Err()
		} else if err != nil {
			fmt.Printf("    None can be had here (%v):\n    the demonstration goes on without the container and its image digest.\n", err)
		}
	} else {
		say("1. Without root there is one user and no container: the two agents differ by their path alone,\n   and the scenes with a container and with another user are left out.")
	}

	say("2. The daemon starts, with an entry for each agent. SVIDs live for ten seconds here, to see them renewed.")
	planner, researcher, place, err := s.cast(root)
	if err != nil {
		return err
	}
	config := fmt.Sprintf(`trust_domain = "demo.example"
data_dir     = %q
workload_socket { path = %q }
admin_socket    { path = %q }

entry "/agent/planner" {
  selectors = [%s]
  x509_ttl  = "10s"
}

entry "/agent/researcher" {
  selectors = [%s]
  x509_ttl  = "10s"
}
`, filepath.Join(s.dir, "data"), s.workload, s.admin, planner.selectors, researcher.selectors)
	if box != nil {
		config += fmt.Sprintf("\nattestor \"docker\" { socket = %q }\n\nentry \"/agent/crawler\" {\n  selectors = [%q, \"process:leader:true\"]\n}\n", box.engine.Socket(), box.digest)
	}
	fmt.Print(indent(config[strings.Index(config, "\nentry")+1:]))
	if err := s.run(ctx, config); err != nil {
		return err
	}

	say("3. The researcher starts: a server that admits the planner alone. This is what was attested of it:")
	address := filepath.Join(s.dir, "meet", "s")
	if err := os.Mkdir(filepath.Dir(address), 0o777); err != nil {
		return err
	}
	if err := os.Chmod(filepath.Dir(address), 0o777); err != nil {
		return err
	}
	server, err := s.start(place(researcher.command(s, "serve", address, plannerID)))
	if err != nil {
		return err
	}
	svid, err := server.line(ctx, 15*time.Second)
	if err != nil {
		return fmt.Errorf("the researcher: %w", err)
	}
	fmt.Printf("    PID %d\n", server.cmd.Process.Pid)
	if err := s.attested(server.cmd.Process.Pid, "unix:uid", "unix:path", "unix:sha256", "cgroup:path", "process:host"); err != nil {
		return err
	}
	fmt.Printf("  so it is %s: %s\n", researcherID, svid)

	say("4. The planner calls it over mTLS, each accepting the other's SPIFFE ID only, and gets a token for a tool:")
	if err := show(planner.command(s, "call", address, researcherID)); err != nil {
		return fmt.Errorf("the planner: %w", err)
	}

	if root {
		say("5. Another user runs the very same program:")
		if err := refused(s.as(intruderUID, "whoami")); err != nil {
			return err
		}
	} else {
		say("5. The same program under another path asks:")
		if err := refused(exec.Command(filepath.Join(s.dir, "agent"), "whoami", s.workload)); err != nil {
			return err
		}
	}

	if box != nil {
		say("6. The crawler runs in a container. Its identity hangs on the image's digest, not on a tag:")
		if err := box.show(ctx, s); err != nil {
			return fmt.Errorf("the container: %w", err)
		}
	}

	say("7. Meanwhile the researcher's SVID is renewed at half of its life, with a new key, on the open stream:")
	fmt.Println("   ", svid)
	for range 2 {
		next, err := server.line(ctx, 15*time.Second)
		if err != nil {
			return fmt.Errorf("the researcher: %w", err)
		}
		fmt.Println("   ", next)
	}
	say("That was all: the processes end, and their identities with them. The README says how to run it for real.")
	return nil
}

// A part is an agent: the selectors of its entry, and how it is started.
type part struct {
	selectors string
	command   func(s *stage, role string, args ...string) *exec.Cmd
}

// cast gives out the parts. As root the agents are two users, one of them known
// by its executable's digest and one by its cgroup; else they are two paths.
// place puts the researcher where its entry looks for it.
func (s *stage) cast(root bool) (planner, researcher part, place func(*exec.Cmd) *exec.Cmd, err error) {
	place = func(c *exec.Cmd) *exec.Cmd { return c }
	if !root {
		at := func(name string) (part, error) {
			program, err := os.ReadFile(s.agent)
			if err != nil {
				return part{}, err
			}
			path := filepath.Join(s.dir, name)
			return part{
				selectors: fmt.Sprintf(`"unix:uid:%d", "unix:path:%s"`, os.Getuid(), path),
				command: func(s *stage, role string, args ...string) *exec.Cmd {
					return exec.Command(path, append([]string{role, s.workload}, args...)...)
				},
			}, os.WriteFile(path, program, 0o755)
		}
		if planner, err = at("planner"); err != nil {
			return
		}
		researcher, err = at("researcher")
		return
	}
	user := func(uid int, more string) part {
		return part{
			selectors: fmt.Sprintf(`"unix:uid:%d"%s`, uid, more),
			command:   func(s *stage, role string, args ...string) *exec.Cmd { return s.as(uid, role, args...) },
		}
	}
	planner = user(plannerUID, fmt.Sprintf(`, "unix:sha256:%s"`, s.digest))
	path, dir, err := s.cgroup()
	if err != nil {
		fmt.Printf("    (no cgroup can be made here: %v; the researcher is known by its user alone)\n", err)
		return planner, user(researcherUID, ""), place, nil
	}
	place = func(c *exec.Cmd) *exec.Cmd {
		c.SysProcAttr.UseCgroupFD, c.SysProcAttr.CgroupFD = true, int(dir.Fd())
		return c
	}
	return planner, user(researcherUID, fmt.Sprintf(`, "cgroup:path:%s"`, path)), place, nil
}

// cgroup makes a cgroup of the v2 hierarchy and returns its path and its directory.
func (s *stage) cgroup() (string, *os.File, error) {
	for _, root := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err != nil {
			continue
		}
		path := "/" + filepath.Base(s.dir)
		dir := filepath.Join(root, path)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return "", nil, err
		}
		s.closers = append(s.closers, func() {
			for end := time.Now().Add(5 * time.Second); os.Remove(dir) != nil && time.Now().Before(end); {
				time.Sleep(50 * time.Millisecond)
			}
		})
		f, err := os.Open(dir)
		if err != nil {
			return "", nil, err
		}
		s.closers = append(s.closers, func() { f.Close() })
		return path, f, nil
	}
	return "", nil, fmt.Errorf("no cgroup v2 hierarchy")
}

// show runs a command and prints what it says.
func show(cmd *exec.Cmd) error {
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	fmt.Print(indent(string(out)))
	if err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(errs.String()))
	}
	return nil
}

// refused wants a command to be told that it has no identity.
func refused(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if err == nil {
		return fmt.Errorf("an intruder got %s", out)
	}
	if !strings.Contains(string(out), "PermissionDenied") {
		return fmt.Errorf("an intruder was turned away for another reason: %s", out)
	}
	fmt.Print(indent(string(out)))
	return nil
}

func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.TrimRight(text, "\n") + "\n") {
		b.WriteString("    " + line)
	}
	return b.String()
}
