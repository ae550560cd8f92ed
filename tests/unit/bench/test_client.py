import asyncio
from collections.abc import Sequence
from time import perf_counter

import pytest

from tests.bench.client import Endpoint, get_json, stream_completion
from tests.bench.timeline import FailureKind, Timeline
from tests.bench.workload import PlannedRequest
from tests.unit.bench.fake_server import (
    DONE,
    LAST_CHUNK,
    OK_HEAD,
    chunk,
    event,
    scripted,
    stream_body,
    token_event,
    usage_event,
)


def follow(
    packets: Sequence[bytes],
    output_tokens: int = 3,
    hang: bool = False,
    timeout_s: float = 5,
    allow_merged_chunks: bool = False,
) -> Timeline:
    async def exchange() -> Timeline:
        async with scripted(packets, hang) as url:
            request = PlannedRequest("m", b'{"model": "m"}', output_tokens)
            return await stream_completion(
                Endpoint.from_url(url), request, perf_counter(), timeout_s, allow_merged_chunks
            )

    return asyncio.run(exchange())


def failure_of(timeline: Timeline) -> FailureKind | None:
    return None if timeline.failure is None else timeline.failure.kind


def whole(*events: bytes) -> list[bytes]:
    return [OK_HEAD, *(chunk(part) for part in events), LAST_CHUNK]


def test_each_packet_gets_its_own_time() -> None:
    timeline = follow(
        whole(token_event(), token_event(), token_event(finish_reason="length"), usage_event(3, 11, 4), DONE)
    )
    assert timeline.failure is None
    assert (timeline.prompt_tokens, timeline.cached_tokens, timeline.output_tokens) == (11, 4, 3)
    assert len(timeline.chunk_times_s) == 3
    assert min(timeline.itls_s) > 0
    assert timeline.due_s <= timeline.sent_s < timeline.chunk_times_s[0] < timeline.done_s


def test_several_events_in_one_packet_are_simultaneous_tokens() -> None:
    timeline = follow([OK_HEAD + chunk(stream_body(3)) + LAST_CHUNK])
    assert timeline.failure is None
    assert timeline.itls_s == [0.0, 0.0]


def test_cuts_inside_lines_and_characters_do_not_matter() -> None:
    body = token_event("雪") + token_event("é") + token_event("🎿", "length") + usage_event(3) + DONE
    wire = OK_HEAD + b"".join(chunk(body[at : at + 7]) for at in range(0, len(body), 7)) + LAST_CHUNK
    timeline = follow([wire[at : at + 19] for at in range(0, len(wire), 19)])
    assert timeline.failure is None
    assert len(timeline.chunk_times_s) == 3


def test_an_empty_text_is_still_a_token() -> None:
    timeline = follow(whole(token_event(""), token_event(""), token_event(), usage_event(3), DONE))
    assert timeline.failure is None
    assert len(timeline.chunk_times_s) == 3


def test_a_reason_in_a_chunk_of_its_own_is_not_a_token() -> None:
    bare = token_event("", finish_reason="length")
    timeline = follow(whole(token_event(), token_event(), token_event(), bare, usage_event(3), DONE))
    assert timeline.failure is None
    assert len(timeline.chunk_times_s) == 3


def test_a_last_token_without_text_is_a_token() -> None:
    bare = token_event("", finish_reason="length")
    timeline = follow(whole(token_event(), token_event(), bare, usage_event(3), DONE))
    assert timeline.failure is None
    assert len(timeline.chunk_times_s) == 3


def test_an_error_event_in_mid_stream() -> None:
    error = event({"error": {"message": "adapter unloaded", "type": "server_error"}})
    timeline = follow(whole(token_event(), error, DONE))
    assert timeline.failure is not None
    assert timeline.failure.kind is FailureKind.SSE_ERROR
    assert "adapter unloaded" in timeline.failure.detail


@pytest.mark.parametrize(
    "packets",
    [
        [],
        [OK_HEAD, chunk(token_event())],
        [OK_HEAD, chunk(stream_body(3))],  # all there but the end of the body
        whole(token_event() * 3, usage_event(3)),  # no [DONE]
    ],
    ids=["no answer", "mid-stream", "no last chunk", "no DONE"],
)
def test_an_early_close(packets: list[bytes]) -> None:
    assert failure_of(follow(packets)) is FailureKind.CLOSED_EARLY


def test_a_500_with_its_message() -> None:
    timeline = follow([b'HTTP/1.1 500 Oh\r\ncontent-length: 16\r\n\r\n{"error": "oops"', b""])
    assert timeline.failure is not None
    assert timeline.failure.kind is FailureKind.HTTP_STATUS
    assert timeline.failure.detail == '500: {"error": "oops"'


def test_any_other_status_is_an_error_even_with_a_stream() -> None:
    head = OK_HEAD.replace(b"200 OK", b"206 Partial Content")
    assert failure_of(follow([head, chunk(stream_body(3)), LAST_CHUNK])) is FailureKind.HTTP_STATUS


@pytest.mark.parametrize("tokens", [2, 4])
def test_a_wrong_length_is_an_error(tokens: int) -> None:
    assert failure_of(follow(whole(stream_body(tokens)))) is FailureKind.WRONG_LENGTH


def test_a_missing_usage_is_an_error() -> None:
    assert failure_of(follow(whole(token_event() * 3, DONE))) is FailureKind.NO_USAGE


def test_merged_tokens_are_an_error_unless_allowed() -> None:
    packets = whole(token_event(), token_event(), usage_event(3), DONE)
    assert failure_of(follow(packets)) is FailureKind.CHUNK_MISMATCH
    assert follow(packets, allow_merged_chunks=True).failure is None


def test_a_last_chunk_with_text_and_reason_counts_among_merged_ones() -> None:
    last = token_event("three words more", finish_reason="length")
    timeline = follow(whole(token_event(), last, usage_event(4), DONE), 4, allow_merged_chunks=True)
    assert timeline.failure is None
    assert len(timeline.chunk_times_s) == 2


@pytest.mark.parametrize("chunks", [0, 4])
def test_more_chunks_than_tokens_or_none_is_always_an_error(chunks: int) -> None:
    timeline = follow(whole(*[token_event()] * chunks, usage_event(3), DONE), allow_merged_chunks=True)
    assert failure_of(timeline) is FailureKind.CHUNK_MISMATCH


@pytest.mark.parametrize(
    "strange",
    [
        b"data: {not json\n\n",
        b"data: [1]\n\n",
        b'data: {"usage": {}}\n\n',
        b'data: {"choices": [1]}\n\n',
        b"data: \xff\n\n",
    ],
)
def test_a_strange_event_is_a_protocol_failure(strange: bytes) -> None:
    assert failure_of(follow(whole(strange, DONE))) is FailureKind.PROTOCOL


def test_what_is_not_http_is_a_protocol_failure() -> None:
    assert failure_of(follow([b"SSH-2.0\r\n\r\n"])) is FailureKind.PROTOCOL


def test_a_hanging_stream_times_out() -> None:
    assert failure_of(follow([OK_HEAD, chunk(token_event())], hang=True, timeout_s=0.1)) is FailureKind.TIMEOUT


def test_a_refused_connection() -> None:
    async def exchange() -> Timeline:
        async with scripted([]) as url:
            pass
        return await stream_completion(Endpoint.from_url(url), PlannedRequest("m", b"{}", 1), perf_counter(), 5)

    assert failure_of(asyncio.run(exchange())) is FailureKind.CONNECTION


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:8000", Endpoint("h", 8000)),
        ("http://h:8000/v1/", Endpoint("h", 8000)),
        ("https://h/motet/v1", Endpoint("h", 443, tls=True, prefix="/motet")),
        ("http://[::1]:80", Endpoint("::1", 80)),
    ],
)
def test_urls(url: str, expected: Endpoint) -> None:
    assert Endpoint.from_url(url) == expected


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://h", "http://"])
def test_a_url_without_scheme_or_host_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=url):
        Endpoint.from_url(url)


def test_the_request_names_host_and_key() -> None:
    endpoint = Endpoint("::1", 80, prefix="/p", api_key="secret")
    head, _, body = endpoint.request_bytes("POST", "/v1/completions", b"{}").partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /p/v1/completions HTTP/1.1"
    assert {b"host: [::1]:80", b"authorization: Bearer secret", b"content-length: 2"} <= set(lines)
    assert body == b"{}"


def test_get_json_reads_or_refuses() -> None:
    async def get(packets: list[bytes]) -> object:
        async with scripted(packets) as url:
            return await get_json(Endpoint.from_url(url), "/version")

    assert asyncio.run(get([b"HTTP/1.1 200 OK\r\n\r\n", b'{"a"', b": 1}"])) == {"a": 1}
    with pytest.raises(OSError, match="GET /version answered 404"):
        asyncio.run(get([b"HTTP/1.1 404 No\r\ncontent-length: 2\r\n\r\nno"]))
    with pytest.raises(OSError, match="GET /version"):
        asyncio.run(get([b'HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{"a"']))
