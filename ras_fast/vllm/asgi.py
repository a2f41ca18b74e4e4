"""Requests to a server from inside its own middleware, and what its client is sent. Knows ASGI and JSON alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Outbox:
    """What a client is sent, as fast as it reads."""

    def __init__(self, send: Send):
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self.writer = asyncio.create_task(self._write(send))

    async def put(self, message: Message) -> None:
        self._messages.put_nowait(message)

    async def close(self) -> None:
        """Returns when all of it is sent."""
        self._messages.put_nowait(None)
        await self.writer

    async def _write(self, send: Send) -> None:
        while (message := await self._messages.get()) is not None:
            await send(message)


class Client:
    """Who sent a request, and the requests to the server inside that are made for them."""

    def __init__(self, app, scope: Message, receive):
        self.app, self.gone, self._calls = app, False, []
        self._scope = scope | {"headers": [(name, value) for name, value in scope["headers"] if name != b"content-length"]}
        self._watch = asyncio.create_task(self._until_gone(receive))

    def post(self, request: Message, send: Send, names_request: bool = True) -> Call:
        """Starts a request. names_request: whether it has the name that the client gave its own."""
        scope = dict(self._scope)
        if not names_request:
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        call = Call(self.app, scope, dumps(request), send)
        self._calls.append(call)
        if self.gone:
            call.gone.set()
        return call

    async def leave(self) -> None:
        """Ends what is still under way."""
        self._watch.cancel()
        await asyncio.gather(*(call.end() for call in self._calls))

    async def _until_gone(self, receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        for call in self._calls:
            call.gone.set()


class Call:
    """One request to the server inside. task: of its whole response."""

    def __init__(self, app, scope: Message, body: bytes, send: Send):
        self.gone = asyncio.Event()
        self._body: bytes | None = body
        self.task = asyncio.create_task(app(scope, self._receive, send))

    async def end(self) -> None:
        """As if the client had gone: vLLM then aborts its part. Returns when it has."""
        self.gone.set()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}


class Failed(Exception):
    """A stage has no outcome. messages: the response that says why."""

    def __init__(self, messages: list[Message]):
        super().__init__()
        self.messages = messages


class Gone(Exception):
    """The client waits no longer."""


async def read_body(receive) -> bytes:
    pieces, more = [], True
    while more:
        message = await receive()
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)


def into(messages: list[Message]) -> Send:
    """What keeps a response there."""

    async def take(message: Message) -> None:
        messages.append(message)

    return take


async def refuse(send: Send, status: int, reason: str) -> None:
    for message in refusal(status, reason):
        await send(message)


def refusal(status: int, reason: str) -> list[Message]:
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    body = dumps({"error": {"message": reason, "type": kind, "param": None, "code": status}})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body, "more_body": False},
    ]


async def send_with(send: Send, told: dict[str, str], message: Message) -> None:
    """``send``, with headers of ours at the start."""
    if message["type"] == "http.response.start":
        told_headers = [(f"x-ras-{name}".encode(), value.encode()) for name, value in told.items()]
        message = message | {"headers": [*message.get("headers", ()), *told_headers]}
    await send(message)


def dumps(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
