"""The outermost layer of the HTTP server: who may come in, for how long, how refusals look.

``unimodal serve`` adds :class:`Gate` with vLLM's ``--middleware``, so it stands before everything,
vLLM's API-key check included, and sees every route:

- bodies above the limit are refused before they are read (413), or as soon as they are too long;
- above ``--max-queue`` waiting requests, 429; while the server drains, 503; both with Retry-After;
- a request that takes too long, or whose client does not read, is ended as if the client had left,
  which is what vLLM's handlers and ours clean up after;
- errors of any layer get OpenAI's shape;
- each request gets an id (``X-Request-Id``, the client's own where it sent one), counters and a log
  line.
"""

import asyncio
import contextlib
import json
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException

from unimodal.serving.limits import Limits, flag
from unimodal.serving.metrics import (
    CLIENT_LEFT,
    QUEUE,
    SHUT_DOWN,
    SLOW_READER,
    TIMED_OUT,
    RequestRecord,
    finish,
    log_requests_to,
    recording,
)
from unimodal.serving.openai_shapes import error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

WORK = ("/v1/", "/v2/", "/inference/", "/invocations", "/cohere/")
"""Paths whose POST requests count as work: they wait in the queue and get a log line."""

PIECE_BYTES = 64 * 1024
"""Bodies are sent in pieces of this size, so that the connection's flow control sees them."""

DISCARD_SECONDS = 5
"""For the rest of a body that is refused."""

LEFT_STATUS = 499
"""In the log and the counters, for an answer that nobody waited for."""

_DISCONNECT: Message = {"type": "http.disconnect"}
_REQUEST_ID = re.compile(r"[!-~]{1,128}")

_KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}


class Admission:
    """The requests that are at work in this process, and whether another one may come in.

    Args:
        room: most requests at once, running and waiting.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.draining = False
        self._exchanges: set[Exchange] = set()
        self._changed = asyncio.Event()
        self._mean_seconds = 1.0

    @property
    def retry_after(self) -> int:
        """Seconds after which a refused client had better come again: what a request takes."""
        return min(60, max(1, math.ceil(self._mean_seconds)))

    def refusal(self) -> tuple[int, str] | None:
        """Return the status and message that a new request is refused with, or None."""
        if self.draining:
            return 503, "the server is shutting down, expected one that stays: ask another one"
        if len(self._exchanges) >= self.room:
            return 429, (
                f"{len(self._exchanges)} requests are running or waiting, expected fewer than "
                f"{self.room}: try again in {self.retry_after} s, or start the server with a "
                f"larger {flag('max_queue')}"
            )
        return None

    def enter(self, exchange: "Exchange") -> None:
        """Count a request in."""
        self._exchanges.add(exchange)
        QUEUE.inc()

    def leave(self, exchange: "Exchange", seconds: float) -> None:
        """Count a request out."""
        self._exchanges.discard(exchange)
        QUEUE.dec()
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
        self._changed.set()

    async def drain(self, seconds: float) -> int:
        """Let nobody in any more, wait for those at work, and end those that take too long.

        Returns:
            How many had to be ended.
        """
        self.draining = True
        await self._until_empty(seconds)
        late = list(self._exchanges)
        for exchange in late:
            exchange.end(SHUT_DOWN)
        await self._until_empty(1)
        return len(late)

    async def _until_empty(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._exchanges:
                    self._changed.clear()
                    await self._changed.wait()


class Gate:
    """ASGI middleware, see the module's docstring."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.limits = Limits.from_environ()
        log_requests_to(self.limits.request_log)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        admission: Admission | None = getattr(scope["app"].state, "unimodal_admission", None)
        exchange = Exchange(scope, receive, send, self.limits, admission)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] != "POST" or not path.startswith(WORK):
            await exchange.run(self.app)
            return
        refusal = exchange.too_long() or (admission.refusal() if admission else None)
        try:
            if refusal:
                await exchange.discard_body()
                await exchange.refuse(*refusal)
                return
            if admission:
                admission.enter(exchange)
            try:
                with recording(exchange.record):
                    await exchange.run(self.app)
            finally:
                if admission:
                    admission.leave(exchange, exchange.seconds)
        finally:
            exchange.finish()


class Exchange:
    """One HTTP request and its answer, on their way through the gate."""

    def __init__(
        self,
        scope: Message,
        receive: Receive,
        send: Send,
        limits: Limits,
        admission: Admission | None,
    ) -> None:
        self.scope = scope
        self.limits = limits
        self.admission = admission
        self.record = RequestRecord(self._take_id(), scope["path"])
        self.ended: str | None = None
        """Why the request was ended before its time."""
        self._receive = receive
        self._send = send
        self._gone = asyncio.Event()
        self._receiving: asyncio.Future[Message] | None = None
        self._taken = 0
        self._status: int | None = None
        self._is_stream = False
        self._complete = False
        self._held: Message | None = None
        self._held_body = bytearray()

    # --- its life ---------------------------------------------------------------------------------

    async def run(self, app: App) -> None:
        """Let the application answer, within the time limit."""
        loop = asyncio.get_running_loop()
        limit = self.limits.request_timeout
        timer = loop.call_later(limit, self.end, TIMED_OUT) if limit else None
        try:
            await app(self.scope, self.receive, self.send)
        except Exception:
            self._status = self._status or 500
            raise
        finally:
            if timer:
                timer.cancel()
            if self._receiving:
                self._receiving.cancel()
        await self._say_why_it_ended()

    def end(self, cause: str) -> None:
        """End the request: the application is told that its client has left."""
        if self.ended is None and not self._complete:
            self.ended = cause
            self._gone.set()

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self.record.began

    def finish(self) -> None:
        """Count the request and write its log line."""
        route = getattr(self.scope.get("route"), "path", None)
        self.record.route = route or "other"  # a path that no route has may be anything
        self.record.stream = self._is_stream
        left = self.ended in (CLIENT_LEFT, SLOW_READER)
        finish(self.record, LEFT_STATUS if left else self._status or LEFT_STATUS, self.ended)

    async def refuse(self, status: int, message: str) -> None:
        """Answer with an error of our own."""
        body = json.dumps(error_body(message, status, _KINDS[status])).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await self._start({"type": "http.response.start", "status": status, "headers": headers})
        await self._pass_on({"type": "http.response.body", "body": body})

    async def _say_why_it_ended(self) -> None:
        if self.ended not in (TIMED_OUT, SHUT_DOWN):
            return
        status, message = 504, self._too_slow()
        if self.ended == SHUT_DOWN:
            status, message = 503, "the server shut down before the answer was done: ask again"
        if self._status is None:
            await self.refuse(status, message)
        elif self._is_stream:
            error = json.dumps(error_body(message, status, _KINDS[status]))
            body = f"data: {error}\n\ndata: [DONE]\n\n".encode()
            await self._pass_on({"type": "http.response.body", "body": body})

    def _too_slow(self) -> str:
        return (
            f"the request took more than {self.limits.request_timeout:g} s: ask for less, or "
            f"start the server with a larger {flag('request_timeout')}"
        )

    # --- what comes in ----------------------------------------------------------------------------

    def too_long(self) -> tuple[int, str] | None:
        """Return the refusal of a body that says itself that it is too long, or None."""
        length = self._header(b"content-length")
        if length.isdigit() and int(length) > self.limits.max_body_bytes:
            return 413, self._too_long(int(length))
        return None

    async def receive(self) -> Message:
        """The application's ``receive``: counts the body, and ends with the request."""
        message = await self._next()
        if message["type"] == "http.request":
            self._taken += len(message.get("body", b""))
            if self._taken > self.limits.max_body_bytes:
                if message.get("more_body", False):
                    await self.discard_body()
                raise HTTPException(413, self._too_long(self._taken))
        elif message["type"] == "http.disconnect":
            self.end(CLIENT_LEFT)
        return message

    async def discard_body(self) -> None:
        """Read on without keeping anything, for a while: a client that still writes would not see
        the refusal, but a broken connection."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                more = True
                while more:
                    more = (await self._receive()).get("more_body", False)

    async def _next(self) -> Message:
        if self._gone.is_set():
            return _DISCONNECT
        # One task waits for the next message, whoever asks and stops asking: a caller that is
        # cancelled at once (Starlette's is_disconnected) finds it done the next time.
        if self._receiving is None:
            self._receiving = asyncio.ensure_future(self._receive())
        if not self._receiving.done():
            gone = asyncio.ensure_future(self._gone.wait())
            try:
                await asyncio.wait((self._receiving, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
        if not self._receiving.done():
            return _DISCONNECT
        received, self._receiving = self._receiving, None
        return received.result()

    def _too_long(self, length: int) -> str:
        return (
            f"the body has {length} bytes or more, expected at most {self.limits.max_body_bytes}: "
            f"send smaller or fewer images, or start the server with a larger "
            f"{flag('max_body_mib')}"
        )

    def _header(self, name: bytes) -> str:
        values = (value for key, value in self.scope["headers"] if key == name)
        return next(values, b"").decode("latin-1")

    def _take_id(self) -> str:
        """Return the client's request id, or a fresh one, which vLLM then takes too."""
        given = self._header(b"x-request-id")
        if _REQUEST_ID.fullmatch(given):
            return given
        fresh = uuid.uuid4().hex
        others = [item for item in self.scope["headers"] if item[0] != b"x-request-id"]
        self.scope["headers"] = [*others, (b"x-request-id", fresh.encode())]
        return fresh

    # --- what goes out ----------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """The application's ``send``: shapes errors, and gives up a client that does not read."""
        if self.ended:
            return
        if message["type"] == "http.response.start":
            if message["status"] >= 400 and _is_json(message):
                self._held = message
            else:
                await self._start(message)
        elif message["type"] == "http.response.body" and self._held is not None:
            self._held_body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_held()
        else:
            await self._pass_on(message)

    async def _start(self, message: Message) -> None:
        headers = list(message.get("headers", ()))
        names = {key.lower() for key, _ in headers}
        if b"x-request-id" not in names:
            headers.append((b"x-request-id", self.record.id.encode()))
        if message["status"] in (429, 503) and b"retry-after" not in names and self.admission:
            headers.append((b"retry-after", str(self.admission.retry_after).encode()))
        kind = next((value for key, value in headers if key.lower() == b"content-type"), b"")
        self._is_stream = kind.startswith(b"text/event-stream")
        self._status = message["status"]
        await self._pass_on({**message, "headers": headers})

    async def _send_held(self) -> None:
        assert self._held is not None
        start, self._held = self._held, None
        body = self._shaped(start["status"], bytes(self._held_body))
        headers = [item for item in start["headers"] if item[0].lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._start({**start, "headers": headers})
        await self._pass_on({"type": "http.response.body", "body": body})

    def _shaped(self, status: int, body: bytes) -> bytes:
        """Return an error in OpenAI's shape: as it is, or made from what another layer said."""
        try:
            value = json.loads(body)
        except ValueError:
            value = None
        error = value.get("error") if isinstance(value, dict) else None
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return body
        said = error or (value.get("detail") if isinstance(value, dict) else None)
        path = self.scope["path"]
        hints = {
            401: "no valid API key came, expected the header `Authorization: Bearer KEY`",
            404: f"there is no {path}, expected a route of this server: see GET /openapi.json",
            405: f"{path} does not take {self.scope['method']}: see GET /openapi.json",
        }
        message = hints.get(status) or (said if isinstance(said, str) else "the request failed")
        kind = _KINDS.get(status, "APIError")
        return json.dumps(error_body(message, status, kind)).encode()

    async def _pass_on(self, message: Message) -> None:
        body = message.get("body", b"")
        more = message.get("more_body", False)
        while len(body) > PIECE_BYTES and not self.ended:
            await self._write({**message, "body": body[:PIECE_BYTES], "more_body": True})
            body = body[PIECE_BYTES:]
        if message["type"] == "http.response.body":
            message = {**message, "body": body}
            self._complete = not more
        await self._write(message)

    async def _write(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self.limits.reader_timeout or None):
                await self._send(message)
        except TimeoutError:
            self._complete = False
            self.end(SLOW_READER)


def _is_json(message: Message) -> bool:
    headers = message.get("headers", ())
    return any(
        k.lower() == b"content-type" and v.startswith(b"application/json") for k, v in headers
    )
