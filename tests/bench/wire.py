"""HTTP/1.1 responses and server-sent events, decoded from bytes as they come. Knows nothing of sockets or JSON.

Small on purpose: a general client costs about a millisecond of CPU per chunk, which on a shared machine is taken
from the server it measures.
"""

from enum import Enum, auto


class WireError(ValueError):
    """The bytes are not HTTP."""


class _Expect(Enum):
    HEAD = auto()
    CHUNK_SIZE = auto()
    CHUNK = auto()
    CHUNK_END = auto()
    TRAILER = auto()
    SIZED_BODY = auto()
    CLOSE = auto()
    NOTHING = auto()


class ResponseDecoder:
    """One response. Feed it packets of any size; it returns the body bytes they complete."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self._expect = _Expect.HEAD
        self._buffer = bytearray()
        self._left_bytes = 0

    @property
    def complete(self) -> bool:
        return self._expect is _Expect.NOTHING

    def feed_eof(self) -> None:
        """The server closed. A body without a stated end is complete now; any other is not."""
        if self._expect is _Expect.CLOSE:
            self._expect = _Expect.NOTHING

    def feed(self, data: bytes) -> bytes:
        """Raises WireError on malformed input."""
        self._buffer += data
        body = bytearray()
        while self._advance(body):
            pass
        return bytes(body)

    def _advance(self, body: bytearray) -> bool:
        """Takes one element off the buffer; False when it needs more bytes or nothing more is expected."""
        match self._expect:
            case _Expect.HEAD:
                head = self._take_until(b"\r\n\r\n")
                if head is None:
                    return False
                self._read_head(head)
            case _Expect.CHUNK_SIZE:
                line = self._take_until(b"\r\n")
                if line is None:
                    return False
                try:
                    self._left_bytes = int(line.partition(b";")[0], 16)
                except ValueError:
                    raise WireError(f"chunk size {line[:40]!r} is not hexadecimal") from None
                self._expect = _Expect.CHUNK if self._left_bytes else _Expect.TRAILER
            case _Expect.CHUNK:
                if not self._take_body(body):
                    return False
                if not self._left_bytes:
                    self._expect = _Expect.CHUNK_END
            case _Expect.CHUNK_END:
                line = self._take_until(b"\r\n")
                if line is None:
                    return False
                if line:
                    raise WireError(f"a chunk is followed by {line[:40]!r}")
                self._expect = _Expect.CHUNK_SIZE
            case _Expect.TRAILER:
                line = self._take_until(b"\r\n")
                if line is None:
                    return False
                if not line:
                    self._expect = _Expect.NOTHING
            case _Expect.SIZED_BODY:
                if self._left_bytes and not self._take_body(body):
                    return False
                if not self._left_bytes:
                    self._expect = _Expect.NOTHING
            case _Expect.CLOSE:
                body += self._buffer
                self._buffer.clear()
                return False
            case _Expect.NOTHING:
                return False
        return True

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        code = rest.partition(" ")[0]
        if not version.startswith("HTTP/1.") or not code.isdecimal():
            raise WireError(f"status line {first[:60]!r} is not HTTP/1")
        if code.startswith("1"):
            return  # an interim response: the real one follows
        self.status = int(code)
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._expect = _Expect.CHUNK_SIZE
        elif "content-length" in self.headers:
            length = self.headers["content-length"]
            if not length.isdecimal():
                raise WireError(f"content-length {length[:40]!r} is not a number")
            self._left_bytes = int(length)
            self._expect = _Expect.SIZED_BODY
        else:
            self._expect = _Expect.CLOSE

    def _take_until(self, mark: bytes) -> bytes | None:
        at = self._buffer.find(mark)
        if at < 0:
            return None
        taken = bytes(self._buffer[:at])
        del self._buffer[: at + len(mark)]
        return taken

    def _take_body(self, body: bytearray) -> bool:
        part = self._buffer[: self._left_bytes]
        body += part
        del self._buffer[: len(part)]
        self._left_bytes -= len(part)
        return bool(part)


class EventDecoder:
    """Server-sent events, as their `data`. Lines end in LF or CRLF; comments and other fields are skipped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + body).split(b"\n")
        events = []
        for line in lines:
            bare = line.removesuffix(b"\r")
            if bare.startswith(b"data:"):
                self._data.append(bare[5:].removeprefix(b" "))
            elif not bare and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events
