// Command bench measures a Deputy daemon as a client of its socket sees it,
// beside a bare gRPC server that sends the same bytes without attestation.
//
// The two are measured in turn, several times, and the table gives medians and
// the ratio of the medians: one machine's noise falls on both. Times are in
// microseconds, rates in operations per second, memory in KiB of resident set
// per stream after a garbage collection.
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
			return save(args[1])
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
			streams, err := strconv.Atoi(args[2])
			if err != nil {
				return err
			}
			return hold(args[1], streams)
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
	flags.StringVar(&o.only, "only", "", "measure this alone: x509, connect, jwt, validate, memory, rotation, change")
	if err := flags.Parse(args); err != nil {
		return err
	}
	return drive(o)
}
