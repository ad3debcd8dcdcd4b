"""Offline batches through vLLM: an engine in this process, without a server.

The pictures are those of a server: the same segments, the same logits processor, so the same codes
for a seed.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from vllm import AsyncEngineArgs, AsyncLLMEngine
from vllm.lora.request import LoRARequest

from tokenizer_hf.errors import ServingError
from unimodal.batch_drawing import Drawing, Result, prompt_ids
from unimodal.generation.candidates import Reading, readings
from unimodal.processing_unimodal import UnimodalProcessor
from unimodal.serving.adapters import adapter_flags
from unimodal.serving.candidates import draw_best
from unimodal.serving.segments import DrawSettings, ImageSegments
from unimodal.serving.serve import command_line
from unimodal.serving.vllm_private import engine_arguments

GUARD = """
import os, sys
if sys.stdin.read() != "done":
    for process in sys.argv[1:]:
        try:
            os.kill(int(process), 9)
        except ProcessLookupError:
            pass
"""


class VllmBackend:
    """Draws as many at once as the engine has seats.

    Args:
        engine: vLLM's.
        processor: of the same folder.
        adapter: a LoRA folder without trained rows.
    """

    def __init__(
        self, engine: Any, processor: UnimodalProcessor, adapter: str | Path | None = None
    ) -> None:
        self.engine = engine
        self.processor = processor
        self.segments = ImageSegments(engine, processor.vocabulary)
        self.lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))

    async def draw(self, drawings: Sequence[Drawing]) -> AsyncGenerator[tuple[Drawing, Result]]:
        """As ``Backend.draw``."""
        waiting = iter(drawings)
        running: set[asyncio.Task[tuple[Drawing, Result]]] = set()
        seats = self.engine.vllm_config.scheduler_config.max_num_seqs
        try:
            while True:
                for drawing in waiting:
                    running.add(asyncio.create_task(self._draw(drawing)))
                    if len(running) >= seats:
                        break
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            for task in running:
                task.cancel()

    async def _draw(self, drawing: Drawing) -> tuple[Drawing, Result]:
        settings = DrawSettings(
            temperature=drawing.temperature,
            top_k=drawing.top_k or 0,
            guidance=drawing.guidance,
            budget=drawing.budget,
            seed=drawing.seed,
        )
        try:
            prompt = prompt_ids(self.processor, drawing.prompt)
            negative = []
            if drawing.guidance != 1:
                negative = prompt_ids(self.processor, drawing.negative_prompt)

            async def judge(spans: Sequence[list[int]]) -> list[tuple[Reading, Reading]]:
                return [readings(self.processor, drawing.prompt, span) for span in spans]

            return drawing, await draw_best(
                self.segments,
                prompt,
                negative,
                settings,
                drawing.candidates,
                judge,
                lora_request=self.lora,
            )
        except Exception as error:
            if self.engine.errored:
                raise ServingError(
                    f"vLLM's engine died ({type(error).__name__}: {error}); its log above says "
                    "why. Run the command again: what is done is not drawn again"
                ) from error
            return drawing, error


@contextmanager
def running_backend(
    folder: str | Path,
    processor: UnimodalProcessor,
    vllm_args: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> Iterator[VllmBackend]:
    """Start an engine, and end it with the block. To be entered on an event loop.

    Args:
        folder: the merged model, or a hub id.
        vllm_args: flags of ``vllm serve`` that concern the engine; they win over our defaults.

    Raises:
        ServingError: as ``serve``, and where the engine does not start.
    """
    modules = [] if adapter is None else ["--lora-modules", f"adapter={adapter}"]
    flags = adapter_flags(modules)  # every row has the adapter, so a CPU needs no empty slot
    arguments, environment = command_line(folder, [*vllm_args, *flags])
    os.environ.update(environment)
    parsed = engine_arguments(arguments[1:])
    try:
        engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs.from_cli_args(parsed))
    except (RuntimeError, ValueError) as error:
        raise ServingError(f"vLLM's engine did not start: {error}; its log says more") from error
    try:
        with _killed_with_us():
            yield VllmBackend(engine, processor, adapter)
    finally:
        engine.shutdown()


@contextmanager
def _killed_with_us() -> Iterator[None]:
    """Have the engine's processes killed if this process is: alone, they would wait for ever.

    A small process waits for the end of its standard input, which comes when we write "done" or are
    no more. It is started behind the engine, so no process of the engine holds the other end.
    """
    processes = [str(child.pid) for child in psutil.Process().children(recursive=True)]
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, *processes], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        guard.communicate(b"done")
