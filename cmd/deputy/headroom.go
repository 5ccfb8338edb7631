package main

import "runtime"

// headroom is how many bytes more of garbage the daemon may have than its live
// heap alone would allow.
const headroom = 16 << 20

// reserve lets garbage grow by the headroom before it is collected, until the
// caller calls release. A daemon with a few clients has so little on the heap
// that under load Go would collect it some fifty times a second, which cost a
// sixth of its processor time. The bytes are never touched, so they take up
// addresses and no memory; and with ten thousand streams they change little,
// where a higher GOGC would multiply.
func reserve() (release func()) {
	untouched := make([]byte, headroom)
	return func() { runtime.KeepAlive(untouched) }
}
