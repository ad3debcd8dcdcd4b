"""Scene -> picture: anti-aliased by supersampling, exactly the same pixels for the same scene."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval.shapes.scene import BACKGROUNDS, COLOURS, IMAGE_SIZE, Scene
from tokenizer_hf.errors import ConfigurationError

_OVERSAMPLING = 8
_RING_HOLE = 0.5
_SQUARE_SIDE = 0.88
_CROSS_ARM = 0.36
_TRIANGLE_BASE = 0.85
_STAR_INNER = 0.42
_HEART_SCALE, _HEART_SHIFT = 1.14, 0.12


def inside(shape: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points lie in a shape of radius 1 at the origin; u to the right, v down.

    Every shape fits into the box [-1, 1]²: circle of radius 1; square of half side 0.88; triangle
    with its apex at (0, -1) and its base from (-1, 0.85) to (1, 0.85); five-pointed star with its
    points at distance 1 (one of them up) and its notches at 0.42; upright cross with arms of half
    width 0.36; ring with a hole of radius 0.5; diamond |u| + |v| <= 1; heart
    (x² + y² - 1)³ <= x² y³ with x = 1.14 u and y = 0.12 - 1.14 v.
    """
    if shape == "circle":
        return u**2 + v**2 <= 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= _SQUARE_SIDE
    if shape == "triangle":
        return (v <= _TRIANGLE_BASE) & (abs(u) <= (v + 1) / (1 + _TRIANGLE_BASE))
    if shape == "star":
        # Fold the plane onto one tenth: there the edge runs from the point to the notch.
        angle = np.abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        distance = np.hypot(u, v)
        x, y = distance * np.cos(angle), distance * np.sin(angle)
        notch_x, notch_y = _STAR_INNER * np.cos(np.pi / 5), _STAR_INNER * np.sin(np.pi / 5)
        return (notch_x - 1) * y - notch_y * (x - 1) >= 0
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) <= _CROSS_ARM) & (np.maximum(abs(u), abs(v)) <= 1)
    if shape == "ring":
        return (u**2 + v**2 <= 1) & (u**2 + v**2 >= _RING_HOLE**2)
    if shape == "diamond":
        return abs(u) + abs(v) <= 1
    if shape == "heart":
        x, y = _HEART_SCALE * u, _HEART_SHIFT - _HEART_SCALE * v
        return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3
    raise ValueError(f"unknown shape {shape!r}")


@lru_cache(maxsize=4096)
def coverage(
    shape: str, radius: float, shift_x: float, shift_y: float, side: int
) -> NDArray[np.float32]:
    """How much of each pixel a shape covers.

    Args:
        shape: one of SHAPES.
        radius: pixels.
        shift_x, shift_y: where the centre lies relative to the middle of the window, in pixels.
        side: pixels along the square window.

    Returns:
        float32 (side, side) in [0, 1], read-only (it is cached).
    """
    ticks = (np.arange(side * _OVERSAMPLING) + 0.5) / _OVERSAMPLING - side / 2
    u, v = (ticks - shift_x) / radius, (ticks - shift_y) / radius
    points = inside(shape, *np.meshgrid(u, v))
    blocks = points.reshape(side, _OVERSAMPLING, side, _OVERSAMPLING)
    result = blocks.mean((1, 3), dtype=np.float32)
    result.setflags(write=False)
    return result


@lru_cache(maxsize=8192)
def _patch(
    shape: str,
    colour: str,
    background: str,
    radius: float,
    shift_x: float,
    shift_y: float,
    side: int,
) -> NDArray[np.uint8]:
    cover = coverage(shape, radius, shift_x, shift_y, side)[..., None]
    ink = np.array(COLOURS[colour], np.float32)
    paper = np.array(BACKGROUNDS[background], np.float32)
    return (paper + cover * (ink - paper) + 0.5).astype(np.uint8)


def render_array(scene: Scene, size: int = IMAGE_SIZE) -> NDArray[np.uint8]:
    """Scene -> uint8 (size, size, 3).

    Args:
        size: pixels along the picture, a multiple of 64. Everything is larger by the same factor
            and drawn at that size, not resampled.

    Raises:
        ConfigurationError: a size that is no multiple of 64.
    """
    if size < IMAGE_SIZE or size % IMAGE_SIZE:
        raise ConfigurationError(
            f"the picture size is {size}; expected a multiple of {IMAGE_SIZE} pixels"
        )
    scale = size // IMAGE_SIZE
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = BACKGROUNDS[scene.background]
    for o in scene.objects:
        x, y, radius = scale * o.x, scale * o.y, scale * o.radius
        side = 2 * int(np.ceil(radius)) + 2  # even, and one spare pixel for the sub-pixel shift
        left, top = int(x) - side // 2, int(y) - side // 2
        patch = _patch(o.shape, o.colour, scene.background, radius, x - int(x), y - int(y), side)
        # The spare row and column may hang over the picture's edge; an object itself never does.
        rows = slice(max(0, -top), min(side, size - top))
        columns = slice(max(0, -left), min(side, size - left))
        part = picture[max(0, top) : top + side, max(0, left) : left + side]
        part[:] = patch[rows, columns]
    return picture


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Scene -> RGB picture of ``size`` × ``size`` pixels, see `render_array`."""
    return Image.fromarray(render_array(scene, size))
