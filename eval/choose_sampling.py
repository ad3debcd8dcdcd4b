"""Choose how a model draws: guidance, temperature, top-k, candidates; on prompts no score uses.

Source of the question: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022), §5: the best
guidance differs from model to model and has to be measured.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.scores import judge_drawings
from eval.shapes.prompts import Prompt, prompts
from eval.shapes.scene import CATEGORIES, Level
from tokenizer_hf.errors import CheckpointError, DataError
from tokenizer_hf.files import atomic_write
from unimodal.pipeline import Unimodal
from unimodal.processing_unimodal import DRAW_DEFAULTS, PROCESSOR_FILE
from unimodal.shipped import require_not_shipped

VALIDATION_SEED = 1_000_003
"""Added to the seed, so that these prompts and noises are not those of `unimodal evaluate`."""


@dataclass(frozen=True, kw_only=True)
class SamplingGrid:
    """What is tried."""

    guidance: Sequence[float] = (1.0, 1.5, 2.0, 3.0)
    temperature: Sequence[float] = (0.3, 0.5, 0.7, 1.0)
    top_k: Sequence[int | None] = (None,)
    candidates: Sequence[int] = (1,)


def choose_sampling(
    folder: str | Path,
    level: Level,
    *,
    grid: SamplingGrid | None = None,
    n: int = 24,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Try every setting of a grid and write the best one into the model's folder.

    Prompts and judge are those of the embedded world of shapes; a model of other pictures cannot be
    measured by them.

    Args:
        folder: a merged and trained model; ``draw_settings`` of its ``processor_config.json`` are
            replaced, and all draw commands then start from them.
        level: of the embedded world.
        grid: what is tried.
        n: prompts of each category.
        seed: of prompts and drawings.

    Returns:
        One entry a setting, best first: ``guidance``, ``temperature``, ``top_k``, ``candidates``,
        ``score`` (mean over the categories of the share of drawings that fulfil their prompt) and
        ``categories``.

    Raises:
        CheckpointError: not a local merged folder.
        ConfigurationError: the folder of a model that comes with this package.
        DataError: no drawing at any setting fulfils its prompt; the folder stays as it was.
    """
    require_not_shipped(folder, "copy its folder and choose there")
    file = Path(folder) / PROCESSOR_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {PROCESSOR_FILE}; expected a local merged model")
    model = Unimodal.from_pretrained(folder)
    model.processor.draw_settings = dict(DRAW_DEFAULTS)  # None then means none, not an old choice
    grid = grid or SamplingGrid()
    plan = [
        prompt
        for category in CATEGORIES
        for prompt in prompts(category, n, seed + VALIDATION_SEED, level=level)
    ]
    settings = list(product(*asdict(grid).values()))
    tried = []
    for values in tqdm(settings, desc="sampling", disable=None if progress else True):
        named = dict(zip(asdict(grid), values, strict=True))
        tried.append({**named, **_score(model, plan, seed, named)})
    tried.sort(key=lambda one: -one["score"])
    if tried[0]["score"] == 0:
        raise DataError(
            f"not one drawing of {folder} fulfils its prompt, at any of {len(tried)} settings; "
            "expected a trained model of the embedded world of shapes, the only one that this "
            f"command can judge. Nothing was written; give settings by hand in {PROCESSOR_FILE}'s "
            "draw_settings"
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    config["draw_settings"] = {name: tried[0][name] for name in asdict(grid)}
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tried


def line(tried: dict[str, Any]) -> str:
    """One entry of what `choose_sampling` returns, as a line of a table."""
    return (
        f"guidance {tried['guidance']:<4} temperature {tried['temperature']:<4} "
        f"top-k {tried['top_k'] or 'all':<4} candidates {tried['candidates']:<2} "
        f"{100 * tried['score']:5.1f} %"
    )


def _score(
    model: Unimodal, plan: Sequence[Prompt], seed: int, settings: dict[str, Any]
) -> dict[str, Any]:
    drawn = model.draw([p.text for p in plan], seed=seed + VALIDATION_SEED, **settings)
    verdicts = judge_drawings(drawn, plan)
    found = {
        category: [v for v, p in zip(verdicts, plan, strict=True) if p.category == category]
        for category in CATEGORIES
    }
    shares = {category: sum(hits) / len(hits) for category, hits in found.items()}
    return {"score": sum(shares.values()) / len(shares), "categories": shares}
