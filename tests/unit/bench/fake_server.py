"""A server of the same wire format as a real one, in a thread, that says what the test wants."""

import asyncio
import json
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

OK_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def chunk(body: bytes) -> bytes:
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


def token_event(text: str = " hi", finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], "usage": None})


def usage_event(completion_tokens: int, prompt_tokens: int = 5, cached_tokens: int = 0) -> bytes:
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    return event({"choices": [], "usage": usage})


DONE = b"data: [DONE]\n\n"


def stream_body(tokens: int) -> bytes:
    last = token_event(finish_reason="length")
    return token_event() * (tokens - 1) + last + usage_event(tokens) + DONE


async def read_request(reader: StreamReader) -> tuple[str, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return first, headers, await reader.readexactly(int(headers.get("content-length", 0)))


@asynccontextmanager
async def listening(answer: Callable[[StreamReader, StreamWriter], Awaitable[None]]) -> AsyncIterator[str]:
    """Serves at the URL it yields; at the end waits for the answers under way, so that no socket is left open."""
    answers: set[asyncio.Task[None]] = set()

    async def answer_and_close(reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        answers.add(task)
        with suppress(OSError):  # a client that gave up, or streams that never were enough
            try:
                await answer(reader, writer)
            finally:
                writer.close()
                await writer.wait_closed()

    server = await asyncio.start_server(answer_and_close, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await asyncio.gather(*answers)


@asynccontextmanager
async def scripted(packets: Sequence[bytes], hang: bool = False) -> AsyncIterator[str]:
    """Answers every request with these packets, apart in time, then closes, or hangs until the test ends."""
    release = asyncio.Event()

    async def answer(reader: StreamReader, writer: StreamWriter) -> None:
        await read_request(reader)
        for packet in packets:
            writer.write(packet)
            await writer.drain()
            await asyncio.sleep(0.002)
        if hang:
            await release.wait()

    async with listening(answer) as url:
        yield url
        release.set()


@dataclass
class FakeModels:
    """Serves /version, /v1/models and /v1/completions; a model named `refusing` answers 500.

    Streams stay silent until `hold_until` of them have been under way at once, and break off if that never happens.
    """

    adapters: int = 0
    token_delay_s: float = 0.0
    hold_until: int = 1
    url: str = ""
    bodies: list[dict[str, object]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    async def answer(self, reader: StreamReader, writer: StreamWriter) -> None:
        first, headers, body = await read_request(reader)
        self.authorizations.append(headers.get("authorization"))
        match first.split()[1]:
            case "/version":
                self._send_json(writer, {"version": "fake-1"})
            case "/v1/models":
                adapters = [{"id": f"a{i:02d}", "parent": "base"} for i in range(self.adapters)]
                self._send_json(writer, {"object": "list", "data": [{"id": "base", "parent": None}, *adapters]})
            case "/v1/completions":
                await self._complete(writer, json.loads(body))
        await writer.drain()

    def _send_json(self, writer: StreamWriter, document: object) -> None:
        body = json.dumps(document).encode()
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)

    async def _complete(self, writer: StreamWriter, request: dict[str, object]) -> None:
        self.bodies.append(request)
        if request["model"] == "refusing":
            writer.write(b'HTTP/1.1 500 Oh\r\ncontent-length: 26\r\n\r\n{"error":{"message":"no"}}')
            return
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        async with asyncio.timeout(5):
            while self.most_in_flight < self.hold_until:
                await asyncio.sleep(0.001)
        tokens, prompt = request["max_tokens"], request["prompt"]
        assert isinstance(tokens, int)
        assert isinstance(prompt, list | str)
        writer.write(OK_HEAD)
        for _ in range(tokens):
            await asyncio.sleep(self.token_delay_s)
            writer.write(chunk(token_event()))
            await writer.drain()
        length = len(prompt) if isinstance(prompt, list) else len(prompt.split())
        writer.write(chunk(usage_event(tokens, length)) + chunk(DONE) + LAST_CHUNK)
        self.in_flight -= 1


@contextmanager
def in_thread(fake: FakeModels) -> Iterator[FakeModels]:
    """Serves in a thread of its own, for a program under test that owns its event loop."""
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with listening(fake.answer) as fake.url:
            started.set()
            await stop.wait()

    def own_loop() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=own_loop)
    thread.start()
    assert started.wait(5)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(5)
