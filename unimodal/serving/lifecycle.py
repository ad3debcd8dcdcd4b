"""Health, and the way out: what ``/health`` says, and how the server stops on SIGTERM.

vLLM 0.32 drains by ``--shutdown-timeout``: its engine finishes the requests that it has and refuses
new ones. That is not enough for us, since a reply of several segments and a guided pair that falls
out of step put further requests into the engine. So on SIGTERM this process first lets its HTTP
requests end, and then asks vLLM for the same by SIGINT, which vLLM takes for the same wish.
"""

import asyncio
import logging
import os
import signal
from typing import Any

from fastapi.responses import JSONResponse

from unimodal.serving.gate import Admission
from unimodal.serving.vllm_private import EngineDeadError

logger = logging.getLogger("vllm.unimodal")

ENGINE_DEAD = "the engine died and this server is about to end: ask another one"

MARGIN_SECONDS = 3
"""Of ``--shutdown-timeout``, kept for vLLM's own part; with several API servers the parent process
kills what is left when the whole time is over."""


async def health_answer(engine: Any, image_tokenizer: Any, admission: Admission) -> JSONResponse:
    """Answer ``GET /health``: 200 if the engine lives and the image tokenizer is loaded, else 503.

    Args:
        engine: vLLM's ``EngineClient``.
        image_tokenizer: None if it is not loaded.
        admission: says whether the server is on its way out.
    """
    states = {"engine": "ready", "image_tokenizer": "ready", "server": "serving"}
    try:
        await engine.check_health()
    except EngineDeadError:
        states["engine"] = "dead"
    if image_tokenizer is None:
        states["image_tokenizer"] = "not loaded"
    if admission.draining:
        states["server"] = "draining"
    well = list(states.values()) == ["ready", "ready", "serving"]
    return JSONResponse({"status": "ok" if well else "unavailable", **states}, 200 if well else 503)


async def drain_on_sigterm(state: Any, admission: Admission, shutdown_timeout: float) -> None:
    """Take SIGTERM over from vLLM once it has installed its own handlers.

    Args:
        state: the application's; vLLM puts ``server`` there in the step that installs them.
        admission: the requests at work.
        shutdown_timeout: vLLM's flag, seconds; 0 leaves everything to vLLM, which aborts.
    """
    if not shutdown_timeout:
        return
    while not hasattr(state, "server"):
        await asyncio.sleep(0.05)
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []

    def begin() -> None:
        if not tasks:
            tasks.append(loop.create_task(_drain(admission, shutdown_timeout)))

    loop.add_signal_handler(signal.SIGTERM, begin)


async def _drain(admission: Admission, shutdown_timeout: float) -> None:
    seconds = max(shutdown_timeout - MARGIN_SECONDS, shutdown_timeout / 2)
    logger.info("draining: no new requests; those at work have %.0f s", seconds)
    ended = await admission.drain(seconds)
    logger.info("drained; %d requests took too long and were ended", ended)
    os.kill(os.getpid(), signal.SIGINT)
