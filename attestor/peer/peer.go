// Package peer pins the process at the other end of a Unix socket.
//
// A PID is a number that the kernel gives to the next comer. This package
// turns it, once and at accept, into a Process: a pidfd, with the process's
// /proc directory held open, from which all else is read. A Conn adds what the
// process was at that moment (its program and its credentials), takes
// messages from that process alone, and makes the program prove that it is
// the one that reads the answers (Challenge).
//
// It defends against a reused PID, a child that inherited the connection, a
// program that sends a request and then executes another one, and a descriptor
// that was handed to a privileged program as its standard input. It does not
// defend against a process that hands its connection to a reader on purpose.
//
// A caller closes each Conn, and each Process that Table.Open gave it.
package peer
