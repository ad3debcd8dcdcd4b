"""Every source gives the same rows, and names each row that it cannot give."""

import io
import json
import logging
import shutil
from pathlib import Path

import datasets
import pytest
from PIL import Image

from eval.shapes.world import write_world
from tests.training.conftest import write_pictures
from tokenizer_hf.errors import DataError
from training.data.sources import (
    HubDataset,
    ParquetFiles,
    Row,
    Skipped,
    open_source,
    read_text,
)


def add_line(folder: Path, line: object) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    with open(folder / "metadata.jsonl", "a", encoding="utf-8") as file:
        file.write(text + "\n")


def test_imagefolder(pictures: Path) -> None:
    rows = list(open_source(pictures))
    assert len(rows) == 24
    assert [row.index for row in rows] == list(range(24))
    assert rows[4].captions == ["A green circle.", "There is a large green square, number 4"]
    assert rows[4].questions == [("What colour is it?", "It's green!")]
    assert rows[4].key.endswith("metadata.jsonl:5")
    assert rows[4].image is not None and rows[4].image.size == (16, 16)


def test_reading_starts_anywhere(pictures: Path) -> None:
    assert [row.index for row in open_source(pictures).read(20)] == [20, 21, 22, 23]


def test_broken_rows_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_pictures(tmp_path, 3)
    whole = (folder / "000.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not a picture")
    add_line(folder, {"file_name": "cut.png", "text": "cut"})
    add_line(folder, {"file_name": "text.png", "text": "text"})
    add_line(folder, {"file_name": "nowhere.png", "text": "missing"})
    add_line(folder, '{"file_name": "000.png", ')
    add_line(folder, {"file_name": "000.png"})
    add_line(folder, {"file_name": "000.png", "text": "   "})
    add_line(folder, ["a", "list"])
    add_line(folder, {"text": "no file"})
    add_line(folder, {"file_name": "001.png", "text": "good again"})
    found = list(open_source(folder).read())
    broken = {row.where.rsplit(":", 1)[1]: row.reason for row in found if isinstance(row, Skipped)}
    assert sorted(map(int, broken)) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert "nowhere.png" in broken["6"] and "JSON" in broken["7"] and "caption" in broken["8"]
    with caplog.at_level(logging.WARNING):
        good = list(open_source(folder))
    assert [row.captions[0] for row in good][-1] == "good again" and len(good) == 4
    assert "metadata.jsonl:4" in caplog.text and "8 of 12 rows skipped" in caplog.text


def test_a_source_without_a_good_row_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    with pytest.raises(DataError, match=r"no usable row .*metadata\.jsonl:1"):
        list(open_source(tmp_path))


def test_parquet_as_the_world_writes_it(tmp_path: Path) -> None:
    write_world(tmp_path / "world", n=5, seed=1, validation=7, progress=False)
    source = open_source(tmp_path / "world")
    assert isinstance(source, ParquetFiles)
    rows = list(source)
    assert len(rows) == len(source) == 5  # of train/ alone
    assert len(open_source(tmp_path / "world", split="validation")) == 7
    assert all(r.image is not None and r.image.size == (64, 64) and r.captions for r in rows)
    assert any(row.questions for row in rows)
    assert all(len(row.prompts) == len(row.captions) for row in rows)


def test_parquet_rows_that_are_broken(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    good = {"bytes": image.getvalue(), "path": None}
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "text": datasets.Value("string")}
    )
    cells = [good, {"bytes": b"junk", "path": None}, None, good]
    data = datasets.Dataset.from_dict(
        {"image": cells, "text": ["a", "b", "c", None]}, features=features
    )
    data.to_parquet(tmp_path / "rows.parquet")
    found = list(open_source(tmp_path / "rows.parquet").read())
    assert [type(row) for row in found] == [Row, Skipped, Skipped, Skipped]
    assert [r.where.split()[-1] for r in found if isinstance(r, Skipped)] == ["1", "2", "3"]


def test_parquet_that_is_cut(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world", n=2, seed=1, validation=2, progress=False)
    [file] = (world / "train").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        open_source(world)


def test_columns_of_another_name(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    data = datasets.Dataset.from_dict({"picture": [image.getvalue()], "alt": ["a thing"]})
    data.to_parquet(tmp_path / "rows.parquet")
    columns = {"image": "picture", "captions": "alt"}
    [row] = open_source(tmp_path, columns=columns)
    assert row.captions == ["a thing"]


def test_hub_data_goes_through_load_dataset(pictures: Path) -> None:
    rows = list(HubDataset(str(pictures)))  # load_dataset takes a folder as it takes an id
    assert len(rows) == 24 and rows[0].captions[0] == "A red circle." and rows[0].questions
    assert rows[0].image is not None and rows[0].key.endswith("[train] row 0")


def test_hub_data_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot load the data set"):
        open_source("nobody/nothing-of-this-name")


def test_chats_with_pictures(pictures: Path, tmp_path: Path) -> None:
    shutil.copy(pictures / "000.png", tmp_path / "a.png")
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is this?"}]
    answer = {"role": "assistant", "content": "A red circle."}
    lines = [
        {"messages": [{"role": "user", "content": parts}, answer]},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"messages": [{"role": "robot", "content": "hello"}, answer]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "b.png"}]}, answer]},
        {"messages": "hello"},
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = list(open_source(file).read())
    assert isinstance(found[0], Row) and found[0].messages is not None
    assert found[0].messages[0]["content"][0]["image"].size == (16, 16)
    reasons = [row.reason for row in found if isinstance(row, Skipped)]
    assert len(reasons) == 4
    assert "assistant" in reasons[0] and "role" in reasons[1] and "b.png" in reasons[2]


def test_text_lines(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    lines = [json.dumps({"text": "one"}), "", "{", json.dumps({"text": ""})]
    lines.append(json.dumps({"messages": turns}))
    file.write_text("\n".join(lines))
    found = list(read_text([file]))
    assert found[0] == "one" and found[3] == turns
    assert [row.where for row in found if isinstance(row, Skipped)] == [f"{file}:3", f"{file}:4"]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "data.csv"])
def test_no_such_data(name: str) -> None:
    with pytest.raises(DataError, match="no such data"):
        open_source(name)


def test_pictures_alone_only_where_no_text_is_needed(pictures: Path, tmp_path: Path) -> None:
    shutil.copy(pictures / "000.png", tmp_path / "a.png")
    with pytest.raises(DataError, match=r"metadata\.jsonl"):
        open_source(tmp_path)
    [row] = open_source(tmp_path, need_text=False)
    assert row.captions == [] and row.image is not None
