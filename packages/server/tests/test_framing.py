import h11
import pytest

from octavo_server.framing import QuickConnection

PARTS = [b"data: {}\n\n", b"x" * 300, b"", b"last"]


def answer(connection: h11.Connection, request: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    connection.receive_data(request)
    while type(connection.next_event()) is not h11.EndOfMessage:
        pass
    events = [h11.Response(status_code=200, headers=headers), *(h11.Data(data=part) for part in PARTS)]
    return b"".join(connection.send(event) or b"" for event in (*events, h11.EndOfMessage()))


@pytest.mark.parametrize(
    ("version", "headers"),
    [("1.1", []), ("1.0", []), ("1.1", [(b"content-length", b"%d" % sum(map(len, PARTS)))])],
    ids=["chunks", "until the end", "length"],
)
def test_answers_are_framed_as_h11_does(version, headers):
    request = f"GET / HTTP/{version}\r\nhost: x\r\n\r\n".encode()
    quick, plain = QuickConnection(h11.SERVER), h11.Connection(h11.SERVER)
    assert answer(quick, request, headers) == answer(plain, request, headers)
    assert quick.our_state == plain.our_state


def test_a_connection_that_is_kept_frames_the_next_answer_anew():
    quick, plain = QuickConnection(h11.SERVER), h11.Connection(h11.SERVER)
    request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    for headers in ([], [(b"content-length", b"%d" % sum(map(len, PARTS)))]):
        assert answer(quick, request, headers) == answer(plain, request, headers)
        quick.start_next_cycle()
        plain.start_next_cycle()


def test_a_length_that_is_exceeded_is_still_refused():
    connection = QuickConnection(h11.SERVER)
    with pytest.raises(h11.LocalProtocolError):
        answer(connection, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", [(b"content-length", b"3")])
