"""Framing: how the parts of a streamed answer become HTTP/1.1's chunks, quickly."""

from __future__ import annotations

import h11


class QuickConnection(h11.Connection):
    """An h11 connection that frames the parts of a long answer itself once h11 has shown that it sends them as chunks.

    A stream sends a part for each token of each reader. h11 walks its state machine for every one, which tells it
    nothing new: from one part to the next only the length differs.
    """

    _chunks = False

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # h11's overloads say no more
        """Return an event as bytes."""
        if type(event) is not h11.Data:
            self._chunks = False
            return super().send(event)
        if self._chunks and event.data:
            return _chunk(event.data)
        framed = super().send(event)
        self._chunks = bool(event.data) and framed == _chunk(event.data)
        return framed

    def frame(self, data: bytes) -> bytes:
        """Return a part of an answer that has begun as bytes."""
        return _chunk(data) if self._chunks and data else self.send(h11.Data(data=data)) or b""


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
