"""LoRA adapters beside a served model: which ones vLLM can take, and the flags that they need.

vLLM finds out when the engine is up and loads them, and says then what it does not know, not what
to do. So the flags are read first. No vLLM in here.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizer_hf.errors import CheckpointError, ServingError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank``."""
CONFIG = "adapter_config.json"


def adapter_flags(vllm_args: Sequence[str]) -> list[str]:
    """Check the adapters of ``--lora-modules`` and return the flags that they need.

    Args:
        vllm_args: the user's flags; what they set themselves is not returned again.

    Returns:
        ``--enable-lora``, ``--max-lora-rank`` (the largest rank of the adapters) and
        ``--max-loras`` (as many as there are: all fit in one batch); [] without adapters.

    Raises:
        CheckpointError: a folder that is no adapter.
        ServingError: an adapter that vLLM cannot apply; the message says what to do instead.
    """
    folders = lora_folders(vllm_args)
    if not folders:
        return []
    rank = max(check_adapter(folder) for folder in folders)
    fitting = next((size for size in RANKS if size >= rank), rank)
    given = {argument.partition("=")[0].replace("_", "-") for argument in vllm_args}
    wanted = {
        "--enable-lora": [],
        "--max-lora-rank": [str(fitting)],
        "--max-loras": [str(len(folders))],
    }
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
    if config.get("trainable_token_indices") or config.get("modules_to_save"):
        raise ServingError(
            f"the adapter {folder} has trained rows of the embedding beside its LoRA, which vLLM "
            f"cannot swap; fold it in with `unimodal merge-adapter {folder} --out NEW_MODEL` and "
            "serve that, or train it on the merged model with `lora.rows: false`"
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
