"""Picture -> scene: reads the pixels only.

The parser knows what `scene.py` and `render.inside` publish (palette, backgrounds, shapes, sizes)
and nothing about how a picture came to be: any radius, any place, any drawer. Steps:

1. background: the published background that is nearest to most pixels of the outermost frame;
2. cores: pixels that are plainly one palette colour and whose neighbours are too (edges between an
   object and the background can pass through a third colour, but only along a line);
3. every pixel belongs to the nearest core's colour, which tells how much of the pixel is covered;
4. objects: connected pixels of one colour that are covered by more than half;
5. shape and size: the best of a bank of shape × radius × sub-pixel shift × softness, by the overlap
   of the coverages.
"""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from eval.shapes.render import inside
from eval.shapes.scene import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, Object, Scene

_INKS = np.array(list(COLOURS.values()), np.float32)
_INK_NAMES = tuple(COLOURS)
_PAPERS = np.array(list(BACKGROUNDS.values()), np.float32)
_PAPER_NAMES = tuple(BACKGROUNDS)

_MAX_PAPER_DISTANCE = 45.0
"""RGB distance from which a frame pixel is no background at all."""
_MAX_INK_DISTANCE = 70.0
"""RGB distance within which a pixel can be a palette colour's core."""
_MIN_CORE_NEIGHBOURS = 5
"""Pixels of the 3×3 around a core pixel, itself included, that must be near the same colour."""
_MIN_AREA = 12
"""Covered pixels below which a speck is no object; the smallest star has 60."""
_MIN_OVERLAP = 0.72
"""Overlap with the best template below which an object is unreadable, and so is the picture."""
_BLURS = (0.0, 1.2)
"""Standard deviations in pixels: a bank of soft templates beside the sharp one, since resampling,
JPEG's halved colour resolution and decoders all soften edges."""
_TEMPLATES = tuple(
    (shape, radius, blur)
    for blur in _BLURS
    for shape in SHAPES
    for radius in (7.0, 7.5, 8.0, 8.5, 9.0, 13.0, 13.5, 14.0)
)
_LARGE_FROM = 11.0
_STEPS = 4  # sub-pixel positions of a template along each axis
_WINDOW = 32


def parse_picture(picture: Image.Image | NDArray[np.uint8]) -> Scene | None:
    """Read one picture.

    Args:
        picture: RGB of any size (another size than 64×64 is resampled), or uint8 (64, 64, 3).

    Returns:
        The scene with the objects in reading order, `radius` being that of the best template. None
        where the frame shows no published background or an object has no published shape.
    """
    pixels = _to_pixels(picture)
    paper = _background(pixels)
    if paper is None:
        return None
    objects = []
    for ink, cover, mask in _components(pixels, _PAPERS[paper]):
        found = _match(cover, mask)
        if found is None:
            return None
        shape, radius, x, y = found
        size = "large" if radius >= _LARGE_FROM else "small"
        objects.append(Object(shape, _INK_NAMES[ink], size, x, y, radius))
    objects.sort(key=lambda o: (o.y, o.x))
    return Scene(_PAPER_NAMES[paper], tuple(objects))


def parse_pictures(pictures: Iterable[Image.Image | NDArray[np.uint8]]) -> list[Scene | None]:
    """Read many pictures, see `parse_picture`."""
    return [parse_picture(picture) for picture in pictures]


def _to_pixels(picture: Image.Image | NDArray[np.uint8]) -> NDArray[np.float32]:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.convert("RGB")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32)


def _distances(pixels: NDArray[np.float32], palette: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared RGB distance of every pixel to every palette entry, as (..., entries)."""
    squares = _dot(pixels, pixels)[..., None] + _dot(palette, palette)
    result: NDArray[np.float32] = squares - 2 * (pixels @ palette.T)
    return result


def _dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = np.einsum("...c,...c->...", a, b)
    return result


def _background(pixels: NDArray[np.float32]) -> int | None:
    frame = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    distances = _distances(frame, _PAPERS)
    nearest = distances.argmin(-1)
    nearest = nearest[distances.min(-1) < _MAX_PAPER_DISTANCE**2]
    if len(nearest) < len(frame) / 2:
        return None
    return int(np.bincount(nearest, minlength=len(_PAPERS)).argmax())


def _components(
    pixels: NDArray[np.float32], paper: NDArray[np.float32]
) -> Iterable[tuple[int, NDArray[np.float32], NDArray[np.bool_]]]:
    """Colour index, coverage (64, 64) in [0, 1] and mask of every object."""
    away = pixels - paper
    to_paper = _dot(away, away)
    to_inks = _distances(pixels, _INKS)
    ink = to_inks.argmin(-1)
    nearest = to_inks.min(-1)
    plain = (nearest < _MAX_INK_DISTANCE**2) & (nearest < to_paper)
    padded = np.full((IMAGE_SIZE + 2, IMAGE_SIZE + 2), -1, np.int8)
    padded[1:-1, 1:-1] = np.where(plain, ink, -1)
    agree = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.int8)
    for y in range(3):
        for x in range(3):
            agree += padded[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] == ink
    core = plain & (agree >= _MIN_CORE_NEIGHBOURS)
    for colour in np.flatnonzero(np.bincount(ink[core], minlength=len(_INKS))):
        core &= (ink == colour) | (_off_the_line(pixels, paper, _INKS[colour]) > nearest)
    if not core.any():
        return
    near = ndimage.distance_transform_edt(~core, return_distances=False, return_indices=True)
    ink = ink[near[0], near[1]]
    span = _INKS[ink] - paper
    cover = np.clip(_dot(away, span) / _dot(span, span), 0, 1)
    for colour in np.unique(ink):
        labels, count = ndimage.label((cover > 0.5) & (ink == colour))
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        cores = np.bincount(labels.ravel(), core.ravel(), minlength=count + 1)
        for label in range(1, count + 1):
            if areas[label] >= _MIN_AREA and cores[label]:
                yield int(colour), cover, labels == label


def _off_the_line(
    pixels: NDArray[np.float32], paper: NDArray[np.float32], ink: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Squared distance of every pixel to the mixtures of background and ink, as along an edge."""
    span, away = ink - paper, pixels - paper
    share = np.clip((away @ span) / (span @ span), 0, 0.9)
    off = away - share[..., None] * span
    return _dot(off, off)


@lru_cache(maxsize=1)
def _bank() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Templates (shape·radius, steps y, steps x, window, window), centroids (…, xy), masses."""
    fine = 8  # sub-pixels along a pixel, a multiple of the steps
    side = _WINDOW * fine
    ticks = (np.arange(side + fine) + 0.5) / fine - _WINDOW / 2 - 1
    shifts = [fine - step * fine // _STEPS for step in range(_STEPS)]
    bank = []
    for shape, radius, blur in _TEMPLATES:
        points = inside(shape, *np.meshgrid(ticks / radius, ticks / radius))
        for y in shifts:
            for x in shifts:
                part = points[y : y + side, x : x + side].reshape(_WINDOW, fine, _WINDOW, fine)
                cover = part.mean((1, 3), dtype=np.float32)
                bank.append(ndimage.gaussian_filter(cover, blur) if blur else cover)
    templates = np.array(bank).reshape(len(_TEMPLATES), _STEPS, _STEPS, _WINDOW, _WINDOW)
    still = templates[:, 0, 0]
    masses = still.sum((-2, -1))
    at = np.arange(_WINDOW) + 0.5 - _WINDOW / 2
    centroids = np.stack([still.sum(-2) @ at, still.sum(-1) @ at], -1) / masses[:, None]
    return templates, centroids, masses


def _match(
    cover: NDArray[np.float32], mask: NDArray[np.bool_]
) -> tuple[str, float, float, float] | None:
    """Shape, radius, x and y of the best template, or None where none is good enough."""
    templates, centroids, masses = _bank()
    own = np.where(ndimage.binary_dilation(mask), cover, 0)
    total = own.sum()
    ticks = np.arange(IMAGE_SIZE) + 0.5
    middle = np.array([own.sum(0) @ ticks, own.sum(1) @ ticks]) / total
    centres = np.round((middle - centroids) * _STEPS).astype(int)  # in steps, as (template, xy)
    padded = np.pad(own, _WINDOW // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (_WINDOW, _WINDOW))
    # No overlap is larger than the masses allow, so the likely templates are tried first.
    limits = 1 - abs(masses - total) / (masses + total)
    best, best_overlap = -1, _MIN_OVERLAP
    for low, high in ((0.88, 1.01), (_MIN_OVERLAP, 0.88)):
        tried = np.flatnonzero((limits >= max(low, best_overlap)) & (limits < high))
        if not len(tried):
            continue
        column, row = np.clip(centres[tried] // _STEPS, 0, IMAGE_SIZE).T
        shift_x, shift_y = (centres[tried] % _STEPS).T
        theirs = templates[tried, shift_y, shift_x]
        difference = np.abs(windows[row, column] - theirs).sum((-2, -1))
        overlaps = 1 - difference / (total + masses[tried])
        if overlaps.max() > best_overlap:
            best, best_overlap = int(tried[overlaps.argmax()]), float(overlaps.max())
    if best < 0:
        return None
    x, y = centres[best] / _STEPS
    shape, radius, _ = _TEMPLATES[best]
    return shape, radius, float(x), float(y)
