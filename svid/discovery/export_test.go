package discovery

// Bounds that tests reach.
const (
	MaxConns = maxConns
	ReadTime = readTime
)
