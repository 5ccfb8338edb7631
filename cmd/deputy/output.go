package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// output prints results in the format that --output names.
type output struct {
	w      io.Writer
	format string
}

func (o *output) check() error {
	if o.format != "text" && o.format != "json" {
		return usage(fmt.Errorf("--output is text or json, not %q", o.format))
	}
	return nil
}

func (o *output) json() bool { return o.format == "json" }

// message prints a standard message as protojson, with the names of the proto
// file, indented.
func (o *output) message(m proto.Message) error {
	return o.encode(m, true)
}

// line prints a standard message as one line.
func (o *output) line(m proto.Message) error {
	return o.encode(m, false)
}

// protoJSON is what message prints, as a part of a value of ours.
func protoJSON(m proto.Message) (json.RawMessage, error) {
	return protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
}

func (o *output) encode(m proto.Message, indent bool) error {
	b, err := protoJSON(m)
	if err != nil {
		return err
	}
	// protojson puts spaces in at random, so that nobody relies on them.
	var tidy bytes.Buffer
	if indent {
		err = json.Indent(&tidy, b, "", "  ")
	} else {
		err = json.Compact(&tidy, b)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(o.w, "%s\n", &tidy)
	return err
}

// value prints a value of ours as JSON.
func (o *output) value(v any) error {
	e := json.NewEncoder(o.w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// valueLine is value on one line.
func (o *output) valueLine(v any) error {
	e := json.NewEncoder(o.w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// A field is a line of text output.
type field struct{ name, value string }

// fields prints "name: value" lines with the values in one column; those
// without a value are left out.
func (o *output) fields(fields ...field) error {
	width := 0
	for _, f := range fields {
		if f.value != "" {
			width = max(width, len(f.name))
		}
	}
	var b strings.Builder
	for _, f := range fields {
		if f.value != "" {
			fmt.Fprintf(&b, "%-*s %s\n", width+1, f.name+":", f.value)
		}
	}
	_, err := io.WriteString(o.w, b.String())
	return err
}

// plain makes text that came from elsewhere safe for a terminal.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r >= 0x7f && r < 0xa0 {
			return '\uFFFD'
		}
		return r
	}, s)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
