"""The page of samples: every picture is on it at its size, long words stay below their picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.evaluate import data_uri
from eval.sheet import _font, _wrapped, write_sheet
from tokenizer_hf.errors import DataError

COLOURS = [(220, 35, 40), (40, 165, 60), (40, 80, 220), (240, 215, 40)]


def uri(colour):
    return data_uri(Image.new("RGB", (64, 64), colour))


def write_samples(folder, samples):
    (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")


def shown(page, colour):
    """How many of the page's pixels have a colour."""
    return int((np.asarray(Image.open(page)) == colour).all(-1).sum())


def test_every_sample_is_on_the_page(tmp_path: Path) -> None:
    red, green, blue, yellow = COLOURS
    write_samples(
        tmp_path,
        {
            "reconstructions": [
                {
                    "original": uri(red),
                    "reconstruction": uri(green),
                    "psnr": 12.3,
                    "fulfilled": None,
                }
            ],
            "captions": [
                {"picture": uri(blue), "caption": "blue", "reference": "a blue", "fulfilled": False}
            ]
            * 11,  # more than a row
            "drawings": [
                {"prompt": "y" * 300, "category": "", "picture": uri(yellow), "fulfilled": None}
            ],
        },
    )
    page = write_sheet(tmp_path, tmp_path / "out" / "sheet.png")
    assert [shown(page, colour) // 128**2 for colour in COLOURS] == [1, 1, 11, 1]
    assert {file.name for file in page.parent.iterdir()} == {"sheet.png"}


def test_lines_fit_below_a_picture() -> None:
    font = _font(12)
    lines = _wrapped("a short text, and " + "m" * 40, font)
    assert " ".join(lines).replace(" ", "") == "ashorttext,and" + "m" * 40
    assert max(map(font.getlength, lines)) <= 128
    assert _wrapped("word " * 100, font)[-1] == "..."
    assert _wrapped("", font) == [""]
    missing = bytes(font.getmask("\U0010ffff"))
    assert all(bytes(font.getmask(letter)) != missing for letter in "–åéñ’")


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (None, "unimodal evaluate"),
        ({}, "no pictures"),
        ({"captions": [{"picture": "data:image/png;base64,AAAA", "caption": "a"}]}, "not what"),
        ({"captions": ["a"]}, "not what"),
        ([], "not what"),
    ],
)
def test_bad_samples_are_one_clear_error(tmp_path: Path, samples, said: str) -> None:
    if samples is not None:
        write_samples(tmp_path, samples)
    with pytest.raises(DataError, match=said):
        write_sheet(tmp_path, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
