package endpoint

import (
	"bytes"
	"runtime/debug"
	"runtime/pprof"
	"time"

	"google.golang.org/grpc"

	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
)

// chunk is how much of a profile goes into one message.
const chunk = 64 << 10

var profiles = map[adminv1.ProfileRequest_Kind]string{
	adminv1.ProfileRequest_KIND_HEAP:      "heap",
	adminv1.ProfileRequest_KIND_GOROUTINE: "goroutine",
	adminv1.ProfileRequest_KIND_MUTEX:     "mutex",
	adminv1.ProfileRequest_KIND_BLOCK:     "block",
	adminv1.ProfileRequest_KIND_ALLOCS:    "allocs",
}

// Profile takes a profile of the daemon.
func (a *admin) Profile(in *adminv1.ProfileRequest, st grpc.ServerStreamingServer[adminv1.ProfileResponse]) error {
	var out bytes.Buffer
	if in.Kind == adminv1.ProfileRequest_KIND_CPU {
		seconds := in.Seconds
		if seconds == 0 {
			seconds = 30
		}
		if seconds < 1 || seconds > 60 {
			return adminStatus(invalid("a CPU profile runs 1 to 60 seconds, not %d", seconds))
		}
		if err := pprof.StartCPUProfile(&out); err != nil {
			return adminStatus(&fault{errInUse, "another CPU profile is running"})
		}
		select {
		case <-time.After(time.Duration(seconds) * time.Second):
		case <-st.Context().Done():
		case <-a.s.stopping:
		}
		pprof.StopCPUProfile()
	} else {
		name, ok := profiles[in.Kind]
		if !ok {
			return adminStatus(invalid("unknown kind of profile %d", in.Kind))
		}
		if name == "heap" {
			debug.FreeOSMemory() // a heap profile is as of the last collection
		}
		if err := pprof.Lookup(name).WriteTo(&out, 0); err != nil {
			return adminStatus(err)
		}
	}
	for out.Len() > 0 {
		if err := st.Send(&adminv1.ProfileResponse{Chunk: out.Next(chunk)}); err != nil {
			return err
		}
	}
	return nil
}
