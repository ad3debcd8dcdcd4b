"""The table and the plot of ``unimodal bench serve``, from its JSON; no server, no model.

:func:`targets` holds what was measured against what issue 4 asks for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizer_hf.files import atomic_write

NAMES = {
    "vllm": "unimodal serve",
    "transformers": "transformers",
    "transformers_fifo": "transformers, FIFO",
    "transformers_fifo_by_kind": "transformers, FIFO by kind",
}


@dataclass(frozen=True)
class Target:
    """A figure and the bound that it is held against."""

    name: str
    value: float | None
    """None where it was not measured, or only failed."""
    bound: float
    at_least: bool
    """Whether the value has to be at least the bound, or at most."""
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether it is within its bound; None where there is no value."""
        if self.value is None or math.isnan(self.value):
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def targets(result: Mapping[str, Any]) -> list[Target]:
    """The figures that issue 4 asks for, of the parts that were measured."""
    found = []
    if "guidance" in result:
        part = result["guidance"]
        note = f"{part['concurrency']} at once, median of {len(part['ratios'])} turns; floor 0.5"
        name = "guided by unguided images/s at saturation"
        found.append(Target(name, part["ratio"], 0.45, True, "×", note))
    if "text_cost" in result:
        for run in result["text_cost"]["runs"]:
            which = "" if run["modalities"] is None else f", modalities {run['modalities']}"
            note = f"{run['pairs']} pairs; median of the pairs' own ratios "
            note += f"{100 * run['paired_cost']:+.1f} %" if run["pairs"] else "-"
            if run["drawn"]:
                note += f"; {run['drawn']} more that the model answered with an image"
            value = 100 * run["cost"] if run["pairs"] and not run["errors"] else None
            name = f"plugin's cost on a text request's p50{which}"
            found.append(Target(name, value, 3.0, False, "%", note))
    if "arrivals" in result:
        found += _arrival_targets(result["arrivals"]["runs"])
    if "preview" in result:
        for run in result["preview"]["runs"]:
            if run["concurrency"] == 1:
                share = run["first_preview_share"]
                value = 100 * share if share is not None and not run["errors"] else None
                name = f"first preview of a {run['codes']}-code image, {run['kind']}"
                note = result["preview"].get("model", "the model itself")
                found.append(Target(name, value, 30.0, False, "% of its time", note))
    if "startup" in result:
        part = result["startup"]
        note = f"median of {len(part['with_plugin_seconds'])} starts each"
        name = "start-up to ready, with by without the plugin"
        found.append(Target(name, part["difference_seconds"], 3.0, False, "s more", note))
    return found


def _arrival_targets(runs: Sequence[Mapping[str, Any]]) -> list[Target]:
    """At the highest rate, which no system keeps up with."""
    highest = max(run["rate"] for run in runs)
    by_system = {run["system"]: run for run in runs if run["rate"] == highest}
    ours, fifo = by_system["vllm"], by_system["transformers_fifo"]
    found = []
    for name, figure, bound, at_least in (
        ("images/s", "images_per_second", 2.0, True),
        ("p95", "p95_seconds", 1.0, False),
    ):
        note = f"{highest:.1f} requests/s, {ours['errors']} of {ours['requests']} failed; "
        note += f"{ours[figure] / by_system['transformers_fifo_by_kind'][figure]:.2f} × that of "
        note += "a FIFO that looks down the queue for requests of the first one's kind"
        value = None if ours["errors"] else ours[figure] / fifo[figure]
        title = f"Poisson arrivals: {name} by that of transformers' FIFO batching"
        found.append(Target(title, value, bound, at_least, "×", note))
    return found


def write_report(result: dict[str, Any], out: Path) -> None:
    """Write ``serve.md`` and ``serve.png`` of what ``serve.json`` holds so far."""
    with atomic_write(out / "serve.md") as temporary:
        temporary.write_text(table(result), encoding="utf-8")
    if "cells" in result or "arrivals" in result:
        plot(result, out / "serve.png")


def table(result: Mapping[str, Any]) -> str:
    """The whole result as Markdown."""
    settings, environment, model = result["settings"], result["environment"], result["model"]
    versions = ", ".join(f"{name} {value}" for name, value in environment["versions"].items())
    random = " (**random weights**)" if model["random"] else ""
    lines = [
        "# unimodal bench serve",
        "",
        f"Model `{model['folder']}`{random}: {model.get('parameters', 0) / 1e6:.2f} M parameters, "
        f"{model.get('codes')} codes a picture, {model.get('dtype')}. {versions}. "
        f"{environment['cores']} cores, load average {environment['load_average']:.1f} at the "
        f"start; vLLM computes on core {environment['vllm_cores']}, transformers with "
        f"{environment['transformers_threads']} thread, the load generator on core "
        f"{', '.join(map(str, environment['load_generator_cores'])) or 'any'}. "
        f"At most {settings['max_batch']} rows a batch, guidance {settings['guidance']}, seed "
        f"{settings['seed']}.",
    ]
    found = targets(result)
    if found:
        lines += ["", "## What issue 4 asks for", ""]
        rows = [
            [
                target.name,
                _number(target.value, target.unit),
                f"{'≥' if target.at_least else '≤'} {target.bound:g} {target.unit}",
                {True: "yes", False: "**no**", None: "not measured"}[target.met],
                target.note,
            ]
            for target in found
        ]
        lines += _rows(["figure", "measured", "bound", "met", "how"], rows)
    if "cells" in result:
        lines += ["", "## Closed loop: so many clients, each sends its next request at once", ""]
        lines += _rows(
            [
                "requests", "at once", "system", "images/s", "tokens/s", "p50 s", "p95 s",
                "first preview s", "image tokenizer", "memory MB", "failed",
            ],
            [_cell_row(cell) for cell in result["cells"]],
        )  # fmt: skip
    if "arrivals" in result:
        lines += ["", "## Poisson arrivals of mixed requests", ""]
        header = [
            "requests/s",
            "images/s offered",
            "system",
            "images/s",
            "p50 s",
            "p95 s",
            "failed",
        ]
        lines += _rows(
            header,
            [
                [
                    f"{run['rate']:.2f}",
                    f"{run['offered_images_per_second']:.2f}",
                    NAMES[run["system"]],
                    f"{run['images_per_second']:.2f}",
                    f"{run['p50_seconds']:.2f}",
                    f"{run['p95_seconds']:.2f}",
                    f"{run['errors']} of {run['requests']}",
                ]
                for run in result["arrivals"]["runs"]
            ],
        )
    if "preview" in result:
        lines += ["", "## Previews", ""]
        header = [
            "drawings",
            "codes",
            "at once",
            "first preview s",
            "whole p50 s",
            "share",
            "failed",
        ]
        lines += _rows(
            header,
            [
                [
                    run["kind"],
                    str(run["codes"]),
                    str(run["concurrency"]),
                    _number(run["first_preview_seconds"]),
                    _number(run["p50_seconds"]),
                    _percent(run["first_preview_share"]),
                    f"{run['errors']} of {run['requests']}",
                ]
                for run in result["preview"]["runs"]
            ],
        )
    return "\n".join(lines) + "\n"


def _cell_row(cell: Mapping[str, Any]) -> list[str]:
    return [
        cell["kind"],
        str(cell["concurrency"]),
        NAMES[cell["system"]],
        f"{cell['images_per_second']:.2f}",
        f"{cell['tokens_per_second']:.0f}",
        f"{cell['p50_seconds']:.3f}",
        f"{cell['p95_seconds']:.3f}",
        _number(cell["first_preview_seconds"]),
        _percent(cell["image_tokenizer_share"]),
        f"{cell['memory_bytes'] / 1e6:.0f}",
        f"{cell['errors']} of {cell['requests']}",
    ]


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _number(value: float | None, unit: str = "") -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3g} {unit}".strip()


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw images/s and p95 of the closed loop, the arrivals, and the figures by their bounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(16, 10), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    upper, lower = halves
    rates, latencies, arrivals = upper.subplots(1, 3)
    cells = result.get("cells", ())
    _plot_cells(rates, cells, "images_per_second", ("drawings", "guided", "mixed"))
    rates.set_title("Images a second")
    _plot_cells(latencies, cells, "p95_seconds", ("captions", "drawings", "guided", "mixed"))
    latencies.set_title("Seconds until an answer, p95")
    _plot_arrivals(arrivals, result.get("arrivals", {}).get("runs", ()))
    _plot_targets(lower.subplots(), targets(result))
    model = result["model"]
    title = (
        f"unimodal bench serve: {model['folder']}{', random weights' if model['random'] else ''}"
    )
    figure.suptitle(title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    pyplot.close(figure)


def _plot_cells(axis: Any, cells: Sequence[Mapping[str, Any]], what: str, kinds: Any) -> None:
    colours = {"captions": "C0", "drawings": "C1", "guided": "C2", "mixed": "C3"}
    for kind in kinds:
        for system, style in (("vllm", "-o"), ("transformers", "--x")):
            line = [cell for cell in cells if (cell["kind"], cell["system"]) == (kind, system)]
            if line:
                axis.plot(
                    [cell["concurrency"] for cell in line],
                    [cell[what] for cell in line],
                    style,
                    color=colours[kind],
                    label=f"{kind}, {NAMES[system]}",
                )
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    if not cells:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        return
    ticks = sorted({cell["concurrency"] for cell in cells})
    axis.set(xscale="log", yscale="log", xlabel="requests at once")
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _plot_arrivals(axis: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    axis.set_title("Mixed, Poisson arrivals: images a second; p95")
    for system, style in (
        ("vllm", "-o"),
        ("transformers_fifo", "--x"),
        ("transformers_fifo_by_kind", ":s"),
    ):
        line = [run for run in runs if run["system"] == system]
        axis.plot(
            [run["rate"] for run in line],
            [run["images_per_second"] for run in line],
            style,
            label=NAMES[system],
        )
        for run in line:
            axis.annotate(
                f" {run['p95_seconds']:.1f} s",
                (run["rate"], run["images_per_second"]),
                fontsize=8,
            )
    axis.set(xlabel="requests a second that arrive", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _plot_targets(axis: Any, found: Sequence[Target]) -> None:
    """Each figure as a share of its bound: at least 1 is wanted, or at most."""
    axis.set_title("What issue 4 asks for: measured by bound")
    shown = [target for target in found if target.met is not None]
    for row, target in enumerate(reversed(shown)):
        share = (target.value or 0) / target.bound
        axis.barh(row, share, color="C2" if target.met else "C3")
        sign = "≥" if target.at_least else "≤"
        label = f"{_number(target.value, target.unit)} ({sign} {target.bound:g})"
        axis.text(max(share, 0) + 0.02, row, label, va="center", fontsize=8)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(shown)), [target.name for target in reversed(shown)], fontsize=8)
    axis.set_xlabel("measured, by its bound; green is within it")
    shares = [0.0, 1.0, *((target.value or 0) / target.bound for target in shown)]
    axis.set_xlim(1.2 * min(shares), 1.3 * max(shares))


def targets_json(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """:func:`targets` for the JSON."""
    return [{**asdict(target), "met": target.met} for target in targets(result)]
