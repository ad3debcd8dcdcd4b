"""A run's folder: start, resume, finish.

::

    output_dir/
      run.json            the resolved recipe, what model and data it was started with, "finished"
      recipe.yaml         the same recipe, to be run again
      metrics.jsonl       one JSON object for each logged step
      checkpoint-N/       whole or not there
      runs/               TensorBoard
      ...                 the result, once the run is finished
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.files import atomic_write
from training.recipes import (
    LanguageModelRecipe,
    TextModelRecipe,
    build_recipe,
    differences,
    recipe_to_dict,
    save_recipe,
)
from training.trainer import (
    UnimodalTrainer,
    default_attention,
    default_bf16,
    last_whole_checkpoint,
)

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
FREE_FIELDS = (  # may differ when a run is resumed: they do not change what is computed
    "output_dir",
    "training.logging_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.report_to",
    "training.disable_tqdm",
)
R = TypeVar("R", LanguageModelRecipe, TextModelRecipe)


def open_run(recipe: R, identity: Mapping[str, str], resume: bool) -> tuple[bool, R]:
    """Prepare ``output_dir`` for a run, or find that it can be resumed.

    Returns:
        whether the run is finished already, and the recipe with its automatic fields resolved (on
        resuming: as the first start resolved them). A run without any checkpoint begins anew.

    Raises:
        ConfigurationError: the folder holds a run of another recipe or of other data.
    """
    folder = Path(recipe.output_dir)
    started = (folder / RUN_FILE).is_file()
    if started and (not resume or not _has_results(folder)):
        _remove_run(folder)
        started = False
    for stale in folder.glob(".saving-*"):
        shutil.rmtree(stale, ignore_errors=True)
    if not started:
        if last_whole_checkpoint(folder) is not None:
            raise ConfigurationError(
                f"{folder} holds checkpoints of an unknown run (no {RUN_FILE}); give another "
                "output_dir"
            )
        recipe = resolved(recipe)
        _write_run(folder, {"recipe": recipe_to_dict(recipe), "identity": dict(identity)})
        save_recipe(recipe, folder / RECIPE_FILE)
        return False, recipe
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    # A field that is younger than the run has its default there.
    run["recipe"] = recipe_to_dict(build_recipe(type(recipe), run["recipe"]))
    wanted = recipe_to_dict(recipe)
    for path in (("bf16",), ("attention",), ("dtype",), ("lora", "fold")):
        _adopt(wanted, run["recipe"], path)
    changed = [
        line for line in differences(wanted, run["recipe"]) if line.split(":")[0] not in FREE_FIELDS
    ]
    began = run["identity"]
    changed += [f"the {n} files have changed" for n in identity if identity[n] != began.get(n)]
    if changed:
        raise ConfigurationError(
            f"{folder} holds the run of another recipe: {'; '.join(changed)}. Give another "
            "output_dir, or start over with --resume never"
        )
    return bool(run.get("finished")), build_recipe(type(recipe), wanted)


def run_to_the_end(trainer: UnimodalTrainer, output_dir: Path) -> None:
    """Train from the last whole checkpoint, or from the start."""
    checkpoint = last_whole_checkpoint(output_dir)
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        last = last_whole_checkpoint(output_dir)
        where = f"from {last.name}" if last else "from the start"
        print(f"\nstopped; run the same command again to go on {where} ({output_dir})")
        raise
    finally:
        trainer.interrupt.restore()
    if trainer.state.global_step < trainer.args.max_steps:
        print(
            f"\nstopped at step {trainer.state.global_step} of {trainer.args.max_steps}; "
            f"run the same command again to go on ({output_dir})"
        )
        raise KeyboardInterrupt
    trainer.write_metrics()


class publishing:
    """Collects the result of a run in a temporary folder; its files then move into ``output_dir``.

    The configuration moves last, so that a folder that was interrupted does not load.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.temporary = output_dir / ".saving-result"

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            last = ("config.json", "adapter_config.json")
            for file in sorted(self.temporary.iterdir(), key=lambda f: f.name in last):
                target = self.output_dir / file.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(file, target)
        shutil.rmtree(self.temporary, ignore_errors=True)


def close_run(output_dir: Path, **facts: Any) -> None:
    """Write into ``run.json`` that the run is finished, and what is known about its result."""
    run = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    _write_run(output_dir, {**run, **facts, "finished": True})


def _has_results(folder: Path) -> bool:
    """Tell whether a run got as far as a checkpoint. Before that there is nothing to go on from."""
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    return bool(run.get("finished")) or last_whole_checkpoint(folder) is not None


def _write_run(folder: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(folder / RUN_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _remove_run(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    for name in ("adapter_config.json", "config.json", "metrics.jsonl", RECIPE_FILE, RUN_FILE):
        (folder / name).unlink(missing_ok=True)


def resolved(recipe: R) -> R:
    """Replace every automatic field by what it means on this machine."""
    values: dict[str, Any] = {
        "attention": default_attention(recipe.attention),
        "bf16": default_bf16(recipe.bf16),
    }
    if isinstance(recipe, LanguageModelRecipe):
        cuda = torch.cuda.is_available()
        small = cuda and recipe.mode != "full"
        if recipe.dtype == "auto":
            values["dtype"] = "bfloat16" if small else "float32"
        if recipe.lora.fold is None:
            fold = recipe.mode == "lora" and not cuda and not recipe.lora.dropout
            values["lora"] = replace(recipe.lora, fold=fold)
    return replace(recipe, **values)


def _adopt(wanted: dict[str, Any], saved: Mapping[str, Any], path: tuple[str, ...]) -> None:
    """Take an automatic field's meaning from the run that is resumed."""
    *parents, name = path
    for parent in parents:
        if parent not in wanted or parent not in saved:
            return
        wanted, saved = wanted[parent], saved[parent]
    if name in wanted and wanted[name] in (None, "auto"):
        wanted[name] = saved.get(name)


def digest(files: list[Path]) -> str:
    """Hash names, sizes and both ends of the files: cheap, and different after any new training."""
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            continue  # opening it later gives the right error
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as content:
            digest.update(content.read(1 << 20))
            content.seek(max(size - (1 << 20), 0))
            digest.update(content.read(1 << 20))
    return digest.hexdigest()
