"""The load generator of ``unimodal bench serve``: a process that sends and times requests.

    python -m unimodal.serving.load PLAN.json RESULT.json

It imports neither torch nor vLLM, may be tied to some cores, and lowers its own priority, so that
it takes as little as it can from the server that it measures.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizer_hf.errors import ServingError

TIMEOUT_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One HTTP request of a plan."""

    url: str
    body: dict[str, Any]
    at: float | None = None
    """Seconds after the start at which it is sent; None: as soon as a place is free."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """What became of a request. Seconds count from the start of the plan."""

    sent: float
    done: float
    preview: float | None = None
    """When the first partial image came."""
    tokens: int = 0
    """Ids that the server wrote, by its own ``usage``."""
    images: int = 0
    """Whole pictures in the answer."""
    error: str | None = None

    @property
    def seconds(self) -> float:
        """From sending to the end of the answer."""
        return self.done - self.sent


def fire(
    shots: Sequence[Shot],
    concurrency: int | None = None,
    cores: Sequence[int] = (),
    niceness: int = 5,
) -> list[Hit]:
    """Send requests from another process and return what became of each, in order.

    Args:
        shots: what to send. With ``at``, each at its time (an open loop).
        concurrency: requests under way at a time where ``at`` is None (a closed loop).
        cores: the processor cores that the process may use; all if empty.
        niceness: of the process; above 0 it gives way to the server, and so may learn late of what
            came in the middle of an answer.

    Raises:
        ServingError: the process failed. A request that failed is a Hit with ``error``.
    """
    plan = {
        "concurrency": concurrency,
        "cores": list(cores),
        "niceness": niceness,
        "shots": [asdict(shot) for shot in shots],
    }
    with TemporaryDirectory(prefix="unimodal-load-") as folder:
        plan_file, result_file = Path(folder, "plan.json"), Path(folder, "result.json")
        plan_file.write_text(json.dumps(plan), encoding="utf-8")
        command = [sys.executable, "-m", "unimodal.serving.load", str(plan_file), str(result_file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ServingError(f"the load generator failed: {done.stderr[-500:]}")
        return [Hit(**item) for item in json.loads(result_file.read_text(encoding="utf-8"))]


async def run_plan(plan: dict[str, Any]) -> list[Hit]:
    """Send the requests of a plan and wait for all answers."""
    import aiohttp

    shots = [Shot(**shot) for shot in plan["shots"]]
    hits: list[Hit | None] = [None] * len(shots)
    payloads = [json.dumps(shot.body).encode() for shot in shots]  # before the clock starts
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        start = time.perf_counter()

        async def send(index: int) -> None:
            wait = (shots[index].at or 0) - (time.perf_counter() - start)
            if wait > 0:
                await asyncio.sleep(wait)
            hits[index] = await _send(session, shots[index], payloads[index], start)

        if plan["concurrency"] is None:
            await asyncio.gather(*map(send, range(len(shots))))
        else:
            queue = iter(range(len(shots)))

            async def client() -> None:
                for index in queue:
                    await send(index)

            await asyncio.gather(*(client() for _ in range(plan["concurrency"])))
    return [hit for hit in hits if hit is not None]


async def _send(session: Any, shot: Shot, payload: bytes, start: float) -> Hit:
    sent = time.perf_counter() - start
    preview, answer, error = None, {}, None
    try:
        async with session.post(
            shot.url, data=payload, headers={"Content-Type": "application/json"}
        ) as response:
            if response.status != 200:
                error = f"{response.status}: {(await response.text())[:200]}"
            elif not shot.body.get("stream"):
                answer = json.loads(await response.read())
            else:
                async for event in _events(response):
                    if event.get("type", "").endswith(".partial_image"):
                        preview = preview or time.perf_counter() - start
                    elif event.get("type", "").endswith(".completed"):
                        answer = {"usage": event.get("usage"), "data": [event]}
                    elif "error" in event:
                        error = str(event["error"])[:200]
        if not answer and error is None:
            error = "the answer broke off"
    except (TimeoutError, OSError, ValueError) as problem:
        error = f"{type(problem).__name__}: {problem}"[:200]
    usage = answer.get("usage") or {}
    return Hit(
        sent=sent,
        done=time.perf_counter() - start,
        preview=preview,
        tokens=usage.get("output_tokens", usage.get("completion_tokens", 0)),
        images=_images(answer),
        error=error,
    )


def _images(answer: dict[str, Any]) -> int:
    """How many pictures an answer holds, of the images routes or of a chat."""
    messages = (choice["message"] for choice in answer.get("choices", ()))
    in_chat = sum(len(message.get("images") or ()) for message in messages)
    return len(answer.get("data", ())) + in_chat


async def _events(response: Any) -> Any:
    """The JSON objects of a stream of server-sent events."""
    buffer = b""
    async for chunk in response.content.iter_any():
        buffer += chunk
        *whole, buffer = buffer.split(b"\n\n")
        for block in whole:
            for line in block.splitlines():
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    yield json.loads(line[6:])


def main(plan_file: str, result_file: str) -> None:
    """Run a plan's file and write the result's."""
    plan = json.loads(Path(plan_file).read_text(encoding="utf-8"))
    if plan["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, plan["cores"])
    os.nice(plan["niceness"])
    hits = asyncio.run(run_plan(plan))
    Path(result_file).write_text(json.dumps([asdict(hit) for hit in hits]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
