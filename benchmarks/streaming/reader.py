"""A reader of many streams on bare sockets, in a process of its own: what it costs is not what a client library costs.

    python reader.py < plan.json

A plan has `port`, `path`, `body`, `num_streams`, `stagger` and `rest`. The same request goes out on as many
connections, `stagger` seconds apart. The reader rests `rest` seconds before each look, notes when bytes with events
come, and prints one JSON line: per stream the time to the first event and all gaps between events, and the reader's own
CPU time. Only the standard library is imported, and bytes are searched, not parsed.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field

_LIMIT_SECONDS = 100.0


@dataclass
class Stream:
    """One connection; times are of the monotonic clock."""

    connection: socket.socket
    sent: float
    arrivals: list[float] = field(default_factory=list)
    num_events: int = 0
    tail: bytes = b""

    def take(self, data: bytes, now: float) -> bool:
        """Note what came; return True at the end of the stream."""
        seen = self.tail + data
        num_events = seen.count(b"data: {") - self.tail.count(b"data: {")
        self.tail = seen[-16:]
        if num_events:
            self.arrivals.append(now)
            self.num_events += num_events
        return not data or b"data: [DONE]" in seen


def open_stream(port: int, request: bytes) -> Stream:
    """Connect and send a request."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sent = time.monotonic()
    connection.sendall(request)
    connection.setblocking(False)
    return Stream(connection, sent)


def read_all(port: int, request: bytes, num_streams: int, stagger: float, rest: float) -> list[Stream]:
    """Open the streams one after another and read all of them to their ends."""
    streams: list[Stream] = []
    selector = selectors.DefaultSelector()
    started = time.monotonic()
    num_open = 0
    while num_open or len(streams) < num_streams:
        now = time.monotonic()
        if now - started > _LIMIT_SECONDS:
            raise SystemExit(f"streams had not ended after {_LIMIT_SECONDS:g} s")
        while len(streams) < num_streams and now - started >= len(streams) * stagger:
            streams.append(open_stream(port, request))
            selector.register(streams[-1].connection, selectors.EVENT_READ, streams[-1])
            num_open += 1
        time.sleep(rest)
        wait = 1.0 if len(streams) == num_streams else stagger
        for key, _ in selector.select(wait):
            stream: Stream = key.data
            if stream.take(stream.connection.recv(1 << 16), time.monotonic()):
                selector.unregister(stream.connection)
                stream.connection.close()
                num_open -= 1
    return streams


def main() -> None:
    plan = json.load(sys.stdin)
    body = json.dumps(plan["body"]).encode()
    head = f"POST {plan['path']} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    streams = read_all(plan["port"], head.encode() + body, plan["num_streams"], plan["stagger"], plan["rest"])
    answer = {
        "cpu_seconds": time.process_time(),
        "first": [stream.arrivals[0] - stream.sent for stream in streams],
        "num_events": [stream.num_events for stream in streams],
        "gaps": [
            [later - earlier for earlier, later in zip(stream.arrivals, stream.arrivals[1:], strict=False)]
            for stream in streams
        ],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
