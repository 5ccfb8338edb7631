package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	_ "modernc.org/sqlite" // the driver "sqlite"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/internal/durable"
)

// application marks the file as ours in its header ("dpty").
const application = 0x64707479

// migrations lead from one schema to the next; user_version counts them.
var migrations = []string{
	`CREATE TABLE meta (
		name  TEXT PRIMARY KEY,
		value TEXT NOT NULL
	) STRICT, WITHOUT ROWID;
	CREATE TABLE entry (
		id         TEXT PRIMARY KEY,
		revision   INTEGER NOT NULL,
		created_at INTEGER NOT NULL, -- Unix time in nanoseconds
		expires_at INTEGER NOT NULL, -- likewise; 0: never
		body       BLOB NOT NULL,    -- the other fields, as JSON
		sum        BLOB NOT NULL     -- SHA-256 over all of that: SQLite has no checksums of its own
	) STRICT, WITHOUT ROWID`,
}

// A database keeps entries on the disk.
type database struct {
	db *sql.DB
}

// body is the part of an entry that the database stores as JSON.
type body struct {
	Path          string                 `json:"path"`
	ParentID      spiffeid.ID            `json:"parent_id"`
	Selectors     []string               `json:"selectors"`
	X509TTL       int64                  `json:"x509_ttl,omitempty"` // seconds
	JWTTTL        int64                  `json:"jwt_ttl,omitempty"`  // seconds
	DNSNames      []string               `json:"dns_names,omitempty"`
	Hint          string                 `json:"hint,omitempty"`
	FederatesWith []spiffeid.TrustDomain `json:"federates_with,omitempty"`
	Audiences     []string               `json:"audiences,omitempty"`
	Instance      bool                   `json:"instance,omitempty"`
	AllowTraced   bool                   `json:"allow_traced,omitempty"`
	JWTFresh      bool                   `json:"jwt_fresh,omitempty"`
}

// openDatabase opens the file at path, or makes it, and reads the entries that
// have not expired. A file that is not in order is left as it is.
func openDatabase(ctx context.Context, path string, td spiffeid.TrustDomain) (_ *database, _ []Entry, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open entry database %s: %w", path, err)
		}
	}()
	path, err = filepath.Abs(path)
	if err != nil {
		return nil, nil, err
	}
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := createDatabase(ctx, path, td); err != nil {
			return nil, nil, err
		}
	case err != nil:
		return nil, nil, err
	case !info.Mode().IsRegular():
		return nil, nil, errors.New("it is not a regular file")
	case info.Size() == 0:
		// A new database is never empty, so this one lost its content.
		return nil, nil, errors.New("it is empty, as if it had been cut off; restore it, or remove it to begin anew")
	}

	// SQLite may write to whatever it opens for writing, so look first.
	entries, version, err := inspect(ctx, path, td)
	if err != nil {
		return nil, nil, err
	}
	db, err := connect(path, "rw")
	if err != nil {
		return nil, nil, err
	}
	d := &database{db: db}
	if err := d.migrate(ctx, version); err != nil {
		db.Close()
		return nil, nil, err
	}
	now := time.Now()
	live := entries[:0]
	for _, e := range entries {
		if e.ExpiresAt.IsZero() || now.Before(e.ExpiresAt) {
			live = append(live, e)
		}
	}
	return d, live, nil
}

// connect returns a handle with a single connection: there is one writer, and
// readers have the Set. Each commit is on the disk before it returns.
func connect(path, mode string) (*sql.DB, error) {
	q := url.Values{"mode": {mode}, "_txlock": {"immediate"}, "_pragma": {"busy_timeout(5000)", "synchronous(full)"}}
	u := url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}
	db, err := sql.Open("sqlite", u.String())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	return db, nil
}

// createDatabase makes the file under another name and moves it into place
// when it is complete: a crash leaves either no database or a whole one.
func createDatabase(ctx context.Context, path string, td spiffeid.TrustDomain) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-"+filepath.Base(path)+"-*") // 0600
	if err != nil {
		return err
	}
	name := f.Name()
	defer os.Remove(name)
	if err := f.Close(); err != nil {
		return err
	}
	db, err := connect(name, "rw")
	if err != nil {
		return err
	}
	d := &database{db: db}
	err = d.migrate(ctx, 0)
	if err == nil {
		_, err = db.ExecContext(ctx, `INSERT INTO meta (name, value) VALUES ('trust_domain', ?)`, td.Name())
	}
	if err == nil {
		_, err = db.ExecContext(ctx, fmt.Sprintf(`PRAGMA application_id = %d`, application))
	}
	if err == nil {
		_, err = db.ExecContext(ctx, `PRAGMA journal_mode = wal`)
	}
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	if err := os.Rename(name, path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

// migrate brings the schema from a version up to date, all in one transaction.
func (d *database) migrate(ctx context.Context, version int) error {
	if version == len(migrations) {
		return nil
	}
	return d.change(ctx, func(tx *sql.Tx) error {
		for _, m := range migrations[version:] {
			if _, err := tx.ExecContext(ctx, m); err != nil {
				return fmt.Errorf("migrate: %w", err)
			}
		}
		_, err := tx.ExecContext(ctx, fmt.Sprintf(`PRAGMA user_version = %d`, len(migrations)))
		return err
	})
}

// inspect checks the whole file and reads it, without writing to it.
func inspect(ctx context.Context, path string, td spiffeid.TrustDomain) (entries []Entry, version int, err error) {
	db, err := connect(path, "ro")
	if err != nil {
		return nil, 0, err
	}
	defer db.Close()

	var app int
	if err := db.QueryRowContext(ctx, `PRAGMA application_id`).Scan(&app); err != nil {
		return nil, 0, err
	}
	if app != application {
		return nil, 0, errors.New("it is not a database of deputy's")
	}
	var report string
	if err := db.QueryRowContext(ctx, `PRAGMA integrity_check(1)`).Scan(&report); err != nil {
		return nil, 0, err
	}
	if report != "ok" {
		return nil, 0, fmt.Errorf("it is corrupt: %s", report)
	}
	if err := db.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil {
		return nil, 0, err
	}
	if version < 1 || version > len(migrations) {
		return nil, 0, fmt.Errorf("it has version %d; this program knows up to %d", version, len(migrations))
	}
	var of string
	if err := db.QueryRowContext(ctx, `SELECT value FROM meta WHERE name = 'trust_domain'`).Scan(&of); err != nil {
		return nil, 0, fmt.Errorf("read its trust domain: %w", err)
	}
	if of != td.Name() {
		return nil, 0, fmt.Errorf("it belongs to the trust domain %q, not %q", of, td.Name())
	}

	rows, err := db.QueryContext(ctx, `SELECT id, revision, created_at, expires_at, body, sum FROM entry`)
	if err != nil {
		return nil, 0, err
	}
	defer rows.Close()
	for rows.Next() {
		var r row
		if err := rows.Scan(&r.id, &r.revision, &r.created, &r.expires, &r.body, &r.sum); err != nil {
			return nil, 0, err
		}
		e, err := r.entry(td)
		if err != nil {
			return nil, 0, fmt.Errorf("entry %q: %w", r.id, err)
		}
		entries = append(entries, e)
	}
	return entries, version, rows.Err()
}

// A row is an entry as the database has it.
type row struct {
	id                         string
	revision, created, expires int64
	body, sum                  []byte
}

func newRow(e *Entry) (*row, error) {
	b := body{
		Path: e.Path, ParentID: e.ParentID,
		X509TTL: int64(e.X509TTL / time.Second), JWTTTL: int64(e.JWTTTL / time.Second),
		DNSNames: e.DNSNames, Hint: e.Hint, FederatesWith: e.FederatesWith, Audiences: e.Audiences,
		Instance: e.Instance, AllowTraced: e.AllowTraced, JWTFresh: e.JWTFresh,
	}
	for _, s := range e.Selectors {
		b.Selectors = append(b.Selectors, s.String())
	}
	text, err := json.Marshal(b)
	if err != nil {
		return nil, err
	}
	r := &row{id: e.ID, revision: e.Revision, created: e.CreatedAt.UnixNano(), body: text}
	if !e.ExpiresAt.IsZero() {
		r.expires = e.ExpiresAt.UnixNano()
	}
	r.sum = r.digest()
	return r, nil
}

func (r *row) digest() []byte {
	h := sha256.New()
	text(h, r.id, string(r.body))
	number(h, r.revision, r.created, r.expires)
	return h.Sum(nil)
}

func (r *row) entry(td spiffeid.TrustDomain) (Entry, error) {
	if !bytes.Equal(r.sum, r.digest()) {
		return Entry{}, errors.New("its checksum does not fit its content")
	}
	var b body
	dec := json.NewDecoder(bytes.NewReader(r.body))
	dec.DisallowUnknownFields() // a field that is not understood might have narrowed the entry
	if err := dec.Decode(&b); err != nil {
		return Entry{}, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return Entry{}, errors.New("more than one value in its body")
	}
	e := Entry{
		ID: r.id, Path: b.Path, ParentID: b.ParentID,
		X509TTL: time.Duration(b.X509TTL) * time.Second, JWTTTL: time.Duration(b.JWTTTL) * time.Second,
		DNSNames: b.DNSNames, Hint: b.Hint, FederatesWith: b.FederatesWith, Audiences: b.Audiences,
		Instance: b.Instance, AllowTraced: b.AllowTraced, JWTFresh: b.JWTFresh,
		CreatedAt: time.Unix(0, r.created), Revision: r.revision,
	}
	if r.expires != 0 {
		e.ExpiresAt = time.Unix(0, r.expires)
	}
	for _, s := range b.Selectors {
		sel, err := attestor.ParseSelector(s)
		if err != nil {
			return Entry{}, err
		}
		e.Selectors = append(e.Selectors, sel)
	}
	return e.Check(td)
}

// put writes an entry, over what the database has under its ID: an expired one
// may still be there.
func (d *database) put(ctx context.Context, e *Entry) error {
	r, err := newRow(e)
	if err != nil {
		return err
	}
	return d.change(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO entry (id, revision, created_at, expires_at, body, sum) VALUES (?, ?, ?, ?, ?, ?)
			ON CONFLICT (id) DO UPDATE SET revision = excluded.revision, created_at = excluded.created_at,
				expires_at = excluded.expires_at, body = excluded.body, sum = excluded.sum`,
			r.id, r.revision, r.created, r.expires, r.body, r.sum)
		return err
	})
}

func (d *database) delete(ctx context.Context, ids ...string) error {
	return d.change(ctx, func(tx *sql.Tx) error {
		for _, id := range ids {
			if _, err := tx.ExecContext(ctx, `DELETE FROM entry WHERE id = ?`, id); err != nil {
				return err
			}
		}
		return nil
	})
}

func (d *database) change(ctx context.Context, f func(*sql.Tx) error) error {
	tx, err := d.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		tx.Rollback()
		return err
	}
	return tx.Commit()
}

func (d *database) close() error { return d.db.Close() }
