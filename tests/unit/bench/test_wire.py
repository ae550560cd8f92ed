import pytest

from tests.bench.wire import EventDecoder, ResponseDecoder, WireError
from tests.unit.bench.fake_server import LAST_CHUNK, OK_HEAD, chunk

BODY = 'data: {"text": "naïve 雪 🎿"}\r\n\r\n: a comment\n\ndata: two\nid: 7\ndata:lines\n\n'.encode()
EVENTS = ['{"text": "naïve 雪 🎿"}'.encode(), b"two\nlines"]
CHUNKED = OK_HEAD + chunk(BODY[:21]) + b"2c;name=value\r\n" + BODY[21:65] + b"\r\n" + chunk(BODY[65:]) + LAST_CHUNK


def decode(packets: list[bytes]) -> tuple[ResponseDecoder, list[bytes]]:
    response, events = ResponseDecoder(), EventDecoder()
    return response, [event for packet in packets for event in events.feed(response.feed(packet))]


@pytest.mark.parametrize("cut", range(1, len(CHUNKED)))
def test_any_cut_gives_the_same_events(cut: int) -> None:
    response, events = decode([CHUNKED[:cut], CHUNKED[cut:]])
    assert events == EVENTS
    assert response.complete
    assert response.status == 200


def test_byte_by_byte_gives_the_same_events() -> None:
    response, events = decode([bytes([byte]) for byte in CHUNKED])
    assert events == EVENTS
    assert response.complete


def test_a_body_is_complete_only_at_its_end() -> None:
    response, _ = decode([CHUNKED[:-2]])
    response.feed_eof()
    assert not response.complete


def test_a_sized_body() -> None:
    response = ResponseDecoder()
    packets = (b"HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\n\r\nab", b"cde")
    seen = [(response.feed(packet), response.complete) for packet in packets]
    assert seen == [(b"ab", False), (b"cde", True)]
    assert response.status == 404


def test_an_empty_sized_body_is_complete_at_once() -> None:
    response = ResponseDecoder()
    response.feed(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")
    assert response.complete


def test_a_body_without_length_ends_with_the_connection() -> None:
    response = ResponseDecoder()
    seen = [(response.feed(b"HTTP/1.0 200 OK\r\n\r\nab"), response.complete)]
    response.feed_eof()
    assert [*seen, response.complete] == [(b"ab", False), True]


def test_an_interim_response_is_passed_over() -> None:
    response = ResponseDecoder()
    assert response.feed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx") == b"x"
    assert response.status == 200


def test_trailers_are_skipped() -> None:
    response = ResponseDecoder()
    packets = (OK_HEAD + chunk(b"x") + b"0\r\nserver-timing: 1\r\n", b"\r\n")
    seen = [(response.feed(packet), response.complete) for packet in packets]
    assert seen == [(b"x", False), (b"", True)]


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        OK_HEAD + b"zz\r\n",
        OK_HEAD + b"1\r\nxy\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        ResponseDecoder().feed(data)


def test_an_event_without_its_blank_line_is_none() -> None:
    assert EventDecoder().feed(b"data: cut\n") == []
