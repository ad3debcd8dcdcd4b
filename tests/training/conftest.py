"""A merged toy model, captioned pictures, their code cache and a text file, for all tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.toy import toy_merged_folder
from training.data.code_cache import build_cache

COLOURS = {"red": (220, 35, 40), "green": (40, 165, 60), "blue": (40, 80, 220)}


def write_pictures(folder: Path, count: int = 24) -> Path:
    """An imagefolder of one-coloured pictures with noise, two captions and a question each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        name = list(COLOURS)[i % 3]
        pixels = np.clip(np.array(COLOURS[name]) + rng.integers(-20, 20, (16, 16, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
        lines.append(
            {
                "file_name": f"{i:03d}.png",
                "captions": [f"A {name} circle.", f"There is a large {name} square, number {i}"],
                "questions": [{"question": "What colour is it?", "answer": f"It's {name}!"}],
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


def write_text(file: Path, count: int = 30) -> Path:
    """Plain lines and text-only chats."""
    lines: list[dict[str, Any]] = []
    for i in range(count):
        sentence = f"A small {list(COLOURS)[i % 3]} ring is left of a heart, size {i}."
        lines.append({"text": sentence})
        if i % 5 == 0:
            turns = [
                {"role": "user", "content": "What is left of the heart?"},
                {"role": "assistant", "content": sentence},
            ]
            lines.append({"messages": turns})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged folder: tiny Qwen3, tied, with an untrained image tokenizer."""
    return toy_merged_folder(tmp_path_factory.mktemp("merged"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of 24 pictures."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def cache(merged: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code cache of ``pictures``."""
    out = tmp_path_factory.mktemp("cache") / "codes"
    build_cache(str(pictures), merged, out, progress=False)
    return out


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file for the replay."""
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")
