package registry

import "context"

// Break makes every further change of the database fail, by a pragma of
// SQLite: query_only is a disk that is read-only, max_page_count = 1 a full one.
func (s *Store) Break(ctx context.Context, pragma string) error {
	_, err := s.db.db.ExecContext(ctx, "PRAGMA "+pragma)
	return err
}
