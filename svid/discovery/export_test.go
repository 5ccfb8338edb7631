package discovery

// Bounds that tests reach.
const (
	MaxHostConns = maxHostConns
	ReadTime     = readTime
)
