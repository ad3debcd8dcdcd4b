"""The world at other picture sizes: the same scenes, drawn at that size, read as they are."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.shapes.parser import parse_picture
from eval.shapes.render import render, render_array
from eval.shapes.requirement import Requirement, satisfies
from eval.shapes.scene import sample_scene
from eval.shapes.world import WorldManifest, read_world, write_world
from tokenizer_hf.errors import ConfigurationError


@pytest.mark.parametrize("level", ["board", "free"])
def test_large_pictures_show_the_same_and_are_read(level: str) -> None:
    rng = random.Random(7)
    for _ in range(60):
        scene = sample_scene(rng, level, held_out="any")  # type: ignore[arg-type]
        large = render_array(scene, 128)
        assert large.shape == (128, 128, 3)
        small = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
        difference = np.abs(small - render_array(scene).astype(float))
        assert difference.mean() < 0.5 and difference.max() < 40  # supersampled more finely
        assert satisfies(parse_picture(render(scene, 128)), Requirement.of(scene))


def test_a_world_of_large_pictures(tmp_path: Path) -> None:
    large = write_world(tmp_path / "l", 12, validation=4, picture_size=128, progress=False)
    small = write_world(tmp_path / "s", 12, validation=4, progress=False)
    assert WorldManifest.load(large).picture_size == 128
    for (data, *words), (other, *same) in zip(
        read_world(large, "train"), read_world(small, "train"), strict=True
    ):
        assert Image.open(io.BytesIO(data)).size == (128, 128)
        assert Image.open(io.BytesIO(other)).size == (64, 64)
        assert words == same
    for name in ("text/train.jsonl", "chat/train.jsonl"):
        assert (large / name).read_bytes() == (small / name).read_bytes()


@pytest.mark.parametrize("size", [0, 32, 100])
def test_other_sizes_are_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="multiple of 64"):
        write_world(tmp_path / "w", 4, picture_size=size, progress=False)
