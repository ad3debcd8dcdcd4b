"""Start a real server, and compare what it answers with transformers, token id by token id.

Used by ``unimodal serve-check``, by the demo and by the tests. Everything runs greedily in float32;
then both sides compute the same numbers but for rounding, and the ids are the same.
"""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from tokenizer_hf.errors import ServingError
from tokenizer_hf.files import atomic_write
from tokenizer_hf.image_processing_image_tokenizer import open_image
from unimodal.generation.sampling import SamplingSettings, generate
from unimodal.pipeline import Unimodal
from unimodal.serving.openai_shapes import data_uri
from unimodal.serving.serve import require_vllm

START_SECONDS = 600
STOP_SECONDS = 20
CAPTION_TOKENS = 32
_WITHOUT_PLUGIN = """
import sys
from unimodal.serving.serve import serve
serve(sys.argv[1], sys.argv[2:], plugin=False)"""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    """``http://127.0.0.1:PORT``; OpenAI's interface is below ``/v1``."""
    start_seconds: float
    log: Path
    pid: int
    """Of the process that the others are children of."""

    def get(self, path: str) -> str:
        """Return the body of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return str(answer.read().decode("utf-8"))

    def post(self, path: str, body: dict[str, Any], timeout_seconds: float = 300) -> dict[str, Any]:
        """Return the JSON answer to a JSON request.

        Raises:
            ServingError: the server answered with an error; the message is the server's.
        """
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode("utf-8"),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_seconds) as answer:
                return dict(json.loads(answer.read()))
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            raise ServingError(f"{path} answered {error.code}: {text[:500]}") from error


@contextmanager
def running_server(
    folder: str | Path,
    vllm_args: Sequence[str] = (),
    log: str | Path | None = None,
    *,
    plugin: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run ``unimodal serve`` on a free port of this machine while the block runs.

    Args:
        folder: a merged model.
        vllm_args: flags for vLLM.
        log: where the server's output goes; a temporary file if None.
        plugin: False starts the same vLLM without anything of ours, to compare with.
        environment: variables that are set for the server only.

    Raises:
        ServingError: vLLM is not installed, or the server ended or was not ready in time; the
            message ends with the last lines of its log.
    """
    require_vllm()
    with TemporaryDirectory(prefix="unimodal-serve-") as temporary:
        log = Path(log) if log is not None else Path(temporary, "server.log")
        port = _free_port()
        arguments = ["--host", "127.0.0.1", "--port", str(port), *vllm_args]
        start = ["-m", "unimodal.cli", "serve"] if plugin else ["-c", _WITHOUT_PLUGIN]
        command = [sys.executable, *start, str(folder), *arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={"VLLM_NO_USAGE_STATS": "1", **os.environ, **(environment or {})},
                start_new_session=True,  # one process group, so that no worker outlives it
            )
        try:
            began = time.monotonic()
            _wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
            yield Server(f"http://127.0.0.1:{port}", time.monotonic() - began, log, process.pid)
        finally:
            _stop(process)


def check_identical(
    folder: str | Path,
    prompts: Sequence[str],
    images: Sequence[Any] | None = None,
    *,
    guidance: float = 1.0,
    vllm_args: Sequence[str] = (),
    drawing: str | Path | None = None,
    out: str | Path | None = None,
    log: str | Path | None = None,
) -> dict[str, Any]:
    """Draw and caption greedily through a real server and through transformers; compare the ids.

    Args:
        folder: a merged model.
        prompts: what is drawn.
        images: what is captioned, anything that ``open_image`` takes; None captions the drawings.
        guidance: of the drawings.
        vllm_args: flags for the server; ``--dtype float32`` is always added.
        drawing: a PNG file for the first drawing that came from the server.
        out: a JSON file for the result.
        log: a file for the server's output.

    Returns:
        ``{"prompts": n, "identical": m, "draw": {...}, "caption": {...}, "different": [...],
        "vllm": version, "seconds": {"start": s, "requests": s}}``. ``prompts`` counts drawings and
        captions; one is identical if the ids of its prompt and of its reply are. Each entry of
        ``different`` says where they part, counted from the prompt's first id.

    Raises:
        ServingError: no server could be started, or it answered with an error.
    """
    import importlib

    with running_server(folder, ["--dtype", "float32", *vllm_args], log) as server:
        began = time.monotonic()
        model = Unimodal.from_pretrained(folder, device="cpu", dtype="float32")
        result = compare(server, model, prompts, images, guidance=guidance, drawing=drawing)
        seconds = time.monotonic() - began
    result["vllm"] = str(importlib.import_module("vllm").__version__)
    result["seconds"] = {"start": round(server.start_seconds, 1), "requests": round(seconds, 1)}
    if out is not None:
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def compare(
    server: Server,
    model: Unimodal,
    prompts: Sequence[str],
    images: Sequence[Any] | None = None,
    *,
    guidance: float = 1.0,
    drawing: str | Path | None = None,
) -> dict[str, Any]:
    """The part of :func:`check_identical` behind the start of the server.

    Args:
        server: serves the same folder in float32.
        model: the transformers side, float32, on the CPU.
    """
    answers = [_draw(server, prompt, guidance) for prompt in prompts]
    pictures = [_picture(answer["data"][0]["b64_json"]) for answer in answers]
    if drawing is not None and pictures:
        with atomic_write(drawing) as temporary:
            pictures[0].save(temporary, "PNG")
    drawn = [answer["prompt_token_ids"] + answer["data"][0]["token_ids"] for answer in answers]
    expected = [_draw_here(model, prompt, guidance) for prompt in prompts]
    shown = [open_image(image) for image in images] if images is not None else pictures
    captions = [_caption(server, model, image) for image in shown]
    captioned = [
        answer["prompt_token_ids"] + answer["choices"][0]["token_ids"] for answer in captions
    ]
    wanted = [_caption_here(model, image) for image in shown]
    different = [
        {"direction": direction, "index": index, "position": position}
        for direction, ours, theirs in (
            ("draw", drawn, expected),
            ("caption", captioned, wanted),
        )
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True))
        if (position := _first_difference(mine, other)) is not None
    ]
    wrong = [item["direction"] for item in different]
    total = len(drawn) + len(captioned)
    return {
        "prompts": total,
        "identical": total - len(different),
        "draw": {"prompts": len(drawn), "identical": len(drawn) - wrong.count("draw")},
        "caption": {
            "prompts": len(captioned),
            "identical": len(captioned) - wrong.count("caption"),
        },
        "guidance": guidance,
        "different": different,
    }


def _draw(server: Server, prompt: str, guidance: float) -> dict[str, Any]:
    body = {
        "prompt": prompt,
        "temperature": 0,
        "guidance_scale": guidance,
        "return_token_ids": True,
    }
    return server.post("/v1/images/generations", body)


def _draw_here(model: Unimodal, prompt: str, guidance: float) -> list[int]:
    processor = model.processor
    settings = SamplingSettings(image_temperature=0, guidance=guidance)
    ids, unwanted = (
        processor.render(processor.draw_messages(text), add_generation_prompt=True).input_ids
        for text in (prompt, "")
    )
    [reply] = generate(
        model.model, processor, [ids], settings, mode="image", negative_prompts=[unwanted]
    )
    return ids + reply


def _caption(server: Server, model: Unimodal, image: Image.Image) -> dict[str, Any]:
    messages = model.processor.caption_messages({"type": "image_url"})
    messages[0]["content"][0]["image_url"] = {"url": data_uri(image)}
    body = {
        "messages": messages,
        "temperature": 0,
        "max_tokens": CAPTION_TOKENS,
        "modalities": ["text"],
        "return_token_ids": True,
    }
    return server.post("/v1/chat/completions", body)


def _caption_here(model: Unimodal, image: Image.Image) -> list[int]:
    processor = model.processor
    messages = processor.caption_messages(image)
    ids = processor.render(messages, add_generation_prompt=True).input_ids
    settings = SamplingSettings(max_new_tokens=CAPTION_TOKENS)
    [reply] = generate(model.model, processor, [ids], settings, mode="text")
    return ids + reply


def _first_difference(one: list[int], other: list[int]) -> int | None:
    """Return the first position at which two lists differ, or None."""
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _picture(b64_json: str) -> Image.Image:
    return open_image(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise ServingError(f"the server ended with code {process.returncode}: {_tail(log)}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.25)
    raise ServingError(f"the server was not ready after {START_SECONDS} seconds: {_tail(log)}")


def _tail(log: Path) -> str:
    """Return the lines of a log that say what went wrong, or its last ones."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    wrong = [line for line in lines if "rror" in line]
    return "\n".join((wrong or lines)[-10:])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server and every process that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
