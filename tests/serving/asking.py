"""Small pieces of requests and answers for the tests of the server, and hands on its engine.

A toy model answers in milliseconds. Where a test needs a request in the middle of its way, it puts
the engine to sleep or slows it down; waiting for the right moment would be a race.
"""

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from PIL import Image

from unimodal.serving.check import Server
from unimodal.serving.openai_shapes import data_uri


def metric(server: Server, name: str, **labels: str) -> float:
    """The sum of a metric over the lines that have these labels."""
    lines = (line for line in server.get("/metrics").splitlines() if line.startswith(name))
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(w in line for w in wanted))


def at_work(server: Server) -> float:
    """Requests in the engine, running or waiting."""
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    lines = server.get("/metrics").splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))


def engine_processes(server: Server) -> list[psutil.Process]:
    """The processes of vLLM's engine: its core and its workers."""
    family = psutil.Process(server.pid).children(recursive=True)
    names = ("VLLM::EngineCore", "VLLM::Worker")
    engine = []
    for one in family:
        with suppress(psutil.NoSuchProcess):  # it is just over
            if one.status() != "zombie" and " ".join(one.cmdline()).startswith(names):
                engine.append(one)
    assert engine, family
    return engine


@contextmanager
def engine_asleep(server: Server) -> Iterator[None]:
    """Requests reach the server while the block runs, and its engine does not get on with them."""
    processes = engine_processes(server)
    try:
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # a helper that the engine forked, and is over
                process.suspend()
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


@contextmanager
def engine_slowed(server: Server, awake: float = 0.005, asleep: float = 0.06) -> Iterator[None]:
    """The engine works for ``awake`` seconds and then sleeps for ``asleep``, in turn."""
    over = threading.Event()

    def doze() -> None:
        while not over.is_set():
            with engine_asleep(server):
                time.sleep(asleep)
            over.wait(awake)

    thread = threading.Thread(target=doze)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def picture(index: int = 0) -> Image.Image:
    image = Image.new("RGB", (24, 20), (40 * index % 255, 90, 255 - 30 * index % 255))
    image.paste((250, 250, 20), (index, index, index + 9, index + 9))
    return image


def image_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(image)}}


def user(*parts: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def opened(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))
