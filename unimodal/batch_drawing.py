"""Offline batches: a file of prompts in, PNG files and a manifest out, whatever draws them.

Each line of the prompts file is one JSON object::

    {"prompt": "a red circle", "id": "c1", "n": 2, "seed": 7, "guidance": 4, "temperature": 1,
     "top_k": 50, "candidates": 4, "budget": 16, "negative_prompt": "blue"}

Only ``prompt`` is needed. ``manifest.jsonl`` gets one line for each finished picture, written
behind its PNG, so a run that was killed goes on with the pictures that have no line yet.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from tokenizer_hf.errors import ConfigurationError, DataError, MismatchError, UnimodalError
from tokenizer_hf.files import atomic_write
from tokenizer_hf.vocabulary import ImageVocabulary
from unimodal.generation.candidates import MAX_CANDIDATES, candidate_seeds
from unimodal.generation.grammar import ImageSpanGrammar
from unimodal.generation.sampling import SamplingSettings, generate
from unimodal.pipeline import Unimodal
from unimodal.processing_unimodal import DRAW_DEFAULTS, UnimodalProcessor
from unimodal.terminal import save_png

MANIFEST = "manifest.jsonl"
PROBLEMS_SHOWN = 20
"""Bad lines that an error names; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a line of the prompts file does not say."""

    n: int = 1
    seed: int = 0
    """A line without a seed gets this plus the number of pictures before it."""
    guidance: float = DRAW_DEFAULTS["guidance"]
    temperature: float = DRAW_DEFAULTS["temperature"]
    top_k: int | None = None
    candidates: int = DRAW_DEFAULTS["candidates"]
    budget: int | None = None
    negative_prompt: str = ""


class PromptLine(BaseModel):
    """A line of the prompts file; None stands for the default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(pattern=r"\S")
    id: str | None = Field(default=None, pattern=r"^[\w-][\w.-]*$", max_length=100)
    n: int | None = Field(default=None, ge=1, le=10_000)
    seed: int | None = Field(default=None, ge=0, lt=2**62)
    guidance: float | None = Field(default=None, ge=0, le=100)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_k: int | None = Field(default=None, ge=1)
    candidates: int | None = Field(default=None, ge=1, le=MAX_CANDIDATES)
    budget: int | None = Field(default=None, ge=1)
    negative_prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One picture to draw."""

    file: str
    """Name of its PNG; what a manifest knows it by."""
    id: str
    prompt: str
    seed: int
    guidance: float
    temperature: float
    top_k: int | None
    candidates: int
    budget: int | None
    negative_prompt: str


Result = list[int] | Exception
"""The span that was drawn, ``<|image_start|>`` to ``<|image_end|>``, or why there is none."""


class Backend(Protocol):
    """Draws; with transformers (below) or with vLLM (serving/offline.py)."""

    def draw(self, drawings: Sequence[Drawing]) -> AsyncGenerator[tuple[Drawing, Result]]:
        """Yield each drawing once, in any order. An error of one drawing is its result; one that
        ends them all is raised."""
        ...


# --- the prompts file -----------------------------------------------------------------------------


def read_prompts(path: str | Path, defaults: Defaults) -> list[Drawing]:
    """Read a prompts file; blank lines are skipped.

    Raises:
        DataError: no such file, nothing in it, or bad lines; each is named with its number.
    """
    try:
        with Path(path).open(encoding="utf-8") as stream:
            lines = list(stream)  # str.splitlines would also break at U+2028 within a prompt
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the prompts {path} cannot be read: {error}") from error
    drawings: list[Drawing] = []
    problems: list[str] = []
    taken: dict[str, int] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = _prompt_line(text)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        made = _drawings(line, line.id or f"{number:06d}", defaults, len(drawings))
        # File systems may take upper and lower case for the same name.
        names = [drawing.file.lower() for drawing in made]
        before = next((taken[name] for name in names if name in taken), None)
        if before is not None:
            problems.append(
                f"line {number}: its id {made[0].id!r} gives the same files as line {before}; "
                "expected another"
            )
        taken.update(dict.fromkeys(names, number))
        drawings += made
    if problems:
        shown = "; ".join(problems[:PROBLEMS_SHOWN])
        more = len(problems) - PROBLEMS_SHOWN
        raise DataError(
            f"{path} has {len(problems)} bad lines: {shown}" + f"; {more} more" * (more > 0)
        )
    if not drawings:
        raise DataError(f'{path} holds no prompt; expected lines like {{"prompt": "a red circle"}}')
    return drawings


def _prompt_line(text: str) -> PromptLine:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f'{text.strip():.40} is no object, expected {{"prompt": ...}}')
    try:
        return PromptLine.model_validate(value)
    except ValidationError as error:
        raise ValueError("; ".join(map(_problem, error.errors()))) from error


def _problem(item: Any) -> str:
    name = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"unknown field {name!r}, expected {', '.join(PromptLine.model_fields)}"
    if item["type"] == "missing":
        return f"{name!r} is missing"
    return f"{name!r} is {item['input']!r:.60}: {item['msg']}"


def _drawings(line: PromptLine, id: str, defaults: Defaults, before: int) -> list[Drawing]:
    given = line.model_dump(exclude_none=True, exclude={"prompt", "id"})
    values = {**asdict(defaults), **given}
    n = values.pop("n")
    seed = given.get("seed", defaults.seed + before)
    return [
        Drawing(
            **{
                **values,
                "id": id,
                "prompt": line.prompt,
                "seed": seed + index,
                "file": f"{id}.png" if n == 1 else f"{id}-{index}.png",
            }
        )
        for index in range(n)
    ]


def check_budgets(drawings: Sequence[Drawing], vocabulary: ImageVocabulary) -> None:
    """Refuse budgets that the image tokenizer does not have, before a model is loaded.

    Raises:
        DataError: names the drawing.
    """
    wrong = {}
    for budget, drawing in {drawing.budget: drawing for drawing in drawings}.items():
        try:
            ImageSpanGrammar(vocabulary, max_codes=budget, mode="image")
        except ConfigurationError as error:
            wrong[drawing.id] = str(error)
    if wrong:
        raise DataError("; ".join(f"prompt {id}: {problem}" for id, problem in wrong.items()))


# --- the run --------------------------------------------------------------------------------------


class Manifest:
    """``manifest.jsonl`` of an output folder: a line for each picture that is done or failed.

    Args:
        folder: the output folder; it is made.

    Raises:
        DataError: there is a manifest that is none of ours.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MANIFEST
        self.entries: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole, _, torn = text.rpartition("\n")
        for number, line in enumerate(whole.split("\n") if whole else (), start=1):
            try:
                entry = json.loads(line)
                self.entries[entry["file"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"line {number} of {self.path} is no entry of a drawing ({error}); give "
                    "another --out"
                ) from error
        if torn:  # the run was killed while it wrote
            with atomic_write(self.path) as temporary:
                temporary.write_text(whole + "\n" * bool(whole), encoding="utf-8")

    def is_done(self, drawing: Drawing, about: Mapping[str, Any]) -> bool:
        """Say whether a picture was drawn already, with these settings.

        Raises:
            MismatchError: another picture has its file name.
        """
        entry = self.entries.get(drawing.file)
        if entry is None:
            return False
        wanted = {**asdict(drawing), **about}
        other = {key: entry.get(key) for key in wanted if entry.get(key) != wanted[key]}
        if other:
            name = next(iter(other))
            raise MismatchError(
                f"{self.path} has {drawing.file} with {name} {other[name]!r}, now it is "
                f"{wanted[name]!r}; give another --out, or remove that folder"
            )
        return entry.get("status") == "done" and (self.path.parent / drawing.file).is_file()

    def add(self, entry: dict[str, Any]) -> None:
        """Append a line, and have it on the disk before this returns."""
        self.entries[entry["file"]] = entry
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


@dataclass(frozen=True)
class Summary:
    """What a run did, in pictures."""

    drawn: int
    skipped: int
    """Were there already."""
    failed: int
    """Have a line with ``"status": "error"``; the next run tries them again."""


async def draw_all(
    drawings: Sequence[Drawing],
    backend: Backend,
    processor: UnimodalProcessor,
    out: str | Path,
    about: Mapping[str, Any],
) -> Summary:
    """Draw what is not drawn yet, with a progress bar.

    Args:
        drawings: from :func:`read_prompts`.
        backend: draws them.
        processor: decodes the codes.
        out: the folder for the PNG files and the manifest.
        about: model, adapter and so on; goes into each file and each manifest line. A folder goes
            on only with the same.

    Raises:
        DataError, MismatchError: the folder's manifest is none of ours, or of another batch.
        ServingError: the engine died; what is done is in the manifest.
    """
    out = Path(out)
    manifest = Manifest(out)
    missing = [drawing for drawing in drawings if not manifest.is_done(drawing, about)]
    failed = 0
    bar = tqdm(total=len(drawings), initial=len(drawings) - len(missing), unit="picture")
    with bar:
        async with aclosing(backend.draw(missing)) as results:
            async for drawing, result in results:
                entry = {**asdict(drawing), **about}
                try:
                    if isinstance(result, Exception):
                        raise result
                    codes = processor.vocabulary.to_codes(result[1:-1])
                    await asyncio.to_thread(_save, processor, codes, out, entry)
                    entry |= {"codes": codes, "status": "done"}
                except OSError:  # the disk, not the drawing
                    raise
                except Exception as error:
                    failed += 1
                    bar.write(f"{drawing.file}: {error}", file=sys.stderr)
                    entry |= {"status": "error", "error": str(error)}
                manifest.add(entry)
                bar.update()
    return Summary(len(missing) - failed, len(drawings) - len(missing), failed)


def _save(
    processor: UnimodalProcessor, codes: list[Any], out: Path, entry: Mapping[str, Any]
) -> None:
    [picture] = processor.decode_codes([codes])
    save_png(picture, out / entry["file"], entry)


# --- transformers ---------------------------------------------------------------------------------


class TransformersBackend:
    """Draws some at a time: those whose settings are the same share a batch."""

    def __init__(self, model: Unimodal) -> None:
        self.model = model

    async def draw(self, drawings: Sequence[Drawing]) -> AsyncGenerator[tuple[Drawing, Result]]:
        """As :meth:`Backend.draw`."""
        groups: dict[Drawing, list[Drawing]] = {}
        for drawing in drawings:
            alike = replace(drawing, file="", id="", prompt="", seed=0)
            groups.setdefault(alike, []).append(drawing)
        for settings, group in groups.items():
            size = max(1, self.model.rows_per_batch // settings.candidates)
            for first in range(0, len(group), size):
                chunk = group[first : first + size]
                for drawing, result in zip(chunk, self._draw_or_say_why(chunk), strict=True):
                    yield drawing, result

    def _draw_or_say_why(self, chunk: list[Drawing]) -> list[Result]:
        """Draw a batch; if one spoils it, draw each alone."""
        try:
            return list(self._draw(chunk))
        except UnimodalError as error:
            if len(chunk) == 1:
                return [error]
        return [result for drawing in chunk for result in self._draw_or_say_why([drawing])]

    def _draw(self, chunk: list[Drawing]) -> list[list[int]]:
        processor, settings = self.model.processor, chunk[0]
        each = settings.candidates
        negative = None
        if settings.guidance != 1:
            negative = [prompt_ids(processor, settings.negative_prompt)] * (len(chunk) * each)
        prompts = [prompt_ids(processor, drawing.prompt) for drawing in chunk]
        spans = generate(
            self.model.model,
            processor,
            [prompt for prompt in prompts for _ in range(each)],
            SamplingSettings(
                image_temperature=settings.temperature,
                image_top_k=settings.top_k,
                guidance=settings.guidance,
                budget=settings.budget,
            ),
            mode="image",
            negative_prompts=negative,
            seeds=[seed for drawing in chunk for seed in candidate_seeds(drawing.seed, each)],
        )
        if each == 1:
            return spans
        return self.model.best_candidates([drawing.prompt for drawing in chunk], spans)


def prompt_ids(processor: UnimodalProcessor, prompt: str) -> list[int]:
    """The ids of a drawing prompt."""
    messages = processor.draw_messages(prompt)
    return processor.render(messages, add_generation_prompt=True).input_ids
