// Command bench measures a Deputy daemon as a client of its socket sees it,
// beside a bare gRPC server that sends the same bytes without attestation, and,
// where SPIRE was built (make bench-peers), beside its agent.
//
// A client calls in a closed loop, eight calls at a time, two on a connection.
// The servers are measured in turn, several times; a rate is the median, and a
// ratio the median of the ratios of two measurements that followed one another:
// so one machine's noise falls on both. p50 and p99 are the latency that the
// client saw and cpu the processor time that the server used for a call, all in
// microseconds; memory is KiB of resident set per stream after a garbage
// collection.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run is the driver, or, with a first argument, one of the processes that it starts.
func run(args []string) error {
	if len(args) > 0 {
		switch args[0] {
		case "bare":
			return serveBare(args[1], args[2])
		case "save":
			return save(args[1], args[2])
		case "measure":
			workers, err := strconv.Atoi(args[3])
			if err != nil {
				return err
			}
			length, err := time.ParseDuration(args[4])
			if err != nil {
				return err
			}
			return measure(args[1], args[2], workers, length)
		case "hold":
			processes, err := strconv.Atoi(args[2])
			if err != nil {
				return err
			}
			streams, err := strconv.Atoi(args[3])
			if err != nil {
				return err
			}
			return hold(args[1], processes, streams, args[4])
		case "held":
			streams, err := strconv.Atoi(args[3])
			if err != nil {
				return err
			}
			return holdOwn(args[1], args[2], streams, args[4])
		case "idle":
			ended := make(chan os.Signal, 1)
			signal.Notify(ended, syscall.SIGTERM)
			<-ended
			return nil
		}
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	var o options
	flags.StringVar(&o.deputy, "deputy", "bin/deputy", "the binary to measure")
	flags.DurationVar(&o.length, "length", 3*time.Second, "of one measurement")
	flags.IntVar(&o.rounds, "rounds", 5, "of measurements, Deputy and bare in turn")
	flags.IntVar(&o.workers, "workers", 8, "that call at a time, two on a connection")
	flags.IntVar(&o.processes, "processes", 100, "that hold streams")
	flags.IntVar(&o.streams, "streams", 100, "that each of them holds on one connection")
	flags.IntVar(&o.alone, "alone", 400, "processes that hold one stream each, for the rotation")
	flags.StringVar(&o.only, "only", "", "measure this alone: x509, connect, jwt, validate, sds, secrets, memory, change, push, spire, rotation")
	flags.StringVar(&o.profile, "profile", "", "write profiles of Deputy to `FILE`.x509.cpu, FILE.x509.allocs and so on, for go tool pprof")
	if err := flags.Parse(args); err != nil {
		return err
	}
	return drive(o)
}
