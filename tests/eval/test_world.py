"""The world on disk."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.shapes.captions import ROW_END
from eval.shapes.reading import parse_caption
from eval.shapes.render import render_array
from eval.shapes.requirement import satisfies
from eval.shapes.scene import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES
from eval.shapes.world import WorldManifest, read_world, write_world
from tokenizer_hf.errors import ConfigurationError, DataError


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "world"
    return write_world(folder, 120, seed=3, validation=30, progress=False)


def test_layout(world: Path) -> None:
    assert set(_digests(world)) == {
        "world.json",
        "train/pictures-00000.parquet",
        "validation/pictures-00000.parquet",
        "text/train.jsonl",
        "text/validation.jsonl",
        "chat/train.jsonl",
        "chat/validation.jsonl",
    }
    assert WorldManifest.load(world) == WorldManifest("board", 3, 120, 30, 4, 120)


def test_same_seed_same_bytes(world: Path, tmp_path: Path) -> None:
    again = write_world(tmp_path / "again", 120, seed=3, validation=30, progress=False)
    other = write_world(tmp_path / "other", 120, seed=4, validation=30, progress=False)
    assert _digests(again) == _digests(world)
    assert not set(_digests(other).values()) & set(_digests(world).values())


def test_rows_hold_what_they_say(world: Path) -> None:
    rows = list(read_world(world, "train"))
    assert len(rows) == 120
    for data, captions, pairs, scene in rows:
        picture = np.asarray(Image.open(io.BytesIO(data)))
        assert (picture == render_array(scene)).all()
        assert len(captions) == 4 and 1 <= len(pairs) <= 3
        parsed = [parse_caption(text) for text in captions]
        assert all(p and satisfies(scene, p) for p in parsed)
        assert all(o.colour for p in parsed[:3] if p for o in p.objects)
        assert not any(o.colour for o in parsed[3].objects)  # type: ignore[union-attr]


def test_validation_pictures_are_not_in_training(tmp_path: Path) -> None:
    folder = write_world(tmp_path / "w", 3000, seed=5, validation=300, progress=False)
    train = {scene for *_, scene in read_world(folder, "train")}
    validation = [scene for *_, scene in read_world(folder, "validation", limit=250)]
    assert len(validation) == 250
    assert not train & set(validation)


def test_datasets_reads_the_parquet(world: Path, tmp_path: Path) -> None:
    import datasets

    data = datasets.load_dataset("parquet", data_dir=str(world), cache_dir=str(tmp_path / "cache"))
    assert {split: len(data[split]) for split in data} == {"train": 120, "validation": 30}
    row = data["train"][0]
    assert row["image"].size == (64, 64)
    assert set(row["questions"][0]) == {"question", "answer"}


def test_text_files(world: Path) -> None:
    for split, n in (("train", 120), ("validation", 30)):
        texts = [json.loads(line) for line in (world / f"text/{split}.jsonl").open()]
        chats = [json.loads(line) for line in (world / f"chat/{split}.jsonl").open()]
        assert len(texts) == len(chats) == n
        assert all(set(row) == {"text"} and row["text"] for row in texts)
        assert all(set(row) == {"messages", "kind"} for row in chats)


def test_only_text_speaks_of_held_out_pairs(world: Path) -> None:
    names = [f"{colour} {shape}" for shape, colour in HELD_OUT]
    for split in ("train", "validation"):
        for _, captions, pairs, scene in read_world(world, split):
            assert not HELD_OUT & {(o.shape, o.colour) for o in scene.objects}
            said = " ".join([*captions, *(word for pair in pairs for word in pair)])
            assert not [name for name in names if name in said]
    chats = (world / "chat/train.jsonl").read_text()
    assert sum(name in chats for name in names) > 4


def test_free_world(tmp_path: Path) -> None:
    folder = write_world(
        tmp_path / "w",
        40,
        level="free",
        captions_per_picture=2,
        validation=5,
        chats=200,
        progress=False,
    )
    chats = [json.loads(line) for line in (folder / "chat/train.jsonl").open()]
    drawn = [c["messages"][1]["content"] for c in chats if c["kind"] == "board_of_caption"]
    assert len(drawn) > 5
    for text in drawn:  # eight rows of eight cells, colours and shapes as on a chessboard
        rows = [row.split() for row in text.split(ROW_END)]
        assert [len(row) for row in rows] == [8] * 8
        cells = [word for i, row in enumerate(rows) for word in row[i % 2 :] + row[: i % 2]]
        assert set(cells[::2]) <= {*COLOURS, *BACKGROUNDS}
        assert set(cells[1::2]) <= {*SHAPES, *BACKGROUNDS}


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="expected at least 1 and 2"):
        write_world(tmp_path / "w", 0)
    with pytest.raises(ConfigurationError, match="level is 'x'"):
        write_world(tmp_path / "w", 5, level="x", progress=False)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())  # nothing half-written
    with pytest.raises(DataError, match="is not a world"):
        list(read_world(tmp_path))
