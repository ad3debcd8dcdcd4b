"""Mixed traffic against a server for a long time: does it stay right, does it stay small?

Captions, questions, drawings, guided drawings, streams, requests that are wrong and requests whose
client leaves, at a steady concurrency. What comes back is looked at: every picture is opened, every
error must be the one that was provoked. Beside it the resident memory of the server's processes is
written down. Used by ``unimodal bench soak`` and, shorter, by the tests.
"""

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from PIL import Image

from tokenizer_hf.errors import ServingError
from tokenizer_hf.files import atomic_write
from unimodal.serving.check import Server, running_server
from unimodal.serving.openai_shapes import data_uri

SAMPLE_SECONDS = 0.5
STILL_SECONDS = 2.0
"""In which nothing may run any more once the last answer is there."""
FLAT = 0.05
"""Most that the memory may grow over the run."""

MIX = {
    "caption": 3,
    "question": 2,
    "drawing": 3,
    "guided drawing": 3,
    "streamed drawing": 2,
    "malformed": 2,
    "abandoned": 2,
}
"""How often each kind of request comes."""

_WORDS = (
    ("a", "one", "two", "three"),
    ("red", "green", "blue", "yellow"),
    ("circle", "square", "star", "heart"),
)


class Wrong(Exception):
    """An answer that is not what was asked for."""


async def soak(
    server: Server, num_requests: int, concurrency: int, minutes: float = 0, seed: int = 0
) -> dict[str, Any]:
    """Drive a running server.

    Args:
        server: that was started for this; nobody else asks it meanwhile.
        num_requests: how many, at least.
        concurrency: requests at once.
        minutes: go on that long, if the requests are done before.
        seed: of the traffic.

    Returns:
        ``{"requests": n, "kinds": {...}, "errors": [...], "malformed_images": n, "pairs": n,
        "restarts": n, "memory": {...}, "running_at_end": n, "still_after_seconds": s, ...}``.
    """
    import aiohttp

    traffic = _Traffic(server.url, seed)
    memory = _Memory(server.pid)
    before = _counters(server)
    began = time.monotonic()
    until = began + 60 * minutes
    numbers = _numbers(num_requests, until)
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        watching = asyncio.create_task(memory.watch(traffic))
        workers = (traffic.work(session, numbers) for _ in range(concurrency))
        await asyncio.gather(*workers)
        seconds = time.monotonic() - began
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    still_after, running = await _until_still(server)
    after = _counters(server)
    pairs, restarts = (
        after[name] - before[name] for name in ("unimodal:pairs", "unimodal:pair_restarts")
    )
    return {
        "requests": traffic.finished,
        "seconds": round(seconds, 1),
        "concurrency": concurrency,
        "kinds": dict(traffic.kinds),
        "errors": traffic.errors[:20],
        "num_errors": len(traffic.errors),
        "malformed_images": traffic.malformed_images,
        "images": traffic.images,
        "pairs": int(pairs),
        "restarts": int(restarts),
        "memory": memory.summary(),
        "running_at_end": running,
        "still_after_seconds": still_after,
    }


def run_soak(
    model: str | Path,
    num_requests: int,
    concurrency: int,
    minutes: float = 0,
    *,
    seed: int = 0,
    vllm_args: tuple[str, ...] = (),
    out: str | Path | None = None,
    log: str | Path | None = None,
) -> dict[str, Any]:
    """Start a server, :func:`soak` it, stop it, and write the result down.

    Raises:
        ServingError: the server did not start.
    """
    with running_server(model, ["--request-log", "off", *vllm_args], log) as server:
        result = asyncio.run(soak(server, num_requests, concurrency, minutes, seed))
    result["summary"] = summary(result)
    if out is not None:
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def summary(result: dict[str, Any]) -> str:
    """Return a soak's result in one line, with what is wrong about it."""
    memory = result["memory"]
    share = result["restarts"] / max(1, result["pairs"])
    problems = [
        text
        for text, wrong in (
            (f"{result['num_errors']} errors", result["num_errors"]),
            (f"{result['malformed_images']} malformed images", result["malformed_images"]),
            (f"{result['running_at_end']:g} requests still run", result["running_at_end"]),
            (f"memory grew by {memory['growth']:.1%}", memory["growth"] > FLAT),
            (f"{share:.1%} of the pairs restarted", share > 0.05),
        )
        if wrong
    ]
    return (
        f"{'; '.join(problems) if problems else 'ok'}: {result['requests']} requests in "
        f"{result['seconds']:g} s at {result['concurrency']}, {result['images']} images, "
        f"{result['restarts']} restarts of {result['pairs']} pairs, memory "
        f"{memory['first_mib']:.0f} -> {memory['last_mib']:.0f} MiB ({memory['growth']:+.1%}), "
        f"nothing runs {result['still_after_seconds']:g} s after the last answer"
    )


# --- traffic --------------------------------------------------------------------------------------


class _Traffic:
    """Sends requests of all kinds and looks at what comes back."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.random = random.Random(seed)
        self.finished = 0
        self.images = 0
        self.malformed_images = 0
        self.kinds: Counter[str] = Counter()
        self.errors: list[str] = []
        self._ways: dict[str, Callable[[Any], Awaitable[None]]] = {
            "caption": self._caption,
            "question": self._question,
            "drawing": self._drawing,
            "guided drawing": self._guided,
            "streamed drawing": self._streamed,
            "malformed": self._malformed,
            "abandoned": self._abandoned,
        }

    async def work(self, session: Any, numbers: Iterator[int]) -> None:
        """Send one request after the other while there are numbers."""
        for number in numbers:
            [kind] = self.random.choices(list(MIX), list(MIX.values()))
            try:
                await self._ways[kind](session)
            except Exception as error:
                self.errors.append(f"{kind} {number}: {type(error).__name__}: {error}"[:300])
            self.kinds[kind] += 1
            self.finished += 1

    def _prompt(self) -> str:
        return " ".join(self.random.choice(words) for words in _WORDS)

    def _picture(self) -> str:
        size = self.random.randint(8, 96), self.random.randint(8, 96)
        colour = self.random.choices(range(256), k=3)
        return data_uri(Image.new("RGB", size, (colour[0], colour[1], colour[2])))

    def _seen(self, question: str) -> dict[str, Any]:
        part = {"type": "image_url", "image_url": {"url": self._picture()}}
        content = [part, {"type": "text", "text": question}]
        return {
            "messages": [{"role": "user", "content": content}],
            "modalities": ["text"],
            "max_tokens": self.random.randint(4, 24),
        }

    async def _post(self, session: Any, path: str, body: dict[str, Any]) -> Any:
        async with session.post(self.url + path, json=body) as answer:
            value = await answer.json()
            if answer.status != 200:
                raise Wrong(f"{answer.status}: {json.dumps(value)[:200]}")
            return value

    async def _caption(self, session: Any) -> None:
        answer = await self._post(session, "/v1/chat/completions", self._seen("What is it?"))
        if not isinstance(answer["choices"][0]["message"]["content"], str):
            raise Wrong("a caption without a text")

    async def _question(self, session: Any) -> None:
        body = self._seen(f"Where is {self._prompt()}?")
        body["messages"] += [
            {"role": "assistant", "content": "above"},
            {"role": "user", "content": f"And {self._prompt()}?"},
        ]
        answer = await self._post(session, "/v1/chat/completions", body)
        if answer["usage"]["completion_tokens"] < 1:
            raise Wrong("an answer of no tokens")

    async def _drawing(self, session: Any, guidance: float = 1.0) -> None:
        body = {"prompt": self._prompt(), "n": self.random.randint(1, 2)}
        body |= {"guidance_scale": guidance, "seed": self.random.randrange(2**31)}
        answer = await self._post(session, "/v1/images/generations", body)
        if len(answer["data"]) != body["n"]:
            raise Wrong(f"{len(answer['data'])} images, expected {body['n']}")
        for item in answer["data"]:
            self._open(item["b64_json"])

    async def _guided(self, session: Any) -> None:
        await self._drawing(session, 3.0)

    async def _streamed(self, session: Any) -> None:
        body = {
            "messages": [{"role": "user", "content": self._prompt()}],
            "modalities": ["image"],
            "image": {"guidance_scale": self.random.choice((1.0, 2.0)), "partial_images": 1},
            "max_tokens": 200,
            "stream": True,
        }
        images = 0
        async with session.post(self.url + "/v1/chat/completions", json=body) as answer:
            body_read = await answer.read()
        events = sent_events(body_read)
        if answer.status != 200 or events[-1:] != [b"[DONE]"]:
            raise Wrong(f"{answer.status}: {body_read[:200]!r}")
        for event in events[:-1]:
            chunk = json.loads(event)
            if "error" in chunk:
                raise Wrong(event[:200].decode(errors="replace"))
            for choice in chunk["choices"]:
                for part in choice["delta"].get("images") or []:
                    self._open(part["image_url"]["url"].partition(",")[2])
                    images += not part["partial"]
        if images < 1:
            raise Wrong("a stream without an image")

    async def _malformed(self, session: Any) -> None:
        broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
        remote = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
        path, body = self.random.choice(
            [
                ("chat/completions", {"messages": [{"role": "user", "content": [broken]}]}),
                ("chat/completions", {"messages": [{"role": "user", "content": [remote]}]}),
                ("chat/completions", {"messages": "hello"}),
                ("images/generations", {"prompt": "a ring", "size": "3x5"}),
                ("images/generations", {"prompt": "a ring", "misspelt": 1}),
            ]
        )
        async with session.post(f"{self.url}/v1/{path}", json=body) as answer:
            value = await answer.json()
        if answer.status != 400 or not value.get("error", {}).get("message"):
            raise Wrong(f"{answer.status}, expected 400: {json.dumps(value)[:200]}")

    async def _abandoned(self, session: Any) -> None:
        way = self.random.choice((self._guided, self._streamed, self._question))
        with suppress(TimeoutError):
            await asyncio.wait_for(way(session), self.random.uniform(0.01, 0.5))

    def _open(self, encoded: str) -> None:
        try:
            with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as image:
                image.load()
        except Exception:
            self.malformed_images += 1
        self.images += 1


def sent_events(body: bytes) -> list[bytes]:
    """Return the data of each server-sent event of one line.

    Bytes, because ``str.splitlines`` also breaks at characters such as U+0085 and U+2028, which a
    JSON string may hold as they are and a model writes now and then.
    """
    return [line[6:] for line in body.splitlines() if line.startswith(b"data: ")]


def _numbers(num_requests: int, until: float) -> Iterator[int]:
    """Count the requests, shared by all workers."""
    number = 0
    while number < num_requests or time.monotonic() < until:
        yield number
        number += 1


# --- the server's side ----------------------------------------------------------------------------


class _Memory:
    """Resident memory of a process and its descendants over time, MiB."""

    def __init__(self, pid: int) -> None:
        self.process = psutil.Process(pid)
        self.samples: list[tuple[int, dict[str, float]]] = []
        """Requests that were finished, and MiB by process."""

    async def watch(self, traffic: _Traffic) -> None:
        """Take samples until cancelled."""
        while True:
            self.samples.append((traffic.finished, await asyncio.to_thread(self._now)))
            await asyncio.sleep(SAMPLE_SECONDS)

    def _now(self) -> dict[str, float]:
        found = {}
        for process in (self.process, *self.process.children(recursive=True)):
            with suppress(psutil.Error):
                found[f"{process.pid} {process.name()}"] = process.memory_info().rss / 2**20
        return found

    def summary(self) -> dict[str, Any]:
        """Compare the last fifth of the samples with the second fifth: the first one warms up."""
        totals = [sum(sample.values()) for _, sample in self.samples]
        fifth = max(1, len(totals) // 5)
        first = median(totals[fifth : 2 * fifth] or totals)
        last = median(totals[-fifth:])
        return {
            "first_mib": round(first, 1),
            "last_mib": round(last, 1),
            "growth": round(last / first - 1, 4),
            "largest_mib": round(max(totals), 1),
            "by_process_mib": {
                name: round(value, 1) for name, value in self.samples[-1][1].items()
            },
            "over_time": [
                [number, round(total, 1)]
                for (number, _), total in list(zip(self.samples, totals, strict=True))[
                    :: max(1, len(totals) // 100)
                ]
            ],
        }


def _counters(server: Server) -> dict[str, float]:
    """Return the sums over labels of the metrics that a soak looks at."""
    names = ("unimodal:pairs", "unimodal:pair_restarts", "vllm:num_requests_running")
    found = dict.fromkeys(names, 0.0)
    for line in server.get("/metrics").splitlines():
        name, _, value = line.rpartition(" ")
        name = name.partition("{")[0].removesuffix("_total")
        if name in found:
            found[name] += float(value)
    return found


async def _until_still(server: Server) -> tuple[float, float]:
    """Return after how many seconds nothing ran any more, and how much did at the end."""
    began = time.monotonic()
    while True:
        running = (await asyncio.to_thread(_counters, server))["vllm:num_requests_running"]
        seconds = time.monotonic() - began
        if not running or seconds > STILL_SECONDS:
            return round(seconds, 2), running
        await asyncio.sleep(0.05)


def require_flat(result: dict[str, Any]) -> None:
    """Raise if a soak found anything wrong.

    Raises:
        ServingError: the one-line summary.
    """
    if not result["summary"].startswith("ok"):
        raise ServingError(result["summary"])
