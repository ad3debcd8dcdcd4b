"""The code cache: pictures encoded once, kept as Parquet beside their texts.

Codes are 0-based, so one cache serves every language model that was merged with the same image
tokenizer; the tokenizer's fingerprint stands in the manifest and a cache of another one is refused.

Layout::

    cache/
      codes-00000.parquet ...   key, codes, captions, prompts, questions, source, messages
      skipped.jsonl             one line for each row that could not be used
      cache_manifest.json       written last: a folder without it is half built and can be resumed
      progress.json             only while half built
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from tokenizer_hf.errors import CheckpointError, DataError, MismatchError
from tokenizer_hf.files import atomic_write
from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
from training.data.sources import Row, Skipped, Source, no_good_row, open_source, report
from unimodal.shipped import resolve

logger = logging.getLogger(__name__)

MANIFEST = "cache_manifest.json"
PROGRESS = "progress.json"
SKIPPED = "skipped.jsonl"

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("codes", pa.list_(pa.int32())),
        ("captions", pa.list_(pa.string())),
        ("prompts", pa.list_(pa.string())),
        ("questions", pa.list_(pa.struct([("question", pa.string()), ("answer", pa.string())]))),
        ("source", pa.string()),
        # A chat as JSON, its image parts holding codes; null for a picture with captions.
        ("messages", pa.string()),
    ]
)


@dataclass(frozen=True)
class CacheManifest:
    """What a cache says about itself (``cache_manifest.json``)."""

    fingerprint: str
    codebook_size: int
    num_codebooks: int
    num_rows: int
    skipped: int
    source: str
    source_signature: str


@dataclass
class _Progress:
    """Where a half-built cache stands: everything below ``next_index`` is in the shards."""

    fingerprint: str
    source: str
    source_signature: str
    next_index: int = 0
    shards: int = 0
    num_rows: int = 0
    skipped: int = 0


def build_cache(
    source: Source | str | Path,
    image_tokenizer: ImageTokenizer | str | Path,
    out: str | Path,
    *,
    batch_size: int = 64,
    shard_rows: int = 4096,
    bf16: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> "CodeCache":
    """Encode every picture of ``source`` into the cache folder ``out``.

    A build that was killed goes on after its last whole shard; a finished cache of the same data
    and tokenizer is opened as it is.

    Args:
        source: a `Source`, or what `open_source` takes.
        image_tokenizer: the model, its folder, a merged model's folder, or the name of one that
            comes with this package ("shipped:image_tokenizer").
        out: the cache folder.
        batch_size: pictures a forward pass.
        shard_rows: rows a Parquet file; also what a kill can lose at most.
        bf16: encode under bfloat16 autocast: faster on a GPU, and a few codes differ from
            those of float32.
        progress: show a bar with rate and remaining time.

    Raises:
        DataError: no row of the source could be used.
        MismatchError: ``out`` holds a cache of another tokenizer or other data.
    """
    if not isinstance(source, Source):
        source = open_source(source)
    if isinstance(image_tokenizer, ImageTokenizer):
        model = image_tokenizer
    else:
        model = ImageTokenizer.from_pretrained(image_tokenizer_folder(image_tokenizer))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    state = _resume_or_start(out, source, model.fingerprint())
    if state is None:
        return CodeCache(out)

    encoder = _Encoder(model, batch_size, bf16, torch.device(device))
    bar = tqdm(
        total=len(source), initial=state.next_index, unit="row", desc="encode", disable=not progress
    )
    first: Skipped | None = None
    with bar:
        for rows in _chunks(source.read(state.next_index), shard_rows):
            good = [row for row in rows if isinstance(row, Row)]
            skipped = [row for row in rows if isinstance(row, Skipped)]
            for number, row in enumerate(skipped, start=state.skipped):
                report(row, number)
                first = first or row
            records = encoder.encode(good, bar, broken=len(skipped))
            _commit(out, state, rows[-1].index + 1, records, skipped)
    if not state.num_rows:
        raise DataError(no_good_row(source.name, [first] if first else []))
    if state.skipped:
        logger.warning(
            "%s: %d of %d rows skipped, listed in %s",
            source.name, state.skipped, len(source), out / SKIPPED,
        )  # fmt: skip
    manifest = CacheManifest(
        fingerprint=state.fingerprint,
        codebook_size=model.config.codebook_size,
        num_codebooks=model.config.num_codebooks,
        num_rows=state.num_rows,
        skipped=state.skipped,
        source=state.source,
        source_signature=state.source_signature,
    )
    _write_json(out / MANIFEST, asdict(manifest))
    (out / PROGRESS).unlink()
    return CodeCache(out)


def image_tokenizer_folder(name: str | Path) -> str:
    """Return where the image tokenizer is: the folder itself, or a merged model's sub-folder."""
    folder = resolve(str(name))
    inner = Path(folder) / "image_tokenizer"
    return str(inner if (inner / "config.json").is_file() else folder)


class CodeCache:
    """A finished cache, opened for reading.

    Attributes:
        manifest: what the cache says about itself.
        code_values, code_offsets: int32 and int64; the codes of row i are
            ``code_values[code_offsets[i]:code_offsets[i + 1]]``.
    """

    def __init__(self, folder: str | Path, fingerprint: str | None = None) -> None:
        """Open a cache.

        Args:
            fingerprint: of the image tokenizer that the codes are for; None skips the check.

        Raises:
            CheckpointError: the folder is missing, half built, or a shard is unreadable.
            MismatchError: the cache was made by another image tokenizer.
        """
        self.folder = Path(folder)
        try:
            content = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            self.manifest = CacheManifest(**content)
        except FileNotFoundError:
            if (self.folder / PROGRESS).exists():
                state, remedy = "a half-built", "run the same `unimodal encode` again, it goes on"
            else:
                state, remedy = "not a", "make one with `unimodal encode`"
            raise CheckpointError(f"{folder} is {state} code cache; {remedy}") from None
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder / MANIFEST} cannot be read: {error}; build the cache again"
            ) from error
        if fingerprint is not None and fingerprint != self.manifest.fingerprint:
            raise MismatchError(
                f"the code cache {folder} was made by the image tokenizer "
                f"{self.manifest.fingerprint[:16]}, but the model holds {fingerprint[:16]}; encode "
                "the pictures again with `unimodal encode --image-tokenizer <the model's folder>`"
            )
        shards = sorted(self.folder.glob("codes-*.parquet"))
        try:
            table = pa.concat_tables([pq.read_table(shard, schema=SCHEMA) for shard in shards])
        except (pa.ArrowException, OSError) as error:
            raise CheckpointError(
                f"a shard of {folder} is unreadable: {error}; delete the folder and encode again"
            ) from error
        if len(table) != self.manifest.num_rows:
            raise CheckpointError(
                f"{folder} holds {len(table)} rows and its manifest says {self.manifest.num_rows}; "
                "delete the folder and encode again"
            )
        self._table = table.combine_chunks()
        self.code_values, self.code_offsets = _ragged(self._column("codes"))
        captions = self._column("captions")
        self._captions, self.caption_offsets = _flat(captions)
        self._prompts, self.prompt_offsets = _flat(self._column("prompts"))
        self._questions, self.question_offsets = _flat(self._column("questions"))
        self._messages = self._column("messages")
        self.has_messages = np.asarray(self._messages.is_valid())

    def __len__(self) -> int:
        return self.manifest.num_rows

    def codes(self, row: int) -> np.ndarray:
        """Return the codes of a row: int32 of shape (num_codes,), in [0, codebook_size)."""
        return self.code_values[self.code_offsets[row] : self.code_offsets[row + 1]]

    def captions(self, row: int) -> list[str]:
        """Return all captions of a row."""
        start, stop = self.caption_offsets[row : row + 2]
        return self._captions[start:stop].to_pylist()

    def caption(self, position: int) -> str:
        """Return a caption by its position in the cache (see ``caption_offsets``)."""
        return self._captions[position].as_py()

    def prompt(self, row: int, choice: int) -> str:
        """Return one of a row's prompts, or of its captions where it has no prompts.

        Args:
            choice: any number; taken modulo how many there are.
        """
        start, stop = self.prompt_offsets[row : row + 2]
        if start < stop:
            return self._prompts[int(start + choice % (stop - start))].as_py()
        start, stop = self.caption_offsets[row : row + 2]
        return self.caption(int(start + choice % (stop - start)))

    def questions(self, row: int) -> list[tuple[str, str]]:
        """Return all (question, answer) pairs of a row."""
        start, stop = self.question_offsets[row : row + 2]
        return [self.question(position) for position in range(start, stop)]

    def question(self, position: int) -> tuple[str, str]:
        """Return a (question, answer) pair by its position (see ``question_offsets``)."""
        pair = self._questions[position].as_py()
        return pair["question"], pair["answer"]

    def chat_codes(self, row: int) -> list[Any]:
        """Return the codes of each picture of a chat row, as `messages` holds them."""
        return [part["codes"] for part in _image_parts(self.messages(row) or [])]

    def messages(self, row: int) -> list[dict[str, Any]] | None:
        """Return a chat row's messages, image parts holding codes; None for a picture row."""
        value = self._messages[row].as_py()
        return None if value is None else json.loads(value)

    def key(self, row: int) -> str:
        """Return the file and line or row that a row came from."""
        return self._column("key")[row].as_py()

    def _column(self, name: str) -> pa.Array:
        column = self._table.column(name)
        return column.chunk(0) if column.num_chunks else pa.array([], type=column.type)


class _Encoder:
    """Pictures → cache records, in batches."""

    def __init__(
        self,
        model: ImageTokenizer,
        batch_size: int,
        bf16: bool,
        device: torch.device,
    ) -> None:
        self.model: Any = model.eval().to(device)  # type: ignore[arg-type]
        self.batch_size, self.bf16, self.device = batch_size, bf16, device

    def encode(self, rows: Sequence[Row], bar: Any, broken: int) -> list[dict[str, Any]]:
        """Encode the pictures of ``rows``, each picture once, ``batch_size`` at a time."""
        bar.update(broken)
        records: list[dict[str, Any]] = []
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            codes = iter(self._codes([image for row in part for image in _images(row)]))
            records += [_record(row, codes) for row in part]
            bar.update(len(part))
        return records

    @torch.inference_mode()
    def _codes(self, images: list[Any]) -> list[list[int]]:
        found: list[list[int]] = []
        for start in range(0, len(images), self.batch_size):
            batch = self.model.image_processor(
                images[start : start + self.batch_size], return_tensors="pt"
            )
            pixel_values = batch["pixel_values"].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                codes = self.model.encode(pixel_values)
            found += codes.reshape(len(codes), -1).tolist()  # several codebooks: token-major
        return found


def _images(row: Row) -> list[Any]:
    if row.messages is None:
        return [row.image]
    return [part["image"] for part in _image_parts(row.messages)]


def _image_parts(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        if isinstance(message["content"], list):
            yield from (part for part in message["content"] if part["type"] == "image")


def _record(row: Row, codes: Iterator[list[int]]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "key": row.key,
        "codes": [],
        "captions": row.captions,
        "prompts": row.prompts,
        "questions": [{"question": q, "answer": a} for q, a in row.questions],
        "source": row.source,
        "messages": None,
    }
    if row.messages is None:
        record["codes"] = next(codes)
    else:
        for part in _image_parts(row.messages):
            part["codes"] = next(codes)
            del part["image"]
        record["messages"] = json.dumps(row.messages, ensure_ascii=False)
    return record


def _resume_or_start(out: Path, source: Source, fingerprint: str) -> _Progress | None:
    """Return where to go on; None if the cache is finished."""
    fresh = _Progress(fingerprint, source.name, source.signature)
    done = (out / MANIFEST).exists()
    if not done and not (out / PROGRESS).exists():
        return fresh
    content = json.loads((out / (MANIFEST if done else PROGRESS)).read_text(encoding="utf-8"))
    if content["fingerprint"] != fingerprint:
        raise MismatchError(
            f"{out} holds a cache of the image tokenizer {content['fingerprint'][:16]}, but this "
            f"one is {fingerprint[:16]}; give another --out, or delete {out}"
        )
    if content["source_signature"] != source.signature:
        raise MismatchError(
            f"{out} was {'built' if done else 'begun'} from other data ({content['source']}, "
            f"{content['source_signature']!r:.99}), not {source.name} ({source.signature!r:.99}); "
            f"give another --out, or delete {out}"
        )
    return None if done else _Progress(**content)


def _commit(
    out: Path,
    state: _Progress,
    next_index: int,
    records: list[dict[str, Any]],
    skipped: Sequence[Skipped],
) -> None:
    """Write one shard, then the progress that names it: a kill in between repeats the shard."""
    if records:
        with atomic_write(out / f"codes-{state.shards:05d}.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), temporary)
        state.shards += 1
    known = _skipped_lines(out)[: state.skipped] if skipped else []
    if skipped:
        lines = known + [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in skipped]
        with atomic_write(out / SKIPPED) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    state.next_index = next_index
    state.num_rows += len(records)
    state.skipped += len(skipped)
    _write_json(out / PROGRESS, asdict(state))


def _skipped_lines(out: Path) -> list[str]:
    file = out / SKIPPED
    return file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []


def _chunks(rows: Iterator[Row | Skipped], size: int) -> Iterator[list[Row | Skipped]]:
    chunk: list[Row | Skipped] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _ragged(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    values, offsets = _flat(column)
    return np.asarray(values, dtype=np.int32), offsets


def _flat(column: pa.ListArray) -> tuple[pa.Array, np.ndarray]:
    """Split a list column into its flat values and the offsets of the rows (rows + 1)."""
    lengths = np.asarray(column.value_lengths().fill_null(0), dtype=np.int64)
    return column.flatten(), np.concatenate(([0], np.cumsum(lengths)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
