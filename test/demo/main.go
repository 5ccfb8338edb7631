// Command demo shows Deputy's main job with real processes: a daemon, two
// agents, a container where an engine can be had, and an intruder.
package main

import (
	"errors"
	"fmt"
	"os"
)

func main() {
	if len(os.Args) > 2 { // started by the demonstration, as an agent
		if err := agent(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if err := demonstrate(); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		if errors.Is(err, errInterrupted) {
			os.Exit(130)
		}
		os.Exit(1)
	}
}
