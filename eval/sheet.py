"""samples.json -> one PNG: reconstructions, captions and drawings, each with its words."""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from eval.evaluate import SAMPLES
from tokenizer_hf.errors import DataError
from tokenizer_hf.files import atomic_write

_COLUMNS = 8
_PICTURE = 128
_GAP = 20
_LINE = 16
_TITLE = 44
_LINES = 6
"""Lines of text below a picture, at most; what is longer ends in three dots."""
_INK, _SOFT = (20, 20, 20), (120, 120, 120)
_SECTIONS = (
    ("reconstructions", "Pictures, and below what their codes decode to"),
    ("captions", "Captions (gray: expected, or one of it)"),
    ("captions_held_out", "Captions of held-out pairs (gray: expected, or one of it)"),
    ("answers", "Answers (gray: expected)"),
    ("drawings", "Drawings"),
    ("drawings_held_out", "Drawings of held-out pairs"),
)


@dataclass(frozen=True)
class _Cell:
    """Pictures below each other, then lines of text with their colours."""

    pictures: list[Image.Image]
    texts: list[tuple[str, tuple[int, int, int]]]


def write_sheet(folder: str | Path, out: str | Path) -> Path:
    """Draw the samples of an evaluation on one page.

    Args:
        folder: holds the `samples.json` that `unimodal evaluate` wrote.
        out: the PNG.

    Returns:
        ``out``.

    Raises:
        DataError: no samples there, or ones that cannot be read.
    """
    file = Path(folder) / SAMPLES
    try:
        samples = json.loads(file.read_text(encoding="utf-8"))
        sections = [
            (title, [_cell(row) for row in samples[key]])
            for key, title in _SECTIONS
            if samples.get(key)
        ]
    except FileNotFoundError as error:
        raise DataError(f"no samples at {file}; run `unimodal evaluate` first") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not what `unimodal evaluate` writes ({error!r}); run that again"
        ) from error
    if not sections:
        raise DataError(f"{file} holds no pictures; run `unimodal evaluate` again")
    page = _page(sections)
    with atomic_write(out) as temporary:
        page.save(temporary, "PNG", optimize=True)
    return Path(out)


def _cell(row: Mapping[str, Any]) -> _Cell:
    """A row of samples.json (docs/report_schema.md)."""
    if "reconstruction" in row:
        pictures, texts = [row["original"], row["reconstruction"]], [f"{row['psnr']:.1f} dB"]
    elif "caption" in row:
        pictures, texts = [row["picture"]], [row["caption"], row["reference"]]
    else:
        pictures, texts = [row["picture"]], [row["prompt"]]
    colours = (_INK, _SOFT)
    return _Cell([_open(uri) for uri in pictures], list(zip(texts, colours, strict=False)))


def _open(uri: str) -> Image.Image:
    data = base64.b64decode(uri.partition(",")[2], validate=True)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    return picture.resize((_PICTURE, _PICTURE), Image.Resampling.NEAREST)


def _page(sections: Sequence[tuple[str, Sequence[_Cell]]]) -> Image.Image:
    font, title_font = _font(12), _font(18)
    height = _GAP + sum(
        _TITLE + sum(_height(row, font) for row in _rows(cells)) for _, cells in sections
    )
    page = Image.new("RGB", (_GAP + _COLUMNS * (_PICTURE + _GAP), height), "white")
    pen = ImageDraw.Draw(page)
    y = _GAP
    for title, cells in sections:
        pen.text((_GAP, y), title, _INK, title_font)
        y += _TITLE
        for row in _rows(cells):
            for column, cell in enumerate(row):
                _draw(page, pen, cell, (_GAP + column * (_PICTURE + _GAP), y), font)
            y += _height(row, font)
    return page


def _draw(
    page: Image.Image, pen: ImageDraw.ImageDraw, cell: _Cell, corner: tuple[int, int], font: Any
) -> None:
    x, y = corner
    for picture in cell.pictures:
        page.paste(picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + _PICTURE, y + _PICTURE), outline=(215, 215, 215))
        y += _PICTURE + 4
    for text, colour in cell.texts:
        for line in _wrapped(text, font):
            pen.text((x, y), line, colour, font)
            y += _LINE


def _rows(cells: Sequence[_Cell]) -> Iterator[Sequence[_Cell]]:
    for first in range(0, len(cells), _COLUMNS):
        yield cells[first : first + _COLUMNS]


def _height(row: Sequence[_Cell], font: Any) -> int:
    return _GAP + max(
        len(cell.pictures) * (_PICTURE + 4)
        + sum(len(_wrapped(text, font)) for text, _ in cell.texts) * _LINE
        for cell in row
    )


def _wrapped(text: str, font: Any) -> list[str]:
    """Cut a text into lines that are as wide as a picture; a word that is wider is cut too."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= _PICTURE:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > _PICTURE:
                lines.append("")
            lines[-1] += letter
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], "..."]


def _font(size: int) -> Any:
    """DejaVu Sans, which comes with matplotlib; the font in Pillow has ASCII only."""
    import matplotlib

    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size
    )
