"""How much of a picture survives the image tokenizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from eval.scores import Score, mean, share
from eval.shapes.parser import parse_picture
from eval.shapes.requirement import Requirement, satisfies
from eval.shapes.scene import Scene


def psnr(original: Image.Image, reconstruction: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB over RGB bytes, at most 100 (equal pictures).

    The original is resampled to the reconstruction's size where they differ.
    """
    if original.size != reconstruction.size:
        original = original.resize(reconstruction.size, Image.Resampling.BICUBIC)
    a, b = (
        np.asarray(picture.convert("RGB"), np.float64) for picture in (original, reconstruction)
    )
    error = ((a - b) ** 2).mean()
    return float(min(100.0, 10 * np.log10(255**2 / max(error, 1e-12))))


def score_reconstruction(
    originals: Sequence[Image.Image],
    reconstructions: Sequence[Image.Image],
    codes: Any,
    scenes: Sequence[Scene] | None = None,
) -> dict[str, Score]:
    """Score reconstructions of held-out pictures.

    Args:
        originals, reconstructions: in the same order.
        codes: the integers in between, any shape that numpy understands.
        scenes: what the originals show, where they come from the embedded world.

    Returns:
        psnr: mean PSNR in dB.
        parse_agreement: share of reconstructions that the parser reads as their scene: every
            object's shape, colour and size, every plain relation, the background, and nothing else.
            Only with `scenes`.
        codes_used: how many different codes the pictures need; a count without an interval.
    """
    pairs = list(zip(originals, reconstructions, strict=True))
    used = len(np.unique(np.concatenate([np.ravel(row) for row in codes]))) if pairs else 0
    result = {
        "psnr": mean([psnr(*pair) for pair in pairs]),
        "codes_used": Score(score=used, n=len(pairs), low=None, high=None),
    }
    if scenes is not None:
        result["parse_agreement"] = share(agreements(reconstructions, scenes))
    return result


def agreements(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> list[bool]:
    """Whether each picture parses as its scene, in every respect."""
    return [
        satisfies(parse_picture(picture), Requirement.of(scene))
        for picture, scene in zip(pictures, scenes, strict=True)
    ]
