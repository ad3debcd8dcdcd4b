"""report.json + samples.json + training logs -> report.md and one self-contained report.html."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from eval.curves import draw_curves, find_curves
from eval.evaluate import SAMPLES
from tokenizer_hf.errors import DataError
from tokenizer_hf.files import atomic_write

_TEMPLATE = Path(__file__).parent / "report_template.html"
_FAILURES = 60
_CAPTIONS = {
    "exact": "caption exact",
    "object_f1": "object F1",
    "colour": "colours",
    "relation": "relations",
    "count": "number of objects",
}
_JUDGES = {
    "own_likelihood": "by the model's own likelihood",
    "classifier": "by a small classifier trained on the real training pictures",
}
_PARSER = (
    "Drawings are judged from their pixels by a parser, strictly: the number of objects, every "
    "stated attribute, relation and background. Held-out pairs are shape–colour pairs that no "
    "training picture shows and nothing said of one names; texts without pictures speak of them."
)
_NO_PARSER = (
    "No parser reads these drawings. Retrieval tells whether the caption that a drawing was made "
    "from fits it better than captions of other held-out pictures, by judges that do not know what "
    "people see."
)
Table = tuple[str, list[str], list[list[Any]]]


def write_report(folder: str | Path) -> tuple[Path, Path]:
    """Write `report.md` and `report.html` beside a `report.json`.

    Args:
        folder: holds `report.json` and, written with it, `samples.json`. The losses of every
            training below it are drawn too.

    Returns:
        The paths of the Markdown and of the HTML file, which needs no other file.

    Raises:
        DataError: no report there, or one that cannot be read.
    """
    folder = Path(folder)
    report = _read_json(folder / "report.json")
    samples = _read_json(folder / SAMPLES) if (folder / SAMPLES).exists() else {}
    title = f"Report: {Path(str(report.get('model', folder))).name or 'model'}"
    tables = _tables(report)
    curves = draw_curves(find_curves(folder))
    markdown, page = folder / "report.md", folder / "report.html"
    with atomic_write(markdown) as temporary:
        temporary.write_text(_markdown(title, report, tables), encoding="utf-8")
    body = _html(report, tables, curves, samples)
    with atomic_write(page) as temporary:
        template = Template(_TEMPLATE.read_text(encoding="utf-8"))
        temporary.write_text(template.substitute(title=escape(title), body=body), encoding="utf-8")
    return markdown, page


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"no report at {path} ({error.strerror}); run `unimodal evaluate` first"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); run `unimodal evaluate` again") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} holds a {type(data).__name__}; expected a report's object")
    return data


# --- tables ---------------------------------------------------------------------------------------


def percent(score: Mapping[str, Any] | None) -> str:
    """ "83.0 % (75.4–88.6), n = 100", or "–" where nothing was measured."""
    if not score or score.get("score") is None:
        return "–"
    text = f"{100 * score['score']:.1f} %"
    if score.get("low") is not None:
        text += f" ({100 * score['low']:.1f}–{100 * score['high']:.1f})"
    return f"{text}, n = {score['n']}"


def number(score: Mapping[str, Any] | None, digits: int = 2, unit: str = "") -> str:
    """ "31.72 dB (31.50–31.94), n = 200", or "–"."""
    if not score or score.get("score") is None:
        return "–"
    value = score["score"]
    text = f"{value:.{0 if isinstance(value, int) else digits}f}{unit}"
    if score.get("low") is not None:
        text += f" ({score['low']:.{digits}f}–{score['high']:.{digits}f})"
    return f"{text}, n = {score['n']}"


def _tables(report: Mapping[str, Any]) -> list[Table]:
    """Title, head and rows of every table that the report has figures for."""
    tables: list[Table] = []
    if draw := report.get("draw"):
        held_out = report.get("draw_held_out", {})
        rows = [[name, percent(draw[name]), percent(held_out.get(name))] for name in draw]
        tables.append(("Drawing", ["prompt", "trained pairs", "held-out pairs"], rows))
    if caption := report.get("caption"):
        held_out = report.get("caption_held_out", {})
        rows = [
            [label, percent(caption[key]), percent(held_out.get(key))]
            for key, label in _CAPTIONS.items()
            if key in caption
        ]
        if "answers" in report:
            rows.append(["questions answered", percent(report["answers"]), "–"])
        if "dialogue" in report:
            talks = report["dialogue"]
            rows.append(["in dialogues: drawn as asked", percent(talks["drawing"]), "–"])
            rows.append(["in dialogues: answers", percent(talks["answers"]), "–"])
        tables.append(("Captions", ["", "trained pairs", "held-out pairs"], rows))
    if retrieval := report.get("retrieval"):
        tables.append(_retrieval_table(retrieval))
    if found := report.get("reconstruction"):
        rows = [["PSNR", number(found.get("psnr"), 2, " dB")]]
        if "parse_agreement" in found:
            rows.append(["reads as the same scene", percent(found["parse_agreement"])])
        rows.append(["codes used", number(found.get("codes_used"))])
        tables.append(("Reconstruction", ["", ""], rows))
    if text := report.get("text"):
        rows = [
            ["perplexity of the base", number(text.get("perplexity_base"), 3)],
            ["perplexity after tuning", number(text.get("perplexity_tuned"), 3)],
            ["KL(base ‖ tuned), nats a token", number(text.get("kl"), 4)],
            ["probability on image ids in text", number(text.get("image_mass"), 6)],
        ]
        tables.append(("Text", ["", ""], rows))
    return [*tables, *_running_tables(report)]


def _retrieval_table(retrieval: Mapping[str, Any]) -> Table:
    number_of = retrieval["candidates"]["score"]
    head = [f"which of {number_of} captions fits", "drawings", "held-out pictures (the ceiling)"]
    rows: list[list[Any]] = []
    for judge, name in _JUDGES.items():
        found = retrieval.get(judge)
        for key, label, told in (
            ("first", "true one first", percent),
            ("reciprocal_rank", "mean reciprocal rank", number),
        ):
            cells = [
                told(found[shown][key]) if found else "–" for shown in ("drawings", "pictures")
            ]
            rows.append([f"{name}: {label}", *cells])
    if found := retrieval.get("classifier"):
        rows.append(
            ["true captions with a word that the classifier knows", "", percent(found["known"])]
        )
    chance = f"{100 / number_of:.1f} %"
    rank = f"{sum(1 / i for i in range(1, number_of + 1)) / number_of:.2f}"
    rows.append(["chance: true one first", chance, chance])
    rows.append(["chance: mean reciprocal rank", rank, rank])
    return "Retrieval", head, rows


def _running_tables(report: Mapping[str, Any]) -> list[Table]:
    rows: list[list[Any]] = []
    if spans := report.get("spans"):
        rows.append(["image spans, malformed", f"{spans['generated']}, {spans['malformed']}"])
    if vllm := report.get("vllm"):
        same = f"{vllm.get('identical')} of {vllm.get('prompts')}"
        rows.append(["vLLM replies with the ids of transformers", same])
    if peak := report.get("peak_rss_bytes"):
        rows.append(["peak memory", f"{peak / 2**30:.2f} GiB"])
    machine = report.get("environment", {})
    if machine:
        rows.append(["machine", f"{machine.get('cpu')}, {machine.get('cores')} cores"])
        rows.append(["device", machine.get("gpu", machine.get("device"))])
        packages = machine.get("packages", {})
        rows.append(["packages", ", ".join(f"{k} {v}" for k, v in packages.items())])
    tables: list[Table] = [("Running", ["", ""], rows)] if rows else []
    if seconds := report.get("seconds"):
        listed = [[stage, f"{value:.1f}"] for stage, value in seconds.items()]
        tables.append(("Seconds", ["stage", "seconds"], listed))
    return tables


def _introduction(report: Mapping[str, Any]) -> list[str]:
    lines = [f"Model `{report.get('model')}`, made from `{report.get('base_llm')}`."]
    if world := report.get("world"):
        lines.append(f"World: level {world['level']}, {world['train']} training pictures.")
    if settings := report.get("settings"):
        told = ", ".join(f"{key} {value}" for key, value in settings.items())
        lines.append(f"Settings: {told}.")
    lines.append(
        "Shares are in per cent with Wilson's 95 % interval, other figures with a bootstrap "
        "interval; n counts what was measured. "
        + (_NO_PARSER if "retrieval" in report else _PARSER)
    )
    return lines


def _markdown(title: str, report: Mapping[str, Any], tables: Sequence[Table]) -> str:
    lines = [f"# {title}", "", *(line + "\n" for line in _introduction(report))]
    for name, head, rows in tables:
        lines += [f"## {name}", "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


# --- the page -------------------------------------------------------------------------------------


def _html(
    report: Mapping[str, Any],
    tables: Sequence[Table],
    curves: str,
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    sections: list[tuple[str, str]] = [
        (name, _html_table(head, rows)) for name, head, rows in tables
    ]
    if curves:
        sections.append(("Losses", f"<figure>{curves}</figure>"))
    if rows := samples.get("reconstructions"):
        told = '<p class="soft">Left the original, right what the codes decode to.</p>'
        sections.append(("Reconstructions", told + _cards(rows, _reconstruction_card, wide=True)))
    for key, name in (
        ("drawings", "Drawings"),
        ("drawings_held_out", "Drawings of held-out pairs"),
    ):
        if rows := samples.get(key):
            sections.append((name, _by_category(rows)))
    for key, name in (
        ("captions", "Captions"),
        ("captions_held_out", "Captions of held-out pairs"),
        ("answers", "Answers"),
        ("dialogues", "Dialogues"),
    ):
        if rows := samples.get(key):
            sections.append((name, _cards(rows, _caption_card)))
    if sheet := _failures(samples):
        sections.append(("Failures", sheet))
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name, _ in sections)
    top = "".join(f"<p>{_inline(line)}</p>" for line in _introduction(report))
    parts = [f'<h2 id="{_anchor(name)}">{escape(name)}</h2>{content}' for name, content in sections]
    return f'<div class="soft">{top}</div><nav>{links}</nav>{"".join(parts)}'


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _inline(line: str) -> str:
    parts = escape(line).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def _html_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{f'<tr>{top}</tr>' if any(head) else ''}{body}</table>"


def _cell(cell: Any) -> str:
    text = escape(str(cell))
    share, mark, rest = text.partition(" %")
    if not mark or not rest.startswith(" ("):
        return text
    return f'<span class="bar"><i style="width:{float(share):.0f}%"></i></span> {text}'


def _cards(rows: Sequence[Mapping[str, Any]], card: Any, wide: bool = False) -> str:
    cards = "".join(f'<div class="card">{card(row)}</div>' for row in rows)
    return f'<div class="cards{" wide" if wide else ""}">{cards}</div>'


def _image(source: str, text: str) -> str:
    return f'<img src="{source}" alt="{escape(text)}">'


def _verdict(row: Mapping[str, Any]) -> str:
    verdict = row.get("fulfilled")
    if verdict is None:
        return ""
    return '<span class="yes">✓</span> ' if verdict else '<span class="no">✗</span> '


def _reconstruction_card(row: Mapping[str, Any]) -> str:
    pictures = _image(row["original"], "original") + _image(row["reconstruction"], "reconstruction")
    return f"{pictures}<br>{_verdict(row)}{row['psnr']:.1f} dB"


def _drawing_card(row: Mapping[str, Any]) -> str:
    seen = row.get("seen")
    told = f'<br><span class="soft">reads as: {escape(seen)}</span>' if seen else ""
    return (
        f"{_image(row['picture'], row['prompt'])}<br>{_verdict(row)}{escape(row['prompt'])}{told}"
    )


def _caption_card(row: Mapping[str, Any]) -> str:
    told = f'<br><span class="soft">expected, or one of it: {escape(row["reference"])}</span>'
    return (
        f"{_image(row['picture'], row['caption'])}<br>{_verdict(row)}{escape(row['caption'])}{told}"
    )


def _by_category(rows: Sequence[Mapping[str, Any]]) -> str:
    kinds = dict.fromkeys(row["category"] for row in rows)
    return "".join(
        (f"<h3>{escape(kind)}</h3>" if kind else "")
        + _cards([row for row in rows if row["category"] == kind], _drawing_card)
        for kind in kinds
    )


def _failures(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Everything among the samples that went wrong, by kind."""
    kinds = (
        ("Reconstructions", ("reconstructions",), _reconstruction_card),
        ("Drawings", ("drawings", "drawings_held_out"), _drawing_card),
        (
            "Captions and answers",
            ("captions", "captions_held_out", "answers", "dialogues"),
            _caption_card,
        ),
    )
    parts = []
    for name, keys, card in kinds:
        rows = [r for key in keys for r in samples.get(key, ()) if r.get("fulfilled") is False]
        if rows:
            parts.append(f"<h3>{name}</h3>{_cards(rows[:_FAILURES], card)}")
    return "".join(parts)
