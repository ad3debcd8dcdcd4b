"""The gate before a small application on a real HTTP server: limits, ends, errors, draining, log.

No vLLM here; what the gate does before vLLM is looked at in test_operations.py.
"""

import asyncio
import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

fastapi = pytest.importorskip("fastapi", reason="fastapi (of the serve extras) is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn (of the serve extras) is not installed")
from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import JSONResponse, Response, StreamingResponse  # noqa: E402

from unimodal.serving import metrics  # noqa: E402
from unimodal.serving.gate import Admission, Gate  # noqa: E402
from unimodal.serving.limits import Limits  # noqa: E402

LARGE = b"x" * 10_000_000
LIMITS = Limits(max_body_mib=0.25, request_timeout=1.5, reader_timeout=1.0)


class Site:
    """The application behind the gate, on a port of its own."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.running = 0
        self.release = threading.Event()
        self.app = FastAPI()
        self.app.add_middleware(Gate)
        self.app.state.unimodal_admission = self.admission = Admission(4)
        self._routes()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = uvicorn.Config(self.app, "127.0.0.1", self.port, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def _routes(self) -> None:
        @self.app.post("/v1/echo")
        async def echo(body: dict[str, Any]) -> Any:
            return {"fields": len(body)}

        @self.app.post("/v1/wrong")
        async def wrong(body: dict[str, Any]) -> Any:
            return JSONResponse(body["answer"], body["status"])

        @self.app.post("/v1/hold")
        async def hold(request: Request) -> Any:
            with self.counted():
                while not self.release.is_set() and not await request.is_disconnected():
                    await asyncio.sleep(0.02)
            return {}

        @self.app.post("/v1/endless")
        async def endless() -> Any:
            async def pieces() -> AsyncIterator[str]:
                with self.counted():
                    while True:
                        yield "data: " + "x" * 20_000 + "\n\n"
                        await asyncio.sleep(0.001)

            return StreamingResponse(pieces(), media_type="text/event-stream")

        @self.app.post("/v1/whole")
        async def whole() -> Any:
            return Response(LARGE)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def post(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        data = (
            body if isinstance(body, bytes) or hasattr(body, "__next__") else json.dumps(body or {})
        )
        data = data.encode() if isinstance(data, str) else data
        kind = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, kind)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                text, status, got = answer.read().decode(), answer.status, answer.headers
        except urllib.error.HTTPError as error:
            text, status, got = error.read().decode(), error.code, error.headers
        with contextlib.suppress(ValueError):
            return status, json.loads(text), dict(got)
        return status, text, dict(got)

    def open(self, path: str) -> socket.socket:
        """Send a request and read nothing."""
        it = socket.socket()
        it.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        it.connect(("127.0.0.1", self.port))
        it.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        return it

    def wait(self, running: int, seconds: float = 5) -> bool:
        limit = time.monotonic() + seconds
        while self.running != running and time.monotonic() < limit:
            time.sleep(0.02)
        return self.running == running

    def lines(self) -> list[dict[str, Any]]:
        text = self.log.read_text() if self.log.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def line(self, request_id: str) -> dict[str, Any]:
        for _ in range(100):
            if found := [line for line in self.lines() if line["id"] == request_id]:
                return found[0]
            time.sleep(0.05)
        raise AssertionError(f"no log line of {request_id}")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name, value in LIMITS.to_environ().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("UNIMODAL_REQUEST_LOG", str(tmp_path / "requests.jsonl"))
    it = Site(tmp_path / "requests.jsonl")
    yield it
    it.release.set()
    it.server.should_exit = it.server.force_exit = True
    it.thread.join(10)


def is_error(answer: Any, status: int, text: str) -> bool:
    error = answer["error"]
    right = {"message", "type", "param", "code"} == set(error) and error["code"] == status
    return right and text in error["message"]


def pieces(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b"x" * 50_000


def test_long_bodies_are_refused_before_and_while_they_are_read(site: Site) -> None:
    assert site.post("/v1/echo", {"a": 1})[:2] == (200, {"fields": 1})
    for body in (b'"' + b"x" * 1_000_000 + b'"', pieces(40)):
        status, answer, _ = site.post("/v1/echo", body)
        assert status == 413
        assert is_error(answer, 413, "expected at most 262144") and "--max-body-mib" in str(answer)
    assert site.post("/v1/echo", {"a": 1})[0] == 200


def test_above_the_bound_requests_are_told_when_to_come_again(site: Site) -> None:
    held = [site.open("/v1/hold") for _ in range(4)]
    assert site.wait(4)
    status, answer, headers = site.post("/v1/echo")
    assert status == 429 and is_error(answer, 429, "--max-queue")
    assert 1 <= int(headers["retry-after"]) <= 60
    assert site.post("/elsewhere")[0] == 404  # only work has to queue
    for it in held:
        it.close()
    assert site.wait(0, 2)
    assert site.post("/v1/echo")[0] == 200


def test_a_request_that_takes_too_long_is_ended(site: Site) -> None:
    status, answer, headers = site.post("/v1/hold")
    assert status == 504 and is_error(answer, 504, "--request-timeout")
    assert site.wait(0, 1)
    assert site.line(headers["x-request-id"])["ended"] == metrics.TIMED_OUT
    status, text, _ = site.post("/v1/endless")
    assert status == 200
    *_, error, done, _ = text.split("\n\n")
    assert done == "data: [DONE]"
    assert is_error(json.loads(error.removeprefix("data: ")), 504, "--request-timeout")
    assert site.wait(0, 1)


@pytest.mark.parametrize("path", ["/v1/endless", "/v1/whole"])
def test_a_client_that_does_not_read_is_given_up_and_blocks_nobody(site: Site, path: str) -> None:
    before = metrics.ABANDONED.labels(metrics.SLOW_READER)._value.get()
    lazy = [site.open(path) for _ in range(3)]
    began = time.monotonic()
    assert site.post("/v1/echo")[0] == 200
    assert time.monotonic() - began < 0.9
    time.sleep(2.2)  # reader_timeout, and the others' turn
    assert site.running == 0
    assert metrics.ABANDONED.labels(metrics.SLOW_READER)._value.get() == before + 3
    assert {line["ended"] for line in site.lines() if line["route"] == path} == {"slow_reader"}
    for it in lazy:
        it.close()


def test_a_client_that_leaves_is_noticed(site: Site) -> None:
    it = site.open("/v1/hold")
    assert site.wait(1)
    it.close()
    assert site.wait(0, 1)
    time.sleep(0.1)
    [line] = site.lines()
    assert (line["ended"], line["status"], line["route"]) == ("client_left", 499, "/v1/hold")


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (401, {"error": "Unauthorized"}, "Authorization: Bearer"),
        (418, {"detail": "I am a teapot"}, "I am a teapot"),
        (503, {"error": "The model is scaling"}, "The model is scaling"),
        (500, ["odd"], "failed"),
    ],
)
def test_errors_of_other_layers_get_openais_shape(
    site: Site, status: int, said: Any, expected: str
) -> None:
    got, answer, headers = site.post("/v1/wrong", {"status": status, "answer": said})
    assert got == status and is_error(answer, status, expected)
    assert ("retry-after" in headers) == (status == 503)


def test_errors_in_openais_shape_stay_as_they_are(site: Site) -> None:
    said = {"error": {"message": "no", "type": "X", "code": "x", "more": 1}}
    assert site.post("/v1/wrong", {"status": 400, "answer": said})[1] == said
    assert is_error(site.post("/v1/nothing")[1], 404, "/openapi.json")


def test_request_ids(site: Site) -> None:
    assert site.post("/v1/echo", **{"X-Request-Id": "mine-1"})[2]["x-request-id"] == "mine-1"
    for evil in ("x" * 200, "a b", ""):
        given = site.post("/v1/echo", **{"X-Request-Id": evil})[2]["x-request-id"]
        assert given != evil and len(given) == 32


def test_draining_lets_those_at_work_finish_and_nobody_in(site: Site) -> None:
    it = site.open("/v1/hold")
    assert site.wait(1)
    assert site.server.started
    loop_done: list[int] = []

    def drain() -> None:
        loop_done.append(asyncio.run(site.admission.drain(0.5)))

    thread = threading.Thread(target=drain)
    site.admission.draining = True
    status, answer, headers = site.post("/v1/echo")
    assert status == 503 and is_error(answer, 503, "shutting down")
    assert int(headers["retry-after"]) >= 1
    site.release.set()
    assert site.wait(0, 2)
    thread.start()
    thread.join(5)
    assert loop_done == [0]
    assert it.recv(100).startswith(b"HTTP/1.1 200")


def test_a_log_line_holds_no_text_and_no_key(site: Site) -> None:
    _, _, headers = site.post("/v1/echo", {"secret words": 1}, Authorization="Bearer sk-secret")
    line = site.line(headers["x-request-id"])
    assert set(line) == {
        "time",
        "id",
        "route",
        "status",
        "ended",
        "model",
        "stream",
        "prompt_tokens",
        "image_tokens",
        "images_in",
        "images_out",
        "restarts",
        "seconds",
    }
    assert set(line["seconds"]) == {"queue", "fetch", "encode", "engine", "decode", "total"}
    assert "secret" not in json.dumps(line)
    assert (line["route"], line["status"], line["ended"]) == ("/v1/echo", 200, None)
    _, _, headers = site.post("/v1/nothing-of-the-kind")
    assert site.line(headers["x-request-id"])["route"] == "other"
