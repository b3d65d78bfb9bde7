"""HTTP/1.1 on asyncio's streams, for clients that share a server's cores and must be cheap, or that leave half-way.

A request is bytes that were prepared before; nothing of an answer is checked but what frames it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Mapping

MOST_IDLE_S = 2.0  # uvicorn closes what was idle for five seconds, and a request may cross that on its way


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def request(method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes = b"") -> bytes:
    """What is sent for it."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclasses.dataclass
class Connection:
    """One connection; requests on it go one after the other."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: float = 0.0  # when its last answer had come

    @classmethod
    async def open(cls, url: str) -> Connection:
        host, port = url.removeprefix("http://").split(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer. Raises OSError or EOFError, as reply() does, where there is none."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        named = (line.partition(": ") for line in lines[1:-2])
        return int(lines[0].split()[1]), {name.lower(): value for name, _, value in named}

    async def reply(self) -> Reply:
        status, headers = await self.head()
        if headers.get("transfer-encoding") == "chunked":
            pieces = []
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                pieces.append((await self.reader.readexactly(size + 2))[:-2])
            await self.reader.readexactly(2)
            return Reply(status, headers, b"".join(pieces))
        return Reply(status, headers, await self.reader.readexactly(int(headers.get("content-length", 0))))

    @property
    def fresh(self) -> bool:
        """Whether another request may be sent on it."""
        return not self.reader.at_eof() and time.monotonic() - self.used < MOST_IDLE_S

    def leave(self) -> None:
        """At once, whatever is on its way."""
        self.writer.transport.abort()


class Pool:
    """Connections to one server, kept alive: as many as there are requests at once."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._idle: list[Connection] = []

    async def ask(self, data: bytes) -> Reply:
        """The answer to a request. Raises OSError or EOFError where none comes."""
        while self._idle and not self._idle[-1].fresh:
            self._idle.pop().leave()
        connection = self._idle.pop() if self._idle else await Connection.open(self.url)
        try:
            connection.writer.write(data)
            reply = await connection.reply()
        except BaseException:
            connection.leave()
            raise
        if reply.headers.get("connection") == "close":
            connection.leave()
        else:
            connection.used = time.monotonic()
            self._idle.append(connection)
        return reply

    def close(self) -> None:
        for connection in self._idle:
            connection.leave()


@contextlib.asynccontextmanager
async def pool(url: str) -> AsyncIterator[Pool]:
    """A pool that is closed at the end."""
    connections = Pool(url)
    try:
        yield connections
    finally:
        connections.close()
        await asyncio.sleep(0)  # for transports to close
