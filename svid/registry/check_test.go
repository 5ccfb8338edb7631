package registry

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestCheckRefuses(t *testing.T) {
	other := spiffeid.RequireTrustDomainFromString("other.org")
	for name, tc := range map[string]struct {
		change func(*Entry)
		field  string
		reason string
	}{
		"no path":                {func(e *Entry) { e.Path = "" }, "path", "at least one segment"},
		"a relative path":        {func(e *Entry) { e.Path = "a" }, "path", "leading slash"},
		"a trailing slash":       {func(e *Entry) { e.Path = "/a/" }, "path", "trailing slash"},
		"an empty segment":       {func(e *Entry) { e.Path = "/a//b" }, "path", "empty"},
		"a dot segment":          {func(e *Entry) { e.Path = "/a/../b" }, "path", "dot segment"},
		"a percent sign":         {func(e *Entry) { e.Path = "/a%2f" }, "path", "limited to"},
		"SPIRE's own IDs":        {func(e *Entry) { e.Path = "/spire/agent/x" }, "path", "SPIRE"},
		"SPIRE's own root":       {func(e *Entry) { e.Path = "/spire" }, "path", "SPIRE"},
		"an ID that is too long": {func(e *Entry) { e.Path = "/" + strings.Repeat("a", 2048) }, "path", "longer than 2048"},
		"one that an instance lengthens": {func(e *Entry) {
			e.Path, e.Instance = "/"+strings.Repeat("a", 2048-len("spiffe://example.org/")), true
		}, "path", "longer than 2048"},
		"another trust domain":          {func(e *Entry) { e.SPIFFEID = spiffeid.RequireFromPath(other, "/a") }, "path", "not of the trust domain"},
		"an open template":              {func(e *Entry) { e.Path = "/{{unix.user" }, "path", "without }}"},
		"an empty template":             {func(e *Entry) { e.Path = "/{{}}" }, "path", "is not {{type.name}}"},
		"a template without a name":     {func(e *Entry) { e.Path = "/{{unix}}" }, "path", "is not {{type.name}}"},
		"a template with two dots":      {func(e *Entry) { e.Path = "/{{docker.label.x}}" }, "path", "{{docker.label:"},
		"a template with a space":       {func(e *Entry) { e.Path = "/{{ unix.user }}" }, "path", "selector type"},
		"a template without a key":      {func(e *Entry) { e.Path = "/{{docker.label:}}" }, "path", "is not"},
		"two templates in a segment":    {func(e *Entry) { e.Path = "/{{unix.user}}-{{unix.uid}}" }, "path", "two values in one segment"},
		"a stray bracket":               {func(e *Entry) { e.Path = "/a}}" }, "path", "limited to"},
		"a parent that is another node": {func(e *Entry) { e.ParentID = spiffeid.RequireFromPath(td, "/spire/agent/x") }, "parent_id", "neither"},
		"a parent elsewhere":            {func(e *Entry) { e.ParentID = spiffeid.RequireFromPath(other, "/spire/server") }, "parent_id", "neither"},
		"no selectors":                  {func(e *Entry) { e.Selectors = nil }, "selectors", "at least one"},
		"a selector without a value":    {func(e *Entry) { e.Selectors[0].Value = "" }, "selectors", "no value"},
		"a colon in a selector's type":  {func(e *Entry) { e.Selectors[0].Type = "a:b" }, "selectors", "colon in it"},
		"a leader of anything":          {func(e *Entry) { e.Selectors = selectors(t, "process:leader:true", "unix:uid:1") }, "selectors", "unit, container, pod or image"},
		"a leader of a slice":           {func(e *Entry) { e.Selectors = selectors(t, "process:leader:true", "cgroup:slice:user.slice") }, "selectors", "unit, container, pod or image"},
		"a short X.509 TTL":             {func(e *Entry) { e.X509TTL = 4 * time.Second }, "x509_ttl", "shorter than 5s"},
		"a negative JWT TTL":            {func(e *Entry) { e.JWTTTL = -time.Hour }, "jwt_ttl", "shorter than 5s"},
		"a TTL of years":                {func(e *Entry) { e.X509TTL = MaxTTL + time.Second }, "x509_ttl", "longer than a year"},
		"half a second":                 {func(e *Entry) { e.JWTTTL = 5500 * time.Millisecond }, "jwt_ttl", "whole number"},
		"an empty DNS name":             {func(e *Entry) { e.DNSNames = []string{""} }, "dns_names", "empty label"},
		"an empty label":                {func(e *Entry) { e.DNSNames = []string{"a..b"} }, "dns_names", "empty label"},
		"a final dot":                   {func(e *Entry) { e.DNSNames = []string{"a."} }, "dns_names", "empty label"},
		"a long label":                  {func(e *Entry) { e.DNSNames = []string{strings.Repeat("a", 64)} }, "dns_names", "63"},
		"a long DNS name":               {func(e *Entry) { e.DNSNames = []string{strings.Repeat("a.", 127) + "a"} }, "dns_names", "253"},
		"an underscore in a DNS name":   {func(e *Entry) { e.DNSNames = []string{"a_b"} }, "dns_names", "letters"},
		"a hyphen at a label's end":     {func(e *Entry) { e.DNSNames = []string{"a-.b"} }, "dns_names", "hyphen"},
		"a bare wildcard":               {func(e *Entry) { e.DNSNames = []string{"*"} }, "dns_names", "wildcard"},
		"a wildcard inside":             {func(e *Entry) { e.DNSNames = []string{"a.*.b"} }, "dns_names", "wildcard"},
		"a partial wildcard":            {func(e *Entry) { e.DNSNames = []string{"a*.b"} }, "dns_names", "wildcard"},
		"a DNS name under a wildcard":   {func(e *Entry) { e.DNSNames = []string{"a.b", "*.b"} }, "dns_names", "covered"},
		"a DNS name twice":              {func(e *Entry) { e.DNSNames = []string{"a", "a"} }, "dns_names", "twice"},
		"a long hint":                   {func(e *Entry) { e.Hint = strings.Repeat("x", 1025) }, "hint", "longer than 1024"},
		"a hint of two lines":           {func(e *Entry) { e.Hint = "a\nb" }, "hint", "printable"},
		"federation with itself":        {func(e *Entry) { e.FederatesWith = []spiffeid.TrustDomain{td} }, "federates_with", "own trust domain"},
		"federation with nobody":        {func(e *Entry) { e.FederatesWith = []spiffeid.TrustDomain{{}} }, "federates_with", "empty"},
		"an empty audience":             {func(e *Entry) { e.Audiences = []string{""} }, "audiences", "empty"},
		"a long audience":               {func(e *Entry) { e.Audiences = []string{strings.Repeat("x", 2049)} }, "audiences", "longer than 2048"},
		"an audience twice":             {func(e *Entry) { e.Audiences = []string{"a", "a"} }, "audiences", "twice"},
		"an ID with a slash":            {func(e *Entry) { e.ID = "a/b" }, "id", "characters"},
		"a long ID":                     {func(e *Entry) { e.ID = strings.Repeat("a", 256) }, "id", "characters"},
	} {
		t.Run(name, func(t *testing.T) {
			e := Entry{Path: "/a", Selectors: selectors(t, "unix:uid:1")}
			tc.change(&e)
			_, err := e.Check(td)
			var faults Faults
			if !errors.Is(err, ErrInvalid) || !errors.As(err, &faults) {
				t.Fatalf("got %v, want Faults", err)
			}
			if len(faults) != 1 || faults[0].Field != tc.field || !strings.Contains(faults[0].Reason, tc.reason) {
				t.Errorf("got %s %q, want one about %s with %q", faults[0].Field, faults, tc.field, tc.reason)
			}
		})
	}
}

func TestCheckReportsAllFaults(t *testing.T) {
	_, err := Entry{Path: "a", X509TTL: 1, Hint: "\x00"}.Check(td)
	var faults Faults
	if !errors.As(err, &faults) || len(faults) != 4 {
		t.Errorf("got %v, want four faults", err)
	}
}

func TestCheckAccepts(t *testing.T) {
	for name, e := range map[string]Entry{
		"a path at the limit":           {Path: "/" + strings.Repeat("a", 2048-len("spiffe://example.org/")), Selectors: selectors(t, "unix:uid:1")},
		"a name that begins as SPIRE's": {Path: "/spire-x/y", Selectors: selectors(t, "unix:uid:1")},
		"a template between literals":   {Path: "/a/u-{{unix.user}}.x/{{docker.label:a.b/c}}", Selectors: selectors(t, "unix:uid:1")},
		"the server as parent":          {Path: "/a", ParentID: spiffeid.RequireFromPath(td, "/spire/server"), Selectors: selectors(t, "unix:uid:1")},
		"DNS names":                     {Path: "/a", DNSNames: []string{"*.b.org", "b.org", "a.c.b.org", "10.0.0.1", "xn--bcher-kva.de"}, Selectors: selectors(t, "unix:uid:1")},
		"an unknown selector type":      {Path: "/a", Selectors: selectors(t, "slurm:job_id:7")},
		"the leader of a unit":          {Path: "/a", Selectors: selectors(t, "process:leader:true", "cgroup:unit:x.service")},
		"the leader of a systemd unit":  {Path: "/a", Selectors: selectors(t, "process:leader:true", "systemd:id:x.service")},
		"the leader of a container":     {Path: "/a", Selectors: selectors(t, "process:leader:true", "container:name:x")},
		"the leader of a pod":           {Path: "/a", Selectors: selectors(t, "process:leader:true", "k8s:pod-name:x")},
		"the leader of an image":        {Path: "/a", Selectors: selectors(t, "process:leader:true", "image:digest:sha256:00")},
		"the leader that exec made":     {Path: "/a", Selectors: selectors(t, "process:leader:true", "process:exec:x")},
	} {
		if _, err := e.Check(td); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheckLeavesItsInputAlone(t *testing.T) {
	e := entry(t, "/a", "unix:uid:2", "unix:uid:1", "unix:uid:2")
	got, err := e.Check(td)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(selectors(t, "unix:uid:1", "unix:uid:2"), got.Selectors); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(selectors(t, "unix:uid:2", "unix:uid:1", "unix:uid:2"), e.Selectors); diff != "" {
		t.Error(diff)
	}
}

func TestFileIDFollowsEveryField(t *testing.T) {
	base, err := full(t).Check(td)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{fileID(&base): "the original"}
	if !regexp.MustCompile(`^file-[a-z2-7]{26}$`).MatchString(fileID(&base)) {
		t.Errorf("got %s", fileID(&base))
	}
	for name, change := range map[string]func(*Entry){
		"path":              func(e *Entry) { e.Path = "/b" },
		"parent":            func(e *Entry) { e.ParentID = spiffeid.RequireFromPath(td, "/spire/server") },
		"selectors":         func(e *Entry) { e.Selectors = e.Selectors[:1] },
		"X.509 TTL":         func(e *Entry) { e.X509TTL++ },
		"JWT TTL":           func(e *Entry) { e.JWTTTL++ },
		"DNS names":         func(e *Entry) { e.DNSNames = e.DNSNames[:1] },
		"their order":       func(e *Entry) { e.DNSNames[0], e.DNSNames[1] = e.DNSNames[1], e.DNSNames[0] },
		"hint":              func(e *Entry) { e.Hint += "x" },
		"federates_with":    func(e *Entry) { e.FederatesWith = nil },
		"audiences":         func(e *Entry) { e.Audiences = e.Audiences[1:] },
		"instance":          func(e *Entry) { e.Instance = false },
		"allow_traced":      func(e *Entry) { e.AllowTraced = false },
		"jwt_fresh":         func(e *Entry) { e.JWTFresh = false },
		"between two lists": func(e *Entry) { e.DNSNames, e.Audiences = nil, append(e.DNSNames, e.Audiences...) },
	} {
		e := base.clone()
		change(&e)
		if other, ok := seen[fileID(&e)]; ok {
			t.Errorf("a change of %s has the ID of %s", name, other)
		}
		seen[fileID(&e)] = name
	}
	// IDs are names that scripts keep: they may not change with a release.
	pinned, err := entry(t, "/agent/x", "unix:uid:1000").Check(td)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fileID(&pinned), "file-okb2yyl2anzjhywvjbp4f45fpi"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestWeak(t *testing.T) {
	for _, tc := range []struct {
		path, selectors string
		weak            string
	}{
		{"/a", "unix:path:/usr/bin/python3", "no selector names"},
		{"/a", "unix:sha256:00 process:host:true unix:gid:7", "no selector names"},
		{"/a", "docker:image_id:nginx:latest", "docker:image_id"},
		{"/a", "docker:image_id:nginx unix:uid:0", ""},
		{"/a", "container:runtime:docker container:path:/x", "no selector names"},
		{"/a", "k8s:node-name:n k8s:container-image:nginx", "no selector names"},
		{"/a", "process:parent_path:/usr/bin/bash", "no selector names"},
		{"/{{unix.user}}", "unix:path:/usr/bin/python3", ""},
		{"/{{unix.gid}}", "unix:path:/usr/bin/python3", "no selector names"},
		{"/a", "unix:path:/usr/bin/python3 unix:uid:1000", ""},
		{"/a", "cgroup:unit:x.service", ""},
		{"/a", "systemd:id:x.service", ""},
		{"/a", "container:name:x", ""},
		{"/a", "docker:label:a:b", ""},
		{"/a", "image:digest:sha256:00", ""},
		{"/a", "k8s:sa:default", ""},
		{"/a", "process:exec:x", ""},
		{"/a", "slurm:job_id:7", ""},
	} {
		got := Weak(entry(t, tc.path, strings.Fields(tc.selectors)...))
		if tc.weak == "" && got != "" || tc.weak != "" && !strings.Contains(got, tc.weak) {
			t.Errorf("%s with %s: got %q, want %q", tc.path, tc.selectors, got, tc.weak)
		}
	}
}

func ExampleFaults() {
	_, err := Entry{Path: "/spire/agent/x"}.Check(spiffeid.RequireTrustDomainFromString("example.org"))
	var faults Faults
	if errors.As(err, &faults) {
		for _, f := range faults {
			fmt.Printf("%s: %s\n", f.Field, f.Reason)
		}
	}
	// Output:
	// path: path "/spire/agent/x": IDs under /spire belong to SPIRE itself
	// selectors: an entry needs at least one selector; without any it would be everybody's
}
