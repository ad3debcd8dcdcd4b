"""samples.json -> one PNG: originals over reconstructions, captions, drawings, each with its words."""

import base64
import binascii
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from eval.evaluate import SAMPLES
from tokenizer_hf.errors import DataError
from tokenizer_hf.files import atomic_write

_COLUMNS = 8
_PICTURE = 128
_CELL = 148
_MARGIN = 16
_LINES = 5
_LINE = 15
_SOFT = (110, 110, 110)
_SECTIONS = (
    ("reconstructions", "Held-out pictures over their reconstructions", ("original",)),
    ("captions", "Captions of held-out pictures; gray: expected", ("picture",)),
    ("captions_held_out", "Captions of held-out pairs; gray: expected", ("picture",)),
    ("drawings", "Drawings of held-out prompts", ("picture",)),
    ("drawings_held_out", "Drawings of held-out pairs", ("picture",)),
)


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
            (title, [_cell(row, pictures) for row in samples[key]])
            for key, title, pictures in _SECTIONS
            if samples.get(key)
        ]
    except OSError as error:
        raise DataError(f"no {file} ({error.strerror}); run `unimodal evaluate` first") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not what `unimodal evaluate` writes ({error!r}); run it again"
        ) from error
    if not sections:
        raise DataError(f"{file} holds no picture; run `unimodal evaluate` again")
    page = _page(sections)
    with atomic_write(out) as temporary:
        page.save(temporary, "PNG", optimize=True)
    return Path(out)
