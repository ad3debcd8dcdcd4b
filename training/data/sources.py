"""Where training data comes from: picture folders, Parquet, chat files, hub data sets → rows.

Every source gives the same `Row`s. A row that cannot be used (a truncated picture, a text file
named .png, a missing file, broken JSON, no caption) becomes a `Skipped` that names its file and
line or row; nobody drops one silently. docs/data_formats.md shows literal rows of each format.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tokenizer_hf.errors import DataError, ImageError
from tokenizer_hf.image_processing_image_tokenizer import open_image

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CAPTION_COLUMNS = ("captions", "caption", "text", "texts", "txt")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
SHOWN_WARNINGS = 20


@dataclass(frozen=True)
class Row:
    """One usable row.

    Attributes:
        index: position in its source, counted from 0 over good and broken rows.
        key: file and line or row; unique within the source.
        image: the opened picture (RGB); None for a chat row, whose pictures stand in its messages.
        captions: texts that describe the picture.
        prompts: texts to draw the picture from; empty where captions serve for that.
        questions: (question, answer) pairs about the picture.
        messages: a chat, its image parts holding opened pictures; None for other rows.
        source: the path or hub id that the row came from.
    """

    index: int
    key: str
    source: str
    image: Image.Image | None = None
    captions: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)
    messages: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Skipped:
    """A row that could not be used: its position, its file and line or row, and the reason."""

    index: int
    where: str
    reason: str


class Source:
    """A data set that is read row by row, from any position.

    Attributes:
        name: the path or hub id.
        signature: changes when rows are added or removed; names the data of a half-built cache.
    """

    name: str
    signature: str

    def __len__(self) -> int:
        """Return the number of rows, good and broken."""
        raise NotImplementedError

    def read(self, start: int = 0) -> Iterator[Row | Skipped]:
        """Yield the rows from position ``start`` on, each as a `Row` or as a `Skipped`."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Row]:
        """Yield the good rows; report each broken one.

        Raises:
            DataError: at the end, if not a single row was good.
        """
        skipped: list[Skipped] = []
        good = 0
        for row in self.read():
            if isinstance(row, Skipped):
                report(row, len(skipped))
                skipped.append(row)
            else:
                good += 1
                yield row
        if skipped:
            logger.warning("%s: %d of %d rows skipped", self.name, len(skipped), len(self))
        if not good:
            raise DataError(no_good_row(self.name, skipped))


def report(skipped: Skipped, count: int) -> None:
    """Log a broken row; after the first `SHOWN_WARNINGS` only that more follow."""
    if count < SHOWN_WARNINGS:
        logger.warning("skipped %s: %s", skipped.where, skipped.reason)
    elif count == SHOWN_WARNINGS:
        logger.warning("more rows are skipped; only their number is shown from here on")


def no_good_row(name: str, skipped: Sequence[Skipped]) -> str:
    """Return the message for a source without a single good row."""
    first = f"; the first: {skipped[0].where}: {skipped[0].reason}" if skipped else ""
    return (
        f"{name} holds no usable row ({len(skipped)} skipped{first}); "
        f"docs/data_formats.md shows what a row must look like"
    )


def open_source(
    name: str | Path,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    need_text: bool = True,
) -> Source:
    """Open a data set by its path or hub id.

    Args:
        name: a folder with ``metadata.jsonl`` (imagefolder), a ``.parquet`` file or a folder of
            them, a ``.jsonl`` file of chats, or else the id of a data set on the hub.
        split: of a hub data set; a folder that has a sub-folder of this name is read there only.
        columns: our column name → the data set's, for example {"image": "jpg", "captions": "txt"}.
        need_text: whether a picture needs a caption or a question. False, for training an image
            tokenizer, also takes a plain folder of pictures.

    Raises:
        DataError: nothing readable there.
    """
    path = Path(name)
    if (path / split).is_dir():
        path = path / split
    if path.is_dir():
        if any(path.rglob("metadata.jsonl")):
            return ImageFolder(path, columns, need_text)
        if files := sorted(path.rglob("*.parquet")):
            return ParquetFiles(str(path), files, columns, need_text)
        if not need_text:
            return PictureFolder(path)
        raise DataError(
            f"{path} holds neither metadata.jsonl nor *.parquet; a folder of pictures needs a "
            'metadata.jsonl with lines such as {"file_name": "0001.png", "text": "a red circle"}'
        )
    if path.is_file():
        if path.suffix == ".parquet":
            return ParquetFiles(str(path), [path], columns, need_text)
        if path.suffix in (".jsonl", ".json"):
            return ChatFile(path)
        raise DataError(
            f"{path}: cannot read {path.suffix or 'such'} files; give .parquet or .jsonl"
        )
    if str(name).count("/") > 1 or str(name).startswith((".", "/", "~")) or path.suffix:
        raise DataError(f"no such data: {name}; give a folder, a file or the id of a hub data set")
    return HubDataset(str(name), split, columns, need_text)


class ImageFolder(Source):
    """Pictures beside ``metadata.jsonl`` files (the layout of `datasets`' imagefolder)."""

    def __init__(
        self, folder: Path, columns: Mapping[str, str] | None = None, need_text: bool = True
    ) -> None:
        self.name = str(folder)
        self.columns = dict(columns or {})
        self.need_text = need_text
        self.lines: list[tuple[Path, int, str]] = []
        for file in sorted(folder.rglob("metadata.jsonl")):
            self.lines += [(file, n, line) for n, line in _numbered_lines(file)]
        self.signature = (
            f"imagefolder {len(self.lines)} {sum(len(line) for *_, line in self.lines)}"
        )

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, start: int = 0) -> Iterator[Row | Skipped]:
        for index in range(start, len(self.lines)):
            file, number, line = self.lines[index]
            where = f"{file}:{number}"
            try:
                record = _json_object(line)
                name = record.get(self.columns.get("file_name", "file_name"))
                if not isinstance(name, str):
                    raise DataError(f'needs "file_name", a path relative to {file.parent}')
                image = open_image(_existing(file.parent / name))
                yield _picture_row(
                    index, where, self.name, image, record, self.columns, self.need_text
                )
            except (DataError, ImageError, OSError) as error:
                yield Skipped(index, where, _one_line(error))


class PictureFolder(Source):
    """A folder of pictures without any text, for training an image tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self.files = sorted(
            file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES
        )
        if not self.files:
            raise DataError(f"{folder} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES))})")
        self.signature = f"pictures {len(self.files)}"

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int = 0) -> Iterator[Row | Skipped]:
        for index in range(start, len(self.files)):
            file = self.files[index]
            try:
                yield Row(index, str(file), self.name, image=open_image(file))
            except (ImageError, OSError) as error:
                yield Skipped(index, str(file), _one_line(error))


class ParquetFiles(Source):
    """Parquet with an ``Image()`` column, as `datasets` and ``write_world`` write it."""

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        columns: Mapping[str, str] | None = None,
        need_text: bool = True,
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.name = name
        self.columns = dict(columns or {})
        self.need_text = need_text
        self.files: list[tuple[Path, int]] = []
        for file in files:
            try:
                self.files.append((file, pq.read_metadata(file).num_rows))
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"{file} is not a readable Parquet file: {_one_line(error)}; "
                    "write or download it again"
                ) from error
        self.signature = f"parquet {[(file.name, rows) for file, rows in self.files]}"

    def __len__(self) -> int:
        return sum(rows for _, rows in self.files)

    def read(self, start: int = 0) -> Iterator[Row | Skipped]:
        first = 0
        for file, rows in self.files:
            if first + rows > start:
                yield from self._read_file(file, first, max(start - first, 0))
            first += rows

    def _read_file(self, file: Path, first: int, start: int) -> Iterator[Row | Skipped]:
        import pyarrow.parquet as pq

        reader = pq.ParquetFile(file)
        wanted = {self.columns.get(name, name) for name in _known_columns(self.columns)}
        names = [name for name in reader.schema_arrow.names if name in wanted]
        row = 0
        for group in range(reader.num_row_groups):
            rows = reader.metadata.row_group(group).num_rows
            if row + rows <= start:
                row += rows
                continue
            # Small batches: a row group of large pictures need not fit into memory decoded.
            for batch in reader.iter_batches(256, row_groups=[group], columns=names):
                for record in batch.to_pylist():
                    if row >= start:
                        yield _record_row(
                            first + row,
                            f"{file} row {row}",
                            self.name,
                            record,
                            file.parent,
                            self.columns,
                            self.need_text,
                        )
                    row += 1


class HubDataset(Source):
    """A data set of the hub (or anything else that ``datasets.load_dataset`` takes)."""

    def __init__(
        self,
        name: str,
        split: str = "train",
        columns: Mapping[str, str] | None = None,
        need_text: bool = True,
    ) -> None:
        import datasets

        self.name = name
        self.columns = dict(columns or {})
        self.need_text = need_text
        try:
            data = datasets.load_dataset(name, split=split)
        except Exception as error:  # the hub client raises a score of unrelated types
            raise DataError(
                f"cannot load the data set {name!r} (split {split!r}): {_one_line(error)}; "
                "give a folder, a file, or the id of a hub data set that this machine can reach"
            ) from error
        # Our own decoder opens the pictures, so that a broken one is reported and not fatal.
        for column, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
                if not set(self.columns) & {"image"} and column not in IMAGE_COLUMNS:
                    self.columns["image"] = column
        self.data = data
        self.where = f"{name} [{split}]"
        self.signature = f"hub {split} {len(data)}"

    def __len__(self) -> int:
        return len(self.data)

    def read(self, start: int = 0) -> Iterator[Row | Skipped]:
        for index in range(start, len(self.data)):
            yield _record_row(
                index,
                f"{self.where} row {index}",
                self.name,
                self.data[index],
                Path("."),
                self.columns,
                self.need_text,
            )


class ChatFile(Source):
    """JSONL of chats whose image parts name files relative to the JSONL."""

    def __init__(self, file: Path) -> None:
        self.name = str(file)
        self.file = file
        self.lines = list(_numbered_lines(file))
        self.signature = f"chat {len(self.lines)} {sum(len(line) for _, line in self.lines)}"

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, start: int = 0) -> Iterator[Row | Skipped]:
        for index in range(start, len(self.lines)):
            number, line = self.lines[index]
            where = f"{self.file}:{number}"
            try:
                messages = _checked_messages(_json_object(line).get("messages"), self.file.parent)
                yield Row(index, where, self.name, messages=messages)
            except (DataError, ImageError, OSError) as error:
                yield Skipped(index, where, _one_line(error))


def read_text(files: Sequence[str | Path]) -> Iterator[str | list[dict[str, Any]] | Skipped]:
    """Yield the lines of text files: a str for {"text"}, a message list for text-only {"messages"}.

    Raises:
        DataError: a file is missing.
    """
    index = 0
    for name in files:
        file = Path(name)
        if not file.is_file():
            raise DataError(f"no such text file: {file}; give a .jsonl file")
        for number, line in _numbered_lines(file):
            try:
                record = _json_object(line)
                if "messages" in record:
                    yield _checked_messages(record["messages"], None)
                elif isinstance(record.get("text"), str) and record["text"].strip():
                    yield record["text"]
                else:
                    raise DataError('needs "text" (a string that is not empty) or "messages"')
            except DataError as error:
                yield Skipped(index, f"{file}:{number}", _one_line(error))
            index += 1


def _known_columns(columns: Mapping[str, str]) -> set[str]:
    own = ("prompts", "questions", "question", "answer")
    return {*IMAGE_COLUMNS, *CAPTION_COLUMNS, *columns, *own}


def _record_row(
    index: int,
    where: str,
    source: str,
    record: Mapping[str, Any],
    folder: Path,
    columns: Mapping[str, str],
    need_text: bool,
) -> Row | Skipped:
    try:
        image = _open_cell(_first_column(record, columns, "image", IMAGE_COLUMNS), folder)
        return _picture_row(index, where, source, image, record, columns, need_text)
    except (DataError, ImageError, OSError) as error:
        return Skipped(index, where, _one_line(error))


def _picture_row(
    index: int,
    where: str,
    source: str,
    image: Image.Image,
    record: Mapping[str, Any],
    columns: Mapping[str, str],
    need_text: bool,
) -> Row:
    captions = _captions(_first_column(record, columns, "captions", CAPTION_COLUMNS))
    prompts = _captions(record.get(columns.get("prompts", "prompts")))
    questions = _questions(record, columns)
    if need_text and not captions and not questions:
        raise DataError('has no caption: needs "text" or "captions" (or "questions")')
    return Row(
        index, where, source, image=image, captions=captions, prompts=prompts, questions=questions
    )


def _first_column(
    record: Mapping[str, Any], columns: Mapping[str, str], name: str, usual: Sequence[str]
) -> Any:
    """Return the column that ``columns`` names, or else the first usual one with a value."""
    if name in columns:
        return record.get(columns[name])
    return next((record[column] for column in usual if record.get(column)), None)


def _open_cell(cell: Any, folder: Path) -> Image.Image:
    """Open an ``Image()`` cell: {"bytes", "path"}, bytes, a path, or a decoded picture."""
    if isinstance(cell, Mapping):
        if cell.get("bytes"):
            return open_image(cell["bytes"])
        cell = cell.get("path")
    if not cell:
        raise DataError(f"has no image: needs one of the columns {', '.join(IMAGE_COLUMNS)}")
    return open_image(_existing(folder / cell) if isinstance(cell, (str, Path)) else cell)


def _captions(value: Any) -> list[str]:
    values = (
        [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    )
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


def _questions(record: Mapping[str, Any], columns: Mapping[str, str]) -> list[tuple[str, str]]:
    pairs = record.get(columns.get("questions", "questions"))
    if pairs is None:
        question = record.get(columns.get("question", "question"))
        answer = record.get(columns.get("answer", "answer"))
        pairs = [{"question": question, "answer": answer}] if question and answer else []
    if not isinstance(pairs, (list, tuple)):
        raise DataError(f'"questions" must be a list of question and answer, got {pairs!r}')
    for pair in pairs:
        if not isinstance(pair, Mapping) or not all(
            isinstance(pair.get(part), str) and pair[part].strip()
            for part in ("question", "answer")
        ):
            raise DataError(f'a question needs the strings "question" and "answer", got {pair!r}')
    return [(pair["question"].strip(), pair["answer"].strip()) for pair in pairs]


def _checked_messages(messages: Any, folder: Path | None) -> list[dict[str, Any]]:
    """Check a chat and open its pictures; ``folder`` None: a chat with pictures is an error."""
    if not isinstance(messages, list) or not messages:
        raise DataError('needs "messages": a list of {"role", "content"}')
    checked = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in (
            "system",
            "user",
            "assistant",
        ):
            raise DataError(
                f"a message needs a role system, user or assistant, got {message!r:.200}"
            )
        content = message.get("content")
        if isinstance(content, list):
            content = [_checked_part(part, folder) for part in content]
        elif not isinstance(content, str):
            raise DataError(f'"content" must be a string or a list of parts, got {content!r:.200}')
        checked.append({"role": message["role"], "content": content})
    if not any(message["role"] == "assistant" for message in checked):
        raise DataError("has no assistant turn, so there is nothing to learn")
    return checked


def _checked_part(part: Any, folder: Path | None) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        if folder is None:
            raise DataError("a text file must not hold pictures; encode it with `unimodal encode`")
        path = part.get("image") or part.get("path")
        if not isinstance(path, str):
            raise DataError(
                f'an image part needs "image", a path beside the file, got {part!r:.200}'
            )
        return {"type": "image", "image": open_image(_existing(folder / path))}
    raise DataError(f'a part must be {{"type": "text" | "image", ...}}, got {part!r:.200}')


def _numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of the lines that are not blank."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


def _json_object(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"must be a JSON object, got {type(record).__name__}")
    return record


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"names a missing file: {path}")
    return path


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
