# agent.py SOCKET: fetches its X.509-SVID with nothing but what Python brings,
# then lets a child of its own try the same, and waits to be ended. It prints
# who got what.
import re
import socket
import struct
import subprocess
import sys

DATA, HEADERS, SETTINGS, PING, GOAWAY = 0, 1, 4, 6, 7
END_STREAM, ACK, END_HEADERS = 1, 1, 4


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header(name, value):
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def identity(path):
    c = socket.socket(socket.AF_UNIX)
    c.settimeout(20)
    c.connect(path)
    headers = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/SpiffeWorkloadAPI/FetchX509SVID"),
        (b":authority", b"localhost"), (b"content-type", b"application/grpc"), (b"te", b"trailers"),
        (b"workload.spiffe.io", b"true"),
    ]
    c.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)
              + frame(HEADERS, END_HEADERS, 1, b"".join(header(*h) for h in headers))
              + frame(DATA, END_STREAM, 1, b"\0" * 5))
    f = c.makefile("rb")
    said = b""
    while True:
        head = f.read(9)
        if len(head) < 9:
            return "closed"
        length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        payload = f.read(length)
        if kind == SETTINGS and not flags & ACK:
            c.sendall(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            c.sendall(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            return "refused: " + payload[8:].decode()
        elif kind == DATA:
            said += payload
            found = re.search(rb"spiffe://[a-z0-9./]+", said)
            if found:
                return found[0].decode()
        elif kind == HEADERS and flags & END_STREAM:
            return "no identity"


if __name__ == "__main__":
    print(sys.argv[2] if len(sys.argv) > 2 else "agent", identity(sys.argv[1]), flush=True)
    if len(sys.argv) == 2:
        subprocess.run([sys.executable, __file__, sys.argv[1], "child"])
        sys.stdin.read()
