package container_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/container"
)

var (
	id      = strings.Repeat("0123456789abcdef", 4)
	imageID = "sha256:" + strings.Repeat("ab", 32)
)

// An api is a Docker engine that says what a test wants it to.
type api struct {
	socket string
	asked  atomic.Int64 // about containers

	mu        sync.Mutex
	version   string
	container func(w http.ResponseWriter, r *http.Request)
	image     func(w http.ResponseWriter, r *http.Request)
}

func serve(t *testing.T) *api {
	t.Helper()
	a := &api{socket: filepath.Join(t.TempDir(), "d.sock"), version: "1.41", container: status(404), image: status(404)}
	a.listen(t)
	return a
}

func (a *api) listen(t *testing.T) *http.Server {
	t.Helper()
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: a}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return server
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	version, container, image := a.version, a.container, a.image
	a.mu.Unlock()
	switch path := r.URL.Path; {
	case path == "/_ping":
		w.Header().Set("API-Version", version)
	case !strings.HasPrefix(path, "/v"+version+"/"):
		status(400)(w, r)
	case path == "/v"+version+"/containers/"+id+"/json":
		a.asked.Add(1)
		container(w, r)
	case path == "/v"+version+"/images/"+imageID+"/json":
		image(w, r)
	default:
		status(404)(w, r)
	}
}

func (a *api) set(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		io.WriteString(w, `{"message":"`+http.StatusText(code)+`"}`)
	}
}

func body(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) }
}

// running is the answer about a container that runs. What alter does to it is
// what the test is about.
func running(pid int, alter ...func(c map[string]any)) http.HandlerFunc {
	c := map[string]any{
		"Id": id, "Name": "/web", "Image": imageID,
		"State":  map[string]any{"Running": true, "Pid": pid, "StartedAt": "2026-01-02T03:04:05.6Z"},
		"Config": map[string]any{"Image": "web:1", "Labels": map[string]string{"a": "b"}},
	}
	for _, f := range alter {
		f(c)
	}
	b, err := json.Marshal(c)
	if err != nil {
		panic(err)
	}
	return body(string(b))
}

func state(key string, value any) func(map[string]any) {
	return func(c map[string]any) { c["State"].(map[string]any)[key] = value }
}

var known = body(fmt.Sprintf(`{"Id":%q,"RepoDigests":["web@sha256:%s"]}`, imageID, strings.Repeat("cd", 32)))

// cgroups is where v2's hierarchy is mounted, on its own or beside v1.
func cgroups(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPING: making cgroups needs root")
	}
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir
		}
	}
	t.Fatal("no cgroup2 is mounted")
	return ""
}

// contained starts a process in the cgroup of the container id.
func contained(t *testing.T) int {
	t.Helper()
	return within(t, filepath.Join(cgroups(t), "docker", id))
}

// within starts a process in that cgroup, which it makes, and in namespaces of
// its own of these kinds.
func within(t *testing.T, dir string, namespaces ...uintptr) int {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	for _, n := range namespaces {
		cmd.SysProcAttr.Cloneflags |= n
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		for ; filepath.Base(dir) != "cgroup" && filepath.Base(dir) != "unified" && filepath.Base(dir) != "docker"; dir = filepath.Dir(dir) {
			if os.Remove(dir) != nil {
				break // another process of the test is still in it
			}
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

func TestEngineAndKernelAgree(t *testing.T) {
	pid := contained(t)
	a := serve(t)
	a.container, a.image = running(pid), known
	digest := strings.Repeat("cd", 32)
	got := attestorOf(t, a.socket).attest(t, pid)
	want(t, only(got, "container:id:", "container:name:", "container:runtime:", "docker:", "image:", "process:"),
		"container:id:"+id, "container:name:web", "container:runtime:docker",
		"docker:image_config_digest:"+imageID, "docker:image_id:web:1", "docker:label:a:b",
		"image:config_digest:"+imageID, "image:digest:sha256:"+digest,
		"image:reference:docker.io/library/web@sha256:"+digest, "image:repository:docker.io/library/web",
		"process:leader:true")
}

func TestContainerThatTheEngineDoesNotKnowHasNoSelectors(t *testing.T) {
	pid := contained(t)
	want(t, attestorOf(t, serve(t).socket).attest(t, pid))
}

func TestAnswersThatAreNotBelieved(t *testing.T) {
	pid := contained(t)
	second := atomic.Int64{}
	tests := map[string]struct{ container, image http.HandlerFunc }{
		"server error":            {container: status(500)},
		"not allowed":             {container: status(403)},
		"redirect":                {container: status(301)},
		"no JSON":                 {container: body("<html>")},
		"null":                    {container: body("null")},
		"cut off":                 {container: body(`{"Id":"` + id)},
		"longer than any answer":  {container: endless},
		"another container":       {container: running(pid, func(c map[string]any) { c["Id"] = strings.Repeat("f", 64) })},
		"an ID that is a prefix":  {container: running(pid, func(c map[string]any) { c["Id"] = id[:12] })},
		"no state":                {container: running(pid, func(c map[string]any) { delete(c, "State") })},
		"no image":                {container: running(pid, func(c map[string]any) { delete(c, "Image") })},
		"stopped":                 {container: running(0, state("Running", false))},
		"running without init":    {container: running(0)},
		"negative PID":            {container: running(-1)},
		"PID of another size":     {container: running(pid + 1<<32)},
		"init in no container":    {container: running(os.Getpid())},
		"init that is not there":  {container: running(1 << 22)},
		"image of another ID":     {image: body(`{"Id":"sha256:` + strings.Repeat("00", 32) + `"}`)},
		"image with server error": {image: status(500)},
		"image that is no JSON":   {image: body("[")},
		"started again while asked": {container: func(w http.ResponseWriter, r *http.Request) {
			running(pid, state("StartedAt", strconv.FormatInt(second.Add(1), 10)))(w, r)
		}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			a := serve(t)
			a.container, a.image = running(pid), known
			if test.container != nil {
				a.container = test.container
			}
			if test.image != nil {
				a.image = test.image
			}
			s := attestorOf(t, a.socket)
			if out, err := s.Attest(t.Context(), s.open(t, pid)); err == nil || len(out) > 0 {
				t.Errorf("got %v, %v, want an error alone", texts(out), err)
			}
			if n := s.Known(); n != 0 {
				t.Errorf("got %d containers kept, want none", n)
			}
		})
	}
}

// endless answers until nobody listens any more.
func endless(w http.ResponseWriter, _ *http.Request) {
	b := []byte(strings.Repeat(" ", 1<<16))
	for {
		if _, err := w.Write(b); err != nil {
			return
		}
	}
}

func TestEngineThatHangsEndsWithTheContext(t *testing.T) {
	pid := contained(t)
	a := serve(t)
	a.container = func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	s := attestorOf(t, a.socket)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if out, err := s.Attest(ctx, s.open(t, pid)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, %v, want the deadline", texts(out), err)
	}
}

func TestRemovedImageLeavesItsID(t *testing.T) {
	pid := contained(t)
	a := serve(t)
	a.container = running(pid)
	want(t, only(attestorOf(t, a.socket).attest(t, pid), "image:"), "image:config_digest:"+imageID)
}

func TestKnownContainerCostsNoQuestion(t *testing.T) {
	pid, other := contained(t), contained(t)
	a := serve(t)
	a.container, a.image = running(pid), known
	s := attestorOf(t, a.socket)
	s.attest(t, pid)
	before := a.asked.Load()
	first, second := s.attest(t, pid), s.attest(t, other)
	if got := a.asked.Load() - before; got != 0 {
		t.Errorf("got %d questions about a known container, want none", got)
	}
	if len(only(first, "process:leader:")) != 1 || len(only(second, "process:leader:")) != 0 {
		t.Errorf("got leaders %v and %v, want the init alone", only(first, "process:"), only(second, "process:"))
	}
}

func TestManyProcessesShareOneLook(t *testing.T) {
	pid := contained(t)
	a := serve(t)
	release := make(chan struct{})
	a.image = known
	a.container = func(w http.ResponseWriter, r *http.Request) {
		<-release
		running(pid)(w, r)
	}
	s := attestorOf(t, a.socket)
	p := s.open(t, pid)
	var group sync.WaitGroup
	for range 20 {
		group.Go(func() {
			if _, err := s.Attest(context.Background(), p); err != nil {
				t.Error(err)
			}
		})
	}
	await(t, "a question", func() bool { return a.asked.Load() > 0 })
	close(release)
	group.Wait()
	if got := s.Known(); got != 1 {
		t.Errorf("got %d containers kept, want 1", got)
	}
	if got := a.asked.Load(); got > 4 { // two a look; a straggler may come after the first
		t.Errorf("got %d questions, want one look's", got)
	}
}

func TestNameIsAskedForAgain(t *testing.T) {
	pid := contained(t)
	a := serve(t)
	a.container, a.image = running(pid), known
	s := attestorOf(t, a.socket)
	s.attest(t, pid)
	a.set(func() { a.container = running(pid, func(c map[string]any) { c["Name"] = "/db" }) })
	want(t, only(s.attest(t, pid), "container:name:"), "container:name:web")
	s.Age(2 * time.Minute)
	want(t, only(s.attest(t, pid), "container:name:"), "container:name:db")
}

func TestEngineThatFailsLaterCostsTheNameAlone(t *testing.T) {
	pid := contained(t)
	a := serve(t)
	a.container, a.image = running(pid), known
	s := attestorOf(t, a.socket)
	full := s.attest(t, pid)
	a.set(func() { a.container = status(500) })
	s.Age(2 * time.Minute)
	out, err := s.Attest(t.Context(), s.open(t, pid))
	var unknown *attestor.Unknown
	if !errors.As(err, &unknown) || len(unknown.Prefixes) != 1 || unknown.Prefixes[0] != "container:name:" {
		t.Fatalf("got error %v, want container:name: unknown", err)
	}
	want(t, append(texts(out), "container:name:web"), full...)
	a.set(func() { a.container = running(pid) })
	s.Age(2 * time.Minute)
	want(t, s.attest(t, pid), full...)
}

func TestContainerThatIsAnotherRunLaterIsNotBelieved(t *testing.T) {
	pid := contained(t)
	a := serve(t)
	for name, later := range map[string]http.HandlerFunc{
		"other init": running(os.Getpid()),
		"stopped":    running(0, state("Running", false)),
	} {
		t.Run(name, func(t *testing.T) {
			a.set(func() { a.container, a.image = running(pid), known })
			s := attestorOf(t, a.socket)
			s.attest(t, pid)
			a.set(func() { a.container = later })
			s.Age(2 * time.Minute)
			if out, err := s.Attest(t.Context(), s.open(t, pid)); err == nil || len(out) > 0 {
				t.Errorf("got %v, %v, want an error alone", texts(out), err)
			}
		})
	}
}

func TestRemovedContainerHasNoSelectorsLater(t *testing.T) {
	pid := contained(t)
	a := serve(t)
	a.container, a.image = running(pid), known
	s := attestorOf(t, a.socket)
	s.attest(t, pid)
	a.set(func() { a.container = status(404) })
	s.Age(2 * time.Minute)
	want(t, s.attest(t, pid))
}

func TestEndedInitIsLetGoOf(t *testing.T) {
	pid, other := contained(t), contained(t)
	a := serve(t)
	a.container, a.image = running(pid), known
	s := attestorOf(t, a.socket)
	s.attest(t, other)
	unix.Kill(pid, unix.SIGKILL)
	await(t, "an end of what is kept", func() bool { return s.Known() == 0 })
	a.set(func() { a.container = running(0, state("Running", false)) })
	if out, err := s.Attest(t.Context(), s.open(t, other)); err == nil || len(out) > 0 {
		t.Errorf("got %v, %v of what outlived its container's init, want an error alone", texts(out), err)
	}
}

// The Set keeps what was said of a process, and must not for longer than the
// container's init lives.
func TestEvidenceEndsWithTheContainersInit(t *testing.T) {
	pid, other := contained(t), contained(t)
	a := serve(t)
	a.container, a.image = running(pid), known
	s := attestorOf(t, a.socket)
	set := attestor.NewSet(hclog.NewNullLogger(), nil, s.Source())
	p := s.open(t, other)
	inContainer := attestor.Selector{Type: "container", Value: "id:" + id}
	before, err := set.Attest(t.Context(), p)
	if err != nil || !before.Has(inContainer) {
		t.Fatalf("got %v, %v, want %v", before, err, inContainer)
	}
	if again, err := set.Attest(t.Context(), p); again != before || err != nil {
		t.Errorf("got %v, %v, want what was kept", again, err)
	}
	init := s.open(t, pid)
	unix.Kill(pid, unix.SIGKILL)
	<-init.Done()
	a.set(func() { a.container = running(0, state("Running", false)) })
	after, err := set.Attest(t.Context(), p)
	if err != nil || after.Has(inContainer) || !after.MayHave(inContainer) {
		t.Errorf("got %v, %v after the init's end, want %v unknown", after, err, inContainer)
	}
}

func TestEngineOfAnotherVersionAfterARestart(t *testing.T) {
	pid := contained(t)
	a := serve(t)
	a.container, a.image, a.version = running(pid), known, "1.45"
	s := attestorOf(t, a.socket)
	want(t, only(s.attest(t, pid), "container:id:"), "container:id:"+id)
	a.set(func() { a.version = "1.41" })
	fresh := attestorOf(t, a.socket)
	want(t, only(fresh.attest(t, pid), "container:id:"), "container:id:"+id)
	s.Age(2 * time.Minute)
	p := s.open(t, pid)
	if _, err := s.Attest(t.Context(), p); err == nil {
		t.Error("got no error from an engine that speaks another version, want the name unknown")
	}
	s.Age(2 * time.Minute)
	if _, err := s.Attest(t.Context(), p); err != nil {
		t.Errorf("got %v after a version could be agreed upon anew, want none", err)
	}
}

func TestEngineThatIsNotThereIsUnknown(t *testing.T) {
	pid := contained(t)
	a := &api{socket: filepath.Join(t.TempDir(), "d.sock"), version: "1.41", container: running(pid), image: known}
	s := attestorOf(t, a.socket)
	p := s.open(t, pid)
	if out, err := s.Attest(t.Context(), p); err == nil || len(out) > 0 {
		t.Errorf("got %v, %v without an engine, want an error alone", texts(out), err)
	}
	server := a.listen(t)
	if _, err := s.Attest(t.Context(), p); err != nil {
		t.Errorf("got %v once the engine is up, want none", err)
	}
	server.Close()
	if err := os.WriteFile(a.socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.Age(2 * time.Minute)
	if _, err := s.Attest(t.Context(), p); err == nil {
		t.Error("got no error of a file in the socket's place, want one")
	}
}

// A user with a subtree of their own can name directories in it as they like.
func TestDelegatedCgroupNamedLikeAContainerProvesNothing(t *testing.T) {
	top := filepath.Join(cgroups(t), "user-subtree")
	if err := os.Mkdir(top, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(top, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(filepath.Join(top, "docker")); os.Remove(top) })
	pid := within(t, filepath.Join(top, "docker", id))
	a := serve(t)
	a.container, a.image = running(pid), known
	want(t, attestorOf(t, a.socket).attest(t, pid))
	if got := a.asked.Load(); got != 0 {
		t.Errorf("got %d questions about it, want none", got)
	}
}

// What is in a container's init's cgroup and below is in the container: a
// container may make cgroups of its own.
func TestProcessBelowTheContainersCgroup(t *testing.T) {
	pid := contained(t)
	below := within(t, filepath.Join(cgroups(t), "docker", id, "inner"))
	a := serve(t)
	a.container, a.image = running(pid), known
	want(t, only(attestorOf(t, a.socket).attest(t, below), "container:id:", "process:"), "container:id:"+id)
}

func TestProcessThatLeavesTheContainerMeanwhile(t *testing.T) {
	init, pid := contained(t), contained(t)
	a := serve(t)
	a.image = known
	a.container = func(w http.ResponseWriter, r *http.Request) {
		if err := os.WriteFile(filepath.Join(cgroups(t), "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			t.Error(err)
		}
		running(init)(w, r)
	}
	s := attestorOf(t, a.socket)
	if out, err := s.Attest(t.Context(), s.open(t, pid)); err == nil || len(out) > 0 {
		t.Errorf("got %v, %v, want an error alone", texts(out), err)
	}
}

// As under Docker's userns-remap: who owns the namespace is root in it.
func TestContainerInAnotherUserNamespaceHasNoPathAndNoLeader(t *testing.T) {
	dir := filepath.Join(cgroups(t), "docker", id)
	init, pid := within(t, dir, unix.CLONE_NEWUSER), within(t, dir)
	a := serve(t)
	a.container, a.image = running(init), known
	s := attestorOf(t, a.socket)
	for name, pid := range map[string]int{"its init": init, "a process of ours in it": pid} {
		t.Run(name, func(t *testing.T) {
			want(t, only(s.attest(t, pid), "container:id:", "container:path:", "process:"), "container:id:"+id)
		})
	}
}

// In a mount namespace of its own a process can put its program at any path.
func TestProgramThatIsNotInTheInitsRootHasNoPath(t *testing.T) {
	init := contained(t)
	dir := t.TempDir()
	program, elsewhere := filepath.Join(dir, "program"), filepath.Join(dir, "sleep")
	must(t, os.WriteFile(program, []byte("privileged"), 0o755))
	b, err := os.ReadFile("/bin/sleep")
	must(t, err)
	must(t, os.WriteFile(elsewhere, b, 0o755))
	cmd := exec.Command("unshare", "--mount", "sh", "-c", `mount --bind "$1" "$2" && exec "$2" 600`, "sh", elsewhere, program)
	must(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	pid := cmd.Process.Pid
	must(t, os.WriteFile(filepath.Join(cgroups(t), "docker", id, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0))
	await(t, "the program at the other's path", func() bool {
		exe, _ := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
		return exe == program
	})
	a := serve(t)
	a.container, a.image = running(init), known
	want(t, only(attestorOf(t, a.socket).attest(t, pid), "container:id:", "container:path:"), "container:id:"+id)
}

func TestSocketsThatAreNotTrusted(t *testing.T) {
	pid := contained(t)
	tests := map[string]func(t *testing.T, dir string, a *api) (socket string){
		"writable by everybody": func(t *testing.T, _ string, a *api) string {
			must(t, os.Chmod(a.socket, 0o666))
			return a.socket
		},
		"owned by a user": func(t *testing.T, _ string, a *api) string {
			must(t, os.Chown(a.socket, 65534, 0))
			return a.socket
		},
		"in a user's directory": func(t *testing.T, dir string, a *api) string {
			must(t, os.Chown(dir, 65534, 0))
			return a.socket
		},
		"in a directory that a group may write to": func(t *testing.T, dir string, a *api) string {
			must(t, os.Chmod(dir, 0o775))
			return a.socket
		},
		"by a user's link": func(t *testing.T, _ string, a *api) string {
			link := filepath.Join(t.TempDir(), "link")
			must(t, os.Symlink(a.socket, link))
			must(t, os.Lchown(link, 65534, 0))
			return link
		},
		"by a link to itself": func(t *testing.T, _ string, _ *api) string {
			link := filepath.Join(t.TempDir(), "link")
			must(t, os.Symlink(link, link))
			return link
		},
		"a directory": func(_ *testing.T, dir string, _ *api) string { return dir },
	}
	for name, arrange := range tests {
		t.Run(name, func(t *testing.T) {
			a := serve(t)
			a.container, a.image = running(pid), known
			s := attestorOf(t, arrange(t, filepath.Dir(a.socket), a))
			if out, err := s.Attest(t.Context(), s.open(t, pid)); err == nil || len(out) > 0 {
				t.Errorf("got %v, %v, want an error alone", texts(out), err)
			}
		})
	}
}

func TestSocketBehindRootsLinks(t *testing.T) {
	pid := contained(t)
	a := serve(t)
	a.container, a.image = running(pid), known
	dir := t.TempDir()
	must(t, os.Symlink(filepath.Dir(a.socket), filepath.Join(dir, "away")))
	must(t, os.Symlink("./away/../"+filepath.Base(filepath.Dir(a.socket))+"/d.sock", filepath.Join(dir, "d.sock")))
	want(t, only(attestorOf(t, filepath.Join(dir, "d.sock")).attest(t, pid), "container:id:"), "container:id:"+id)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestOptionsThatCannotBe(t *testing.T) {
	if _, err := container.NewDocker(container.Options{Socket: "docker.sock"}); err == nil {
		t.Error("got an attestor on a relative path, want an error")
	}
	if _, err := container.NewDocker(container.Options{}); err == nil {
		t.Error("got an attestor without a table, want an error")
	}
}

// A server that speaks something else on the socket is an error too.
func TestPeerThatIsNoEngine(t *testing.T) {
	pid := contained(t)
	socket := filepath.Join(t.TempDir(), "d.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			bufio.NewReader(conn).ReadString('\n')
			io.WriteString(conn, "SSH-2.0-nothing\r\n")
			conn.Close()
		}
	}()
	s := attestorOf(t, socket)
	if out, err := s.Attest(t.Context(), s.open(t, pid)); err == nil || len(out) > 0 {
		t.Errorf("got %v, %v, want an error alone", texts(out), err)
	}
}
