"""The embedded world as a data set on disk, in the formats that any other data set comes in."""

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from eval.shapes.captions import (
    captions,
    picture_text,
    place_questions,
    prompt_words,
    questions,
    world_text_messages,
)
from eval.shapes.render import render
from eval.shapes.scene import IMAGE_SIZE, HeldOut, Level, Scene, sample_scene
from tokenizer_hf.errors import ConfigurationError, DataError
from tokenizer_hf.files import atomic_folder

MANIFEST = "world.json"
_ROWS_PER_SHARD = 5000


@dataclass(frozen=True, slots=True)
class WorldManifest:
    """What `world.json` says."""

    level: Level
    seed: int
    train: int
    validation: int
    captions_per_picture: int
    chats: int
    picture_size: int = IMAGE_SIZE

    @classmethod
    def load(cls, folder: str | Path) -> "WorldManifest":
        """Read the manifest of a world.

        Raises:
            DataError: the folder holds none, or another version's.
        """
        path = Path(folder) / MANIFEST
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{folder} is not a world ({error}); expected a folder that "
                "`unimodal shapes FOLDER` has written"
            ) from error


def write_world(
    folder: str | Path,
    n: int,
    seed: int = 0,
    level: Level = "board",
    captions_per_picture: int = 4,
    validation: int | None = None,
    chats: int | None = None,
    picture_size: int = IMAGE_SIZE,
    progress: bool = True,
) -> Path:
    """Write pictures with captions and questions, and text-only lines, about the embedded world.

    ::

        world.json                         level, seed, numbers of pictures
        train/pictures-00000.parquet       image (PNG, `datasets.Image`), captions, prompts,
                                           questions, scene
        validation/pictures-00000.parquet  the same; no picture that training holds
        text/{train,validation}.jsonl      {"text": …}: captions, boards in words, questions
        chat/{train,validation}.jsonl      {"messages": […], "kind": …}: `world_text_messages`

    The captions of a row all name colour and shape of every object, but for the last, which is
    brief (shapes only); its prompts, which training draws from, are brief as often as not. At level
    `free`, where left and right are what is hardest to learn, up to four more questions are
    `place_questions`, in chats too, and chats' captions state relations oftener; evaluation asks a
    picture's first question only. No picture, nor what is said of one, has a HELD_OUT pair. The
    text lines and chats are about scenes of their own and speak of all pairs, as a text LLM has
    read of everything: a text model that has never read of a cyan star takes it for impossible, and
    carries that into its drawings.

    Args:
        folder: where to write; replaced as a whole when everything is there.
        n: number of training pictures (and of text lines).
        seed: the same seed writes the same bytes.
        level: `board` or `free`, see `sample_scene`.
        captions_per_picture: at least 2.
        validation: number of validation pictures; default a twentieth of `n`, between 200 and 1000.
        chats: number of training chats; default `n`.
        picture_size: pixels along a picture, a multiple of 64; the same scenes at any size.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        ConfigurationError: a number that is too small, an unknown level or picture size.
        OSError: as the file system says; nothing half-written is left.
    """
    if n < 1 or captions_per_picture < 2:
        raise ConfigurationError(
            f"n is {n} and captions_per_picture {captions_per_picture}; expected at least 1 and 2"
        )
    if level not in ("board", "free"):
        raise ConfigurationError(f"level is {level!r}; expected 'board' or 'free'")
    if validation is None:
        validation = min(1000, max(200, n // 20))
    chats = n if chats is None else chats
    manifest = WorldManifest(level, seed, n, validation, captions_per_picture, chats, picture_size)
    counts = {"validation": validation, "train": n}
    seen: set[Scene] = set()
    with (
        atomic_folder(folder) as draft,
        tqdm(
            total=2 * n + chats + 3 * validation, desc="world", unit="row", disable=not progress
        ) as bar,
    ):
        for split, count in counts.items():
            scenes = _scenes(count, f"{seed}-pictures-{split}", level, seen)
            if split == "validation":
                held = list(scenes)
                seen.update(held)
                scenes = iter(held)
            pictures = ((scene, render(scene, picture_size)) for scene in scenes)
            _write_pictures(
                draft / split, pictures, captions_per_picture, f"{seed}-{split}", level, bar
            )
            for kind, row in (("text", _text_row), ("chat", _chat_row)):
                path = draft / kind / f"{split}.jsonl"
                path.parent.mkdir(exist_ok=True)
                rng = random.Random(f"{seed}-{kind}-words-{split}")
                lines = chats if (kind, split) == ("chat", "train") else count
                with path.open("w", encoding="utf-8") as file:
                    for scene in _scenes(
                        lines, f"{seed}-{kind}-{split}", level, set(), held_out="any"
                    ):
                        file.write(json.dumps(row(scene, rng, level)) + "\n")
                        bar.update()
        text = json.dumps({k: getattr(manifest, k) for k in manifest.__slots__}, indent=2)
        (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return Path(folder)


def read_world(
    folder: str | Path, split: str = "validation", limit: int | None = None
) -> Iterator[tuple[bytes, list[str], list[tuple[str, str]], Scene]]:
    """Read pictures back: PNG bytes, captions, (question, answer) pairs and the scene.

    Raises:
        DataError: the folder is not a world, or lacks the split.
    """
    WorldManifest.load(folder)
    shards = sorted((Path(folder) / split).glob("*.parquet"))
    if not shards:
        raise DataError(f"{folder} has no split {split!r}; expected train or validation")
    count = 0
    for shard in shards:
        for batch in pq.ParquetFile(shard).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                if limit is not None and count >= limit:
                    return
                count += 1
                pairs = [(q["question"], q["answer"]) for q in row["questions"]]
                yield row["image"]["bytes"], row["captions"], pairs, Scene.from_json(row["scene"])


def _scenes(
    count: int, seed: str, level: Level, excluded: set[Scene], held_out: HeldOut = "exclude"
) -> Iterator[Scene]:
    rng = random.Random(seed)
    while count:
        scene = sample_scene(rng, level, held_out=held_out)
        if scene not in excluded:
            count -= 1
            yield scene


def _schema() -> Any:
    import datasets

    return datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "prompts": datasets.List(datasets.Value("string")),
            "questions": datasets.List(
                {"question": datasets.Value("string"), "answer": datasets.Value("string")}
            ),
            "scene": datasets.Value("string"),
        }
    ).arrow_schema


def _write_pictures(
    folder: Path,
    pictures: Iterator[tuple[Scene, Image.Image]],
    captions_per_picture: int,
    seed: str,
    level: Level,
    bar: Any,
) -> None:
    folder.mkdir()
    schema, rng = _schema(), random.Random(f"{seed}-words")
    rows: list[dict[str, Any]] = []
    shard = 0
    for scene, picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)
        name = f"{seed}-{shard * _ROWS_PER_SHARD + len(rows):06d}.png"
        texts = [captions(scene, rng, "named") for _ in range(captions_per_picture - 1)]
        texts.append(captions(scene, rng, "brief"))
        wanted = [prompt_words(scene, rng) for _ in texts]
        asked = questions(scene, rng) + place_questions(scene, rng, level)
        pairs = [{"question": q, "answer": a} for q, a in asked]
        rows.append(
            {
                "image": {"bytes": buffer.getvalue(), "path": name},
                "captions": texts,
                "prompts": wanted,
                "questions": pairs,
                "scene": scene.to_json(),
            }
        )
        bar.update()
        if len(rows) == _ROWS_PER_SHARD:
            _write_shard(folder, shard, rows, schema)
            shard, rows = shard + 1, []
    if rows:
        _write_shard(folder, shard, rows, schema)


def _write_shard(folder: Path, shard: int, rows: list[dict[str, Any]], schema: Any) -> None:
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, folder / f"pictures-{shard:05d}.parquet", row_group_size=1000)


def _text_row(scene: Scene, rng: random.Random, level: Level) -> dict[str, str]:
    kind = rng.choice(("caption", "board", "question"))
    if kind == "caption":
        return {"text": captions(scene, rng)}
    if kind == "board":
        text, board = captions(scene, rng), picture_text(scene, level)
        return {"text": f"{text}: {board}" if rng.random() < 0.5 else f"{board}: {text}"}
    messages = world_text_messages(scene, rng, "question_about_board", level)[1]
    return {"text": f"{messages[0]['content']} {messages[1]['content']}"}


def _chat_row(scene: Scene, rng: random.Random, level: Level) -> dict[str, Any]:
    kind, messages = world_text_messages(scene, rng, level=level)
    return {"messages": messages, "kind": kind}
