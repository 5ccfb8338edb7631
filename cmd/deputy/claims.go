package main

import (
	"context"
	"errors"

	"github.com/hashicorp/hcl/v2"

	"github.com/deputy-id/deputy/conf"
	"github.com/deputy-id/deputy/plugins/claims"
	"github.com/deputy-id/deputy/svid"
)

// readClaims reads the claims block, and the rules file that it names. Without
// a block the rules map nothing.
func (s *settings) readClaims() (problems conf.Problems) {
	s.claims = new(claims.Rules)
	c := s.Claims
	if c == nil {
		return nil
	}
	rules, err := claims.Load(context.Background(), claims.Source{
		Name: c.Range.Filename, Text: c.Text, Line: c.Start.Line, Column: c.Start.Column, Byte: c.Start.Byte,
	}, s.TrustDomain.Value)
	var found claims.Problems
	switch {
	case errors.As(err, &found):
		addClaims(&problems, found)
	case err != nil:
		problems.Add(c.Range, "%s", err)
	default:
		s.claims = rules
		addClaims(&s.warnings, rules.X509Blocks())
	}
	return problems
}

// addClaims adds what the claims' own reader has to say.
func addClaims(to *conf.Problems, found claims.Problems) {
	for _, p := range found {
		at := hcl.Pos{Line: p.Line, Column: p.Column, Byte: p.Byte}
		to.Add(hcl.Range{Filename: p.File, Start: at, End: at}, "%s", p.Reason)
	}
}

// followClaims has tokens minted anew when the rules are others.
func followClaims(ctx context.Context, book *claims.Rulebook, keeper *svid.Keeper) error {
	_, stale := book.Rules()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-stale:
			_, stale = book.Rules()
			keeper.ForgetTokens()
		}
	}
}
