"""Loss curves: what the trainings logged -> one SVG."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizer_hf.errors import DataError

Series = dict[str, list[tuple[float, float]]]
_METRICS = "metrics.jsonl"
_STATE = "trainer_state.json"


def find_curves(folder: str | Path) -> dict[str, Series]:
    """Every training's losses below a folder.

    Looks for `metrics.jsonl` (one JSON object a logged step), `trainer_state.json` (of
    transformers' Trainer, outside of checkpoints) and, where a training left neither, TensorBoard's
    event files. A log that is cut off is read as far as it goes.

    Returns:
        training (its path below `folder`) -> name of the loss -> (step, value) pairs.
    """
    folder = Path(folder)
    found: dict[str, Series] = {}
    for name in (_METRICS, _STATE):
        for file in sorted(folder.rglob(name)):
            training = str(file.parent.relative_to(folder))
            if "checkpoint-" not in training and training not in found:
                found[training] = read_log(file)
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        where = file.parent.relative_to(folder)
        if not any(str(parent) in found for parent in (where, *where.parents)):
            series = _read_events(file.parent)
            parts = [part for part in where.parts if part not in ("tensorboard", "training")]
            found["/".join(parts) or str(where)] = series
    return {training: series for training, series in found.items() if series}


def read_log(file: str | Path) -> Series:
    """Losses of a `metrics.jsonl` or `trainer_state.json`: every key with "loss" in it, by step.

    Raises:
        DataError: the file cannot be read.
    """
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8")
        if file.name == _STATE:
            rows = json.loads(text)["log_history"]
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is no training log ({error}); remove it, or train again"
        ) from error
    series: Series = {}
    for row in rows:
        for key, value in row.items():
            if "loss" in key and key != "train_loss" and isinstance(value, int | float):
                series.setdefault(key, []).append((row.get("step", 0), value))
    return {key: points for key, points in series.items() if len(points) > 1}


def _read_events(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 2000})
    events.Reload()
    series = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if "loss" in tag
    }
    return {key: points for key, points in series.items() if len(points) > 1}


def draw_curves(curves: dict[str, Series]) -> str:
    """One SVG with a panel a training; "" where there is nothing to draw."""
    if not curves:
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (training, series) in zip(panels, sorted(curves.items()), strict=False):
        for name, points in series.items():
            steps, values = zip(*points, strict=True)
            panel.plot(steps, _smooth(values), linewidth=1.4, label=name.replace("losses/", ""))
        panel.set_title(training, fontsize=11)
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if all(value > 0 for points in series.values() for _, value in points):
            panel.set_yscale("log")
        panel.legend(fontsize=8, frameon=False)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean over about a fiftieth of the curve."""
    width = max(1, len(values) // 50)
    return [
        sum(part) / len(part)
        for i in range(len(values))
        if (part := values[max(0, i - width + 1) : i + 1])
    ]
