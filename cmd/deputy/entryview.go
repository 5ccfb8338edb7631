package main

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
)

// An entryView is an entry under the configuration's keys.
type entryView struct {
	ID            string   `json:"id"`
	SPIFFEID      string   `json:"spiffe_id"`
	ParentID      string   `json:"parent_id"`
	Selectors     []string `json:"selectors"`
	X509TTL       string   `json:"x509_ttl,omitempty"`
	JWTTTL        string   `json:"jwt_ttl,omitempty"`
	DNSNames      []string `json:"dns_names,omitempty"`
	Hint          string   `json:"hint,omitempty"`
	FederatesWith []string `json:"federates_with,omitempty"`
	Audiences     []string `json:"audiences,omitempty"`
	Instance      bool     `json:"instance"`
	AllowTraced   bool     `json:"allow_traced"`
	JWTFresh      bool     `json:"jwt_fresh"`
	CreatedAt     string   `json:"created_at,omitempty"`
	ExpiresAt     string   `json:"expires_at,omitempty"`
	Revision      int64    `json:"revision"`
	Origin        string   `json:"origin"`
}

func viewEntry(e *adminv1.Entry) entryView {
	s := e.GetEntry()
	v := entryView{
		ID: s.GetId(), SPIFFEID: idText(s.GetSpiffeId()), ParentID: idText(s.GetParentId()), Selectors: []string{},
		DNSNames: s.GetDnsNames(), Hint: s.GetHint(), FederatesWith: s.GetFederatesWith(), Audiences: e.GetAudiences(),
		Instance: e.GetInstance(), AllowTraced: e.GetAllowTraced(), JWTFresh: s.GetAdditionalAttributes().GetJwtSvidIncludeJti(),
		Revision: s.GetRevisionNumber(), Origin: strings.ToLower(strings.TrimPrefix(e.GetOrigin().String(), "ORIGIN_")),
	}
	for _, sel := range s.GetSelectors() {
		v.Selectors = append(v.Selectors, sel.Type+":"+sel.Value)
	}
	ttl := func(seconds int32) string {
		if seconds == 0 {
			return ""
		}
		return (time.Duration(seconds) * time.Second).String()
	}
	moment := func(unix int64) string {
		if unix == 0 {
			return ""
		}
		return stamp(time.Unix(unix, 0))
	}
	v.X509TTL, v.JWTTTL = ttl(s.GetX509SvidTtl()), ttl(s.GetJwtSvidTtl())
	v.CreatedAt, v.ExpiresAt = moment(s.GetCreatedAt()), moment(s.GetExpiresAt())
	return v
}

func idText(id *types.SPIFFEID) string {
	if id == nil {
		return ""
	}
	return "spiffe://" + id.TrustDomain + id.Path
}

func printEntry(out *output, e *adminv1.Entry) error {
	v := viewEntry(e)
	if out.json() {
		return out.value(v)
	}
	mark := func(set bool) string {
		if set {
			return "true"
		}
		return ""
	}
	fields := []field{{"id", v.ID}, {"spiffe_id", v.SPIFFEID}}
	for _, s := range v.Selectors {
		fields = append(fields, field{"selector", plain(s)})
	}
	return out.fields(append(fields,
		field{"x509_ttl", v.X509TTL},
		field{"jwt_ttl", v.JWTTTL},
		field{"dns_names", strings.Join(v.DNSNames, " ")},
		field{"hint", plain(v.Hint)},
		field{"federates_with", strings.Join(v.FederatesWith, " ")},
		field{"audiences", plain(strings.Join(v.Audiences, " "))},
		field{"instance", mark(v.Instance)},
		field{"allow_traced", mark(v.AllowTraced)},
		field{"jwt_fresh", mark(v.JWTFresh)},
		field{"created_at", v.CreatedAt},
		field{"expires_at", v.ExpiresAt},
		field{"revision", fmt.Sprint(v.Revision)},
		field{"origin", v.Origin},
	)...)
}

func printEntries(out *output, entries []*adminv1.Entry) error {
	if out.json() {
		views := []entryView{}
		for _, e := range entries {
			views = append(views, viewEntry(e))
		}
		return out.value(map[string][]entryView{"entries": views})
	}
	if len(entries) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(out.w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tSPIFFE ID\tSELECTORS")
	for _, e := range entries {
		v := viewEntry(e)
		fmt.Fprintf(w, "%s\t%s\t%s\n", v.ID, v.SPIFFEID, plain(strings.Join(v.Selectors, " ")))
	}
	return w.Flush()
}
