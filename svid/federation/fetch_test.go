package federation

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/test/bubble"
)

// What an endpoint may answer, and what becomes of it.
func TestFetchFromTheWeb(t *testing.T) {
	text := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(s)) }
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			if code != http.StatusNoContent && code != http.StatusNotModified {
				w.Write([]byte(`{"keys":[]}`))
			}
		}
	}
	to := func(code int, target string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/good" {
				w.Write([]byte(`{"keys":[],"spiffe_sequence":9}`))
				return
			}
			w.Header().Set("Location", target)
			w.WriteHeader(code)
		}
	}
	hold := func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	for _, c := range []struct {
		name   string
		answer http.HandlerFunc
		fails  string // "": it is taken
		moved  bool
	}{
		{name: "a bundle", answer: text(`{"keys":[]}`)},
		{name: "a bundle as HTML", answer: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.Write([]byte(`{"keys":[]}`))
		}},
		{name: "a bundle of nearly all that is allowed", answer: text(`{"keys":[]` + strings.Repeat(" ", maxBody-11) + `}`)},
		{name: "a byte too many", answer: text(`{"keys":[]` + strings.Repeat(" ", maxBody-10) + `}`), fails: "longer than"},
		{name: "10 MB", answer: text(strings.Repeat("x", 10<<20)), fails: "longer than"},
		{name: "a body without end", answer: func(w http.ResponseWriter, _ *http.Request) {
			for {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}, fails: "longer than"},
		{name: "garbage", answer: text("\x00\xff\xfe garbage"), fails: "parse bundle"},
		{name: "a page", answer: text("<html>sign in</html>"), fails: "parse bundle"},
		{name: "nothing", answer: text(""), fails: "parse bundle"},
		{name: "no keys", answer: text(`{"spiffe_sequence":3}`), fails: "has no keys"},
		{name: "a bundle in gzip", answer: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			z.Write([]byte(`{"keys":[]}`))
			z.Close()
		}, fails: "parse bundle"},
		{name: "half a bundle", answer: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "11")
			w.Write([]byte(`{"keys`))
		}, fails: "EOF"},
		{name: "status 500", answer: status(500), fails: "status 500"},
		{name: "status 404", answer: status(404), fails: "status 404"},
		{name: "status 401", answer: status(401), fails: "status 401"},
		{name: "status 201", answer: status(201), fails: "status 201"},
		{name: "status 204", answer: status(204), fails: "status 204"},
		{name: "status 304", answer: status(304), fails: "status 304"},
		{name: "status 206", answer: status(206), fails: "status 206"},
		{name: "a redirect", answer: to(302, "/good")},
		{name: "a redirect of 303", answer: to(303, "/good")},
		{name: "a redirect of 307", answer: to(307, "https://theirs.example/good")},
		{name: "a redirect to another host", answer: to(302, "https://mirror.example/")},
		{name: "a redirect that calls itself permanent", answer: to(301, "/good"), moved: true},
		{name: "a redirect of 308", answer: to(308, "/good"), moved: true},
		{name: "a redirect to http", answer: to(302, "http://theirs.example/good"), fails: "not https"},
		{name: "a redirect to a file", answer: to(302, "file:///etc/passwd"), fails: "not https"},
		{name: "a redirect with a user", answer: to(302, "https://a:secret@theirs.example/good"), fails: "has a user in it"},
		{name: "a redirect to the wrong certificate", answer: to(302, "https://wrong.example/"), fails: ErrWrongServer.Error()},
		{name: "a redirect to nobody", answer: to(302, "https://nobody.example/?token=secret"), fails: "refused"},
		{name: "a redirect without a target", answer: to(302, ""), fails: "status 302"},
		{name: "a redirect that is no URL", answer: to(302, "https://%zz"), fails: "parse"},
		{name: "redirects in a ring", answer: to(302, "/"), fails: "more than 3 redirects"},
		{name: "silence", answer: hold, fails: "no answer within"},
		{name: "silence after the headers", answer: func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			hold(w, r)
		}, fails: "no answer within"},
		{name: "a byte a second", answer: func(w http.ResponseWriter, r *http.Request) {
			for range 1000 {
				if _, err := w.Write([]byte(" ")); err != nil {
					return
				}
				w.(http.Flusher).Flush()
				time.Sleep(time.Second)
			}
		}, fails: "no answer within"},
		{name: "headers without end", answer: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 1<<20))
			w.Write([]byte(`{"keys":[]}`))
		}, fails: "headers"},
		{name: "interim answers without end", answer: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 1<<10))
			for r.Context().Err() == nil {
				w.WriteHeader(http.StatusEarlyHints)
			}
		}, fails: "header"},
		{name: "a connection that breaks", answer: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, fails: "EOF"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				web := newCA(t)
				n := newNetwork()
				n.serve(t, "theirs.example", web.server(t, "theirs.example"), c.answer)
				n.serve(t, "mirror.example", web.server(t, "mirror.example"), text(`{"keys":[],"spiffe_sequence":9}`))
				n.serve(t, "wrong.example", web.server(t, "theirs.example"), text(`{"keys":[]}`))
				start := time.Now()
				got, err := dial(n.dial).fetch(t.Context(), Relationship{TrustDomain: theirs, URL: "https://theirs.example/", Roots: web.file(t)}, nil)
				switch {
				case c.fails == "" && err != nil:
					t.Fatalf("got %v, want the bundle", err)
				case c.fails == "" && (got.moved != c.moved || got.bundle.TrustDomain != theirs):
					t.Errorf("got %+v", got)
				case c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)):
					t.Errorf("got %v, want an error with %q", err, c.fails)
				case err != nil && strings.Contains(err.Error(), "secret"):
					t.Errorf("the error quotes what a redirect named: %v", err)
				}
				if took := time.Since(start); took > fetchTime {
					t.Errorf("took %s, want no more than %s", took, fetchTime)
				}
			})
		})
	}
}

// What is in the configured URL is for its host alone.
func TestARedirectTellsNobodyTheURL(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		web := newCA(t)
		n := newNetwork()
		n.serve(t, "theirs.example", web.server(t, "theirs.example"), func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "https://mirror.example/")
			w.WriteHeader(http.StatusFound)
		})
		var told http.Header
		n.serve(t, "mirror.example", web.server(t, "mirror.example"), func(w http.ResponseWriter, r *http.Request) {
			told = r.Header
			w.Write([]byte(`{"keys":[]}`))
		})
		r := Relationship{TrustDomain: theirs, URL: "https://theirs.example/?token=secret", Roots: web.file(t)}
		if _, err := dial(n.dial).fetch(t.Context(), r, nil); err != nil {
			t.Fatal(err)
		}
		if text := fmt.Sprint(told); told == nil || strings.Contains(text, "secret") {
			t.Errorf("the mirror is told %s", text)
		}
	})
}

// Who may write the file of CAs can be the endpoint.
func TestRootsAreNoStrangers(t *testing.T) {
	web := newCA(t)
	for _, c := range []struct {
		name, want string // "": it is taken
		change     func(path string) error
	}{
		{"readable by all", "", func(path string) error { return os.Chmod(path, 0o644) }},
		{"writable by the group", "may be written by others", func(path string) error { return os.Chmod(path, 0o664) }},
		{"writable by all", "may be written by others", func(path string) error { return os.Chmod(path, 0o646) }},
		{"a stranger's", "belongs to UID", func(path string) error { return os.Chown(path, 61002, -1) }},
		{"no PEM", "holds no certificates", func(path string) error { return os.WriteFile(path, []byte("x"), 0o600) }},
		{"gone", "no such file", os.Remove},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := web.file(t)
			if err := c.change(path); err != nil {
				if os.Getuid() != 0 && os.Getenv("CI") == "" {
					t.Skip("SKIPPED: files of other users take root to make")
				}
				t.Fatal(err)
			}
			err := Relationship{TrustDomain: theirs, Roots: path}.CheckRoots()
			if (c.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
		})
	}
	if err := (Relationship{TrustDomain: theirs}).CheckRoots(); err != nil {
		t.Errorf("the system's CAs: %v", err)
	}
}

// Who may serve by the Web PKI.
func TestFetchFromTheWebWantsTheHost(t *testing.T) {
	web, other := newCA(t), newCA(t)
	for _, c := range []struct {
		name string
		cert *tls.Certificate
		good bool
	}{
		{"its certificate", web.server(t, "theirs.example"), true},
		{"another host's", web.server(t, "evil.example"), false},
		{"of a CA that nobody named", other.server(t, "theirs.example"), false},
		{"an X509-SVID", web.server(t, "spiffe://theirs.example/spire/server"), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNetwork()
			n.serve(t, "theirs.example", c.cert, fixed(t, &svid.Bundle{TrustDomain: theirs}))
			_, err := dial(n.dial).fetch(t.Context(), Relationship{TrustDomain: theirs, URL: "https://theirs.example", Roots: web.file(t)}, nil)
			if c.good != (err == nil) || !c.good && !errors.Is(err, ErrWrongServer) {
				t.Errorf("got %v, want it to be taken: %t", err, c.good)
			}
		})
	}
	t.Run("by the CAs of the system", func(t *testing.T) {
		n := newNetwork()
		n.serve(t, "theirs.example", web.server(t, "theirs.example"), fixed(t, &svid.Bundle{TrustDomain: theirs}))
		_, err := dial(n.dial).fetch(t.Context(), Relationship{TrustDomain: theirs, URL: "https://theirs.example"}, nil)
		if !errors.Is(err, ErrWrongServer) {
			t.Errorf("got %v, want ErrWrongServer", err)
		}
	})
	t.Run("without TLS", func(t *testing.T) {
		n := newNetwork()
		l := n.listen("theirs.example:443")
		s := &http.Server{Handler: fixed(t, &svid.Bundle{TrustDomain: theirs})}
		go s.Serve(l)
		defer s.Close()
		if _, err := dial(n.dial).fetch(t.Context(), Relationship{TrustDomain: theirs, URL: "https://theirs.example", Roots: web.file(t)}, nil); err == nil {
			t.Error("a bundle without TLS was taken")
		}
	})
	t.Run("with TLS 1.1", func(t *testing.T) {
		n := newNetwork()
		l := n.listen("theirs.example:443")
		defer l.Close()
		cert := web.server(t, "theirs.example")
		go func() {
			c, err := l.Accept()
			if err == nil {
				tls.Server(c, &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}).Handshake()
				c.Close()
			}
		}()
		if _, err := dial(n.dial).fetch(t.Context(), Relationship{TrustDomain: theirs, URL: "https://theirs.example", Roots: web.file(t)}, nil); err == nil {
			t.Error("TLS 1.1 was taken")
		}
	})
	t.Run("CAs that are gone", func(t *testing.T) {
		_, err := dial(newNetwork().dial).fetch(t.Context(), Relationship{TrustDomain: theirs, URL: "https://theirs.example", Roots: "/nonexistent"}, nil)
		if err == nil || errors.Is(err, ErrWrongServer) {
			t.Errorf("got %v, want an error of the file", err)
		}
	})
}

// Who may serve with an X509-SVID.
func TestFetchFromASPIFFEServer(t *testing.T) {
	mine, their, thirds := newCA(t), newCA(t), newCA(t)
	id := spiffeid.RequireFromString
	server := id("spiffe://theirs.example/spire/server")
	own := bundle(t, ours, 1, 0, mine)
	known := newMemory(own, bundle(t, theirs, 1, 0, their), bundle(t, third, 1, 0, thirds))
	all, _ := known.Bundles()
	ended := newCAUntil(t, time.Now().Add(-time.Minute))
	late, _ := newMemory(own, bundle(t, theirs, 1, 0, ended)).Bundles()
	for _, c := range []struct {
		name string
		all  *svid.Bundles
		id   spiffeid.ID
		cert *tls.Certificate
		want error
		says string // "": nothing of what to do
	}{
		{"of its own trust domain", all, server, their.server(t, server.String()), nil, ""},
		{"of ours", all, id("spiffe://ours.example/mirror"), mine.server(t, "spiffe://ours.example/mirror"), nil, ""},
		{"of a third trust domain", all, id("spiffe://third.example/mirror"), thirds.server(t, "spiffe://third.example/mirror"), nil, ""},
		{"another of its trust domain", all, server, their.server(t, "spiffe://theirs.example/agent/x"), ErrWrongServer, ""},
		{"below the ID", all, server, their.server(t, server.String()+"/x"), ErrWrongServer, ""},
		{"its ID by our CA", all, server, mine.server(t, server.String()), ErrWrongServer, "or our bundle of theirs.example is too old for it (deputy bundle set theirs.example): "},
		{"its ID by a third's CA", all, server, thirds.server(t, server.String()), ErrWrongServer, "or our bundle of theirs.example is too old for it (deputy bundle set theirs.example): "},
		{"its path in a third trust domain", all, server, thirds.server(t, "spiffe://third.example/spire/server"), ErrWrongServer, ""},
		{"its ID by a CA that has ended", late, server, ended.server(t, server.String()), ErrWrongServer, "deputy bundle set theirs.example"},
		{"ours by a CA that we do not have", all, id("spiffe://ours.example/mirror"), thirds.server(t, "spiffe://ours.example/mirror"), ErrWrongServer, ""},
		{"a certificate of its host", all, server, their.server(t, "theirs.example"), ErrWrongServer, ""},
		{"a bundle that is not there", &svid.Bundles{Own: own}, server, their.server(t, server.String()), ErrNoTrust, "bring that of theirs.example across (deputy bundle set theirs.example)"},
		{"a bundle that trusts nobody", &svid.Bundles{Own: own, Federated: map[spiffeid.TrustDomain]*svid.Bundle{theirs: {TrustDomain: theirs}}},
			server, their.server(t, server.String()), ErrNoTrust, "has no X.509 authority; bring its next one across (deputy bundle set theirs.example)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNetwork()
			n.serve(t, "theirs.example", c.cert, fixed(t, &svid.Bundle{TrustDomain: theirs}))
			_, err := dial(n.dial).fetch(t.Context(), Relationship{TrustDomain: theirs, URL: "https://theirs.example/", EndpointID: c.id}, c.all)
			if !errors.Is(err, c.want) || c.want == nil && err != nil {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if err != nil && (!strings.Contains(err.Error(), c.says) || c.says == "" && strings.Contains(err.Error(), "deputy bundle set")) {
				t.Errorf("got %v, want it to say %q of what to do", err, c.says)
			}
			if c.want == ErrNoTrust && n.dialled() > 0 {
				t.Error("a server was asked that nobody could have verified")
			}
		})
	}
}

// A redirect leads to the same ID or nowhere (SPIFFE Federation §5.2.2.4).
func TestRedirectWantsTheSameID(t *testing.T) {
	their := newCA(t)
	all := &svid.Bundles{Federated: map[spiffeid.TrustDomain]*svid.Bundle{theirs: bundle(t, theirs, 1, 0, their)}}
	r := Relationship{TrustDomain: theirs, URL: "https://theirs.example/", EndpointID: spiffeid.RequireFromString("spiffe://theirs.example/spire/server")}
	for _, c := range []struct {
		id   string
		good bool
	}{{r.EndpointID.String(), true}, {"spiffe://theirs.example/agent/x", false}} {
		n := newNetwork()
		n.serve(t, "theirs.example", their.server(t, r.EndpointID.String()), http.RedirectHandler("https://mirror.example/", http.StatusFound).ServeHTTP)
		n.serve(t, "mirror.example", their.server(t, c.id), fixed(t, &svid.Bundle{TrustDomain: theirs}))
		if _, err := dial(n.dial).fetch(t.Context(), r, all); c.good != (err == nil) || !c.good && !errors.Is(err, ErrWrongServer) {
			t.Errorf("%s: got %v, want it to be taken: %t", c.id, err, c.good)
		}
	}
}

// A server that takes the connection and then says nothing.
func TestFetchOfASilentServerEnds(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		n := newNetwork()
		l := n.listen("theirs.example:443")
		defer l.Close()
		start := time.Now()
		_, err := dial(n.dial).fetch(t.Context(), Relationship{TrustDomain: theirs, URL: "https://theirs.example/"}, nil)
		if err == nil || time.Since(start) != fetchTime {
			t.Errorf("got %v after %s, want an error after %s", err, time.Since(start), fetchTime)
		}
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		start = time.Now()
		_, err = dial(n.dial).fetch(t.Context(), Relationship{TrustDomain: theirs, URL: "https://theirs.example/"}, nil)
		if err == nil || time.Since(start) != fetchTime {
			t.Errorf("connected: got %v after %s, want an error after %s", err, time.Since(start), fetchTime)
		}
		c.Close()
	})
}

func TestFetchUsesNoProxy(t *testing.T) {
	t.Setenv("HTTPS_PROXY", "http://proxy.example:3128")
	n := newNetwork()
	var asked []string
	d := dial(func(ctx context.Context, network, address string) (net.Conn, error) {
		asked = append(asked, address)
		return n.dial(ctx, network, address)
	})
	if _, err := d.fetch(t.Context(), Relationship{TrustDomain: theirs, URL: "https://theirs.example:8443/"}, nil); err == nil {
		t.Fatal("got a bundle from nobody")
	}
	if want := "[theirs.example:8443]"; fmt.Sprint(asked) != want {
		t.Errorf("dialled %v, want %s", asked, want)
	}
}

func FuzzReadBundle(f *testing.F) {
	b := bundle(f, theirs, 3, time.Minute, newCA(f))
	data, err := b.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"keys":[],"spiffe_sequence":18446744073709551615,"spiffe_refresh_hint":1e300}`))
	f.Add([]byte(`{"keys":[{"use":"jwt-svid","kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","kid":"a"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := readBundle(theirs, bytes.NewReader(data))
		if err != nil {
			return
		}
		if i := interval(b); i < minHint || i > maxHint {
			t.Errorf("got an interval of %s", i)
		}
		// What is taken is stored, and must be read again after a restart.
		again, err := b.Marshal()
		if err != nil {
			t.Fatalf("encode what was read: %v", err)
		}
		if back, err := svid.ParseBundle(theirs, again); err != nil || !sameAuthorities(b, back) || back.Sequence != b.Sequence {
			t.Errorf("got %+v, %v, want what was read", back, err)
		}
	})
}
