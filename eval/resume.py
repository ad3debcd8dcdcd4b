"""The drawings that a killed evaluation had finished: the next one goes on behind them."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tokenizer_hf.files import atomic_write


class FinishedDrawings:
    """Drawings on disk, chunk by chunk, for as long as an evaluation runs.

    Args:
        file: JSON lines, the first of which is ``made_by``; None keeps nothing.
        made_by: all that drawings depend on besides their prompts: model, sampling settings, seed.
            A file that says otherwise is begun anew. JSON values.

    Attributes:
        count: drawings that were found in the file.

    Raises:
        OSError: as the file system says.
    """

    def __init__(self, file: Path | None, made_by: dict[str, Any]) -> None:
        self._file = file
        self._chunks: dict[tuple[str, int], dict[str, Any]] = {}
        self.count = 0
        if file is None:
            return
        lines = _read(file)
        if lines[:1] == [json.loads(json.dumps(made_by))]:
            self._chunks = {(chunk["name"], chunk["first"]): chunk for chunk in lines[1:]}
            self.count = sum(len(chunk["pictures"]) for chunk in lines[1:])
        # Written again even so: the last line of a killed run may have been torn.
        with atomic_write(file) as temporary:
            whole = map(_line, [made_by, *self._chunks.values()])
            temporary.write_text("".join(whole), encoding="utf-8")

    def find(
        self, name: str, first: int, prompts: Sequence[str]
    ) -> tuple[list[Image.Image], dict[str, int]] | None:
        """Return the pictures and the counts of a chunk; None where it has to be drawn.

        Args:
            name: which part of the evaluation.
            first: number of the chunk's first drawing there.
            prompts: as given to `add`; a chunk of other prompts does not count.
        """
        chunk = self._chunks.get((name, first))
        if chunk is None or chunk["prompts"] != list(prompts):
            return None
        data = (io.BytesIO(base64.b64decode(text)) for text in chunk["pictures"])
        return [Image.open(one).convert("RGB") for one in data], chunk["counts"]

    def add(
        self,
        name: str,
        first: int,
        prompts: Sequence[str],
        pictures: Sequence[Image.Image],
        counts: dict[str, int],
    ) -> None:
        """Keep a chunk; see `find`."""
        if self._file is None:
            return
        chunk = {"name": name, "first": first, "prompts": list(prompts), "counts": counts}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(_line({**chunk, "pictures": [png_base64(picture) for picture in pictures]}))

    def remove(self) -> None:
        """Delete the file: the evaluation is whole."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"


def png_base64(picture: Image.Image) -> str:
    """Return a picture as PNG, in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _read(file: Path) -> list[dict[str, Any]]:
    """The lines of a file up to the first that is torn; none where there is no file."""
    found: list[dict[str, Any]] = []
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                found.append(json.loads(line))
            except ValueError:
                break
    return found
