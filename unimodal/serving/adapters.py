"""LoRA adapters beside a served model: which ones vLLM can take, and the flags that they need.

vLLM finds out when the engine is up and loads them, and says then what it does not know, not what
to do. So the flags are read first. No vLLM in here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokenizer_hf.errors import CheckpointError, ServingError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank``."""
RUNTIME = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
RUNTIME_SLOTS = 7
"""Room for adapters that are loaded while the server runs."""
CONFIG = "adapter_config.json"


def adapter_flags(
    vllm_args: Sequence[str], *, on_cpu: bool = False, environ: Mapping[str, str] | None = None
) -> list[str]:
    """Check the adapters of ``--lora-modules`` and return the flags that they need.

    Args:
        vllm_args: the user's flags; what they set themselves is not returned again.
        on_cpu: vLLM will run on a CPU. In vLLM 0.32 a row without an adapter then gets that of the
            last slot (vLLM's pull request 48421, in 0.33), so that slot has to stay empty.
        environ: tells whether adapters may be loaded at run time.

    Returns:
        ``--enable-lora``, ``--max-lora-rank`` (the largest rank of the adapters) and
        ``--max-loras`` (as many as there are: all fit in one batch); [] without adapters.

    Raises:
        CheckpointError: a folder that is no adapter.
        ServingError: an adapter that vLLM cannot apply, or too few slots on a CPU; the message says
            what to do instead.
    """
    folders = lora_folders(vllm_args)
    given = {}
    for argument, following in zip_longest(vllm_args, vllm_args[1:], fillvalue=""):
        flag, equals, value = argument.partition("=")
        given[flag.replace("_", "-")] = value if equals else following
    if not folders and "--enable-lora" not in given:
        return []
    wanted: dict[str, list[str]] = {"--enable-lora": []}
    rank = max(map(check_adapter, folders), default=0)
    if rank:
        wanted["--max-lora-rank"] = [str(next(size for size in RANKS if size >= rank))]
    runtime = (environ or {}).get(RUNTIME, "0").lower() in ("1", "true")
    slots = max(1, len(folders) + (RUNTIME_SLOTS if runtime else 0))
    wanted["--max-loras"] = [str(slots + on_cpu)]
    if on_cpu and int(given.get("--max-loras", slots + 1)) <= len(folders):
        raise ServingError(
            f"--max-loras {given['--max-loras']} with {len(folders)} adapters; on a CPU vLLM 0.32 "
            "answers requests for the model itself with an adapter of a full table: expected "
            f"{len(folders) + 1} or more, or leave the flag out"
        )
    return [word for flag, value in wanted.items() if flag not in given for word in (flag, *value)]


def lora_folders(vllm_args: Sequence[str]) -> list[str]:
    """Return the folders (or hub ids) that ``--lora-modules`` names, as ``name=path`` or as JSON.

    Raises:
        ServingError: a value that is neither.
    """
    values: list[str] = []
    taking = False
    for argument in vllm_args:
        head, equals, value = argument.partition("=")
        if argument.startswith("-"):
            taking = head.replace("_", "-") == "--lora-modules"
            values += [value] if taking and equals else []
        elif taking:
            values.append(argument)
    return [_folder(value) for value in values if value]


def _folder(value: str) -> str:
    if value.startswith("{"):
        try:
            return str(json.loads(value)["path"])
        except (ValueError, KeyError, TypeError) as error:
            raise ServingError(
                f'--lora-modules {value} is not JSON with "name" and "path" ({error!r})'
            ) from error
    name, equals, path = value.partition("=")
    if not (name and equals and path):
        raise ServingError(f"--lora-modules {value}; expected NAME=FOLDER")
    return path


def check_adapter(folder: str | Path) -> int:
    """Return the rank of an adapter that vLLM can apply; 0 for a hub id, which vLLM looks at.

    Raises:
        CheckpointError, ServingError: as :func:`adapter_flags`.
    """
    path = Path(folder).expanduser()
    if not path.exists() and not path.is_absolute() and str(folder).count("/") == 1:
        return 0
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        rank = max(int(config["r"]), *map(int, (config.get("rank_pattern") or {"": 0}).values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the adapter {folder} has no readable {CONFIG} ({error}); expected the folder of a "
            "LoRA adapter, as `unimodal train` writes it"
        ) from error
    whole = [str(name) for name in config.get("modules_to_save") or ()]
    norms = [name for name in whole if re.search(r"norm|ln", name)]
    trained, without = [], []
    if config.get("trainable_token_indices") or len(whole) > len(norms):
        trained.append("rows of the embedding")
        without.append("on the merged model with `lora.rows: none`")
    if norms:
        trained.append(f"norms ({', '.join(norms)})")
        without.append("without `optimizer.norms_learning_rate`")
    if trained:
        raise ServingError(
            f"the adapter {folder} has trained {' and '.join(trained)} beside its LoRA, which vLLM "
            f"cannot swap; fold it in with `unimodal merge-adapter {folder} --out NEW_MODEL` and "
            f"serve that, or train it {' and '.join(without)}"
        )
    unusual = [name for name in ("use_dora", "lora_bias") if config.get(name)]
    if unusual:
        raise ServingError(
            f"the adapter {folder} has {' and '.join(unusual)}, which vLLM does not know; expected "
            f"a plain LoRA. `unimodal merge-adapter {folder} --out NEW_MODEL` makes a model of it"
        )
    if rank > RANKS[-1]:
        raise ServingError(
            f"the adapter {folder} has rank {rank}, vLLM takes {RANKS[-1]} at most; fold it in "
            "with `unimodal merge-adapter`"
        )
    return rank
