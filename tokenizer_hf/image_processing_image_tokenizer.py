"""Pictures <-> pixel_values: whatever comes in, RGB of the tokenizer's size goes on."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from tokenizer_hf.errors import ConfigurationError, ImageError

ImageSource = str | Path | bytes | np.ndarray | Image.Image

MAX_PIXELS = 64 * 1024 * 1024
RESIZE_MODES = ("shortest_edge_crop", "squash", "pad")
RESAMPLING = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")
}


def open_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture of any usual kind as RGB, upright.

    EXIF orientation is applied; transparency is laid over white; grey, palette, bilevel, CMYK and
    other modes are converted; 16-bit greys and floats keep their full range (the top 8 bits); of
    an animated picture the first frame is taken, with a warning.

    Args:
        source: a path, the bytes of a file, a PIL picture, or a uint8 array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4).
        max_pixels: refuse pictures with more pixels than that, before they are decoded.

    Returns:
        A PIL picture in mode RGB that does not depend on the file any more.

    Raises:
        ImageError: not a picture, a damaged one, or one with too many pixels. The message names it.
    """
    name = _describe(source)
    try:
        picture = _load(source, name)
        if picture.width * picture.height > max_pixels:
            raise ImageError(
                f"{name} has {picture.width} × {picture.height} pixels; expected at most "
                f"{max_pixels} pixels; make it smaller, or raise max_pixels"
            )
        if getattr(picture, "n_frames", 1) > 1:
            warnings.warn(
                f"{name} has {picture.n_frames} frames; only the first one is used",  # type: ignore[attr-defined]
                UserWarning,
                stacklevel=2,
            )
            picture.seek(0)
        return _to_rgb(ImageOps.exif_transpose(picture))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not a picture in a format that Pillow reads; "
            "expected PNG, JPEG, WebP, GIF or the like"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has too many pixels: {error}; make it smaller") from error
    except Exception as error:  # Pillow's readers raise errors of many types on damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ImageError(f"{name} cannot be read as a picture: {reason}; is it damaged?") from error


def _describe(source: Any) -> str:
    if isinstance(source, str | Path):
        return f"picture {str(source)!r}"
    if isinstance(source, bytes):
        return f"picture of {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"array of shape {source.shape} and type {source.dtype}"
    if isinstance(source, Image.Image) and getattr(source, "filename", None):
        return f"picture {source.filename!r}"  # type: ignore[attr-defined]
    return f"a {type(source).__name__}"


def _load(source: Any, name: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str | Path):
        return Image.open(io.BytesIO(Path(source).read_bytes()))
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    if isinstance(source, np.ndarray):
        if source.ndim == 3 and source.shape[2] == 1:
            source = source[:, :, 0]
        fits = source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))
        if source.dtype != np.uint8 or not fits or 0 in source.shape:
            raise ImageError(f"{name} came; expected uint8 of shape (H, W), (H, W, 3) or (H, W, 4)")
        return Image.fromarray(np.ascontiguousarray(source))
    raise ImageError(f"{name} came; expected a path, bytes, a PIL picture or a uint8 array")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        picture = _to_8_bits(picture)
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    if picture.mode == "RGB":
        picture.load()
        return picture.copy()
    return picture.convert("RGB")


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits: [0, 65535] is the full range; floats: [0, 1], or [0, 255]."""
    values = np.asarray(picture).astype(np.float64)
    if picture.mode == "F":
        full = 1.0 if values.max(initial=0) <= 1 else 255.0
    else:
        full = 255.0 if picture.mode == "I" and values.max(initial=0) <= 255 else 65535.0
    return Image.fromarray((values.clip(0, full) / full * 255).round().astype(np.uint8))


class ImageTokenizerImageProcessor(BaseImageProcessor):
    """Pictures -> ``pixel_values``, and back. Saved as ``preprocessor_config.json``.

    Args:
        size: height and width that come out, pixels.
        resize_mode: ``"shortest_edge_crop"`` (scale the shorter edge, cut the middle out),
            ``"squash"`` (scale both edges, the proportions change) or ``"pad"`` (scale the longer
            edge, fill up).
        resample: ``"nearest"``, ``"bilinear"``, ``"bicubic"`` or ``"lanczos"``.
        pad_colour: RGB, 0 to 255, for ``"pad"``.
        max_pixels: pictures with more pixels are refused.

    Raises:
        ConfigurationError: an unknown mode or filter, or sizes that cannot be.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        size: int = 64,
        resize_mode: str = "shortest_edge_crop",
        resample: str = "lanczos",
        pad_colour: Sequence[int] = (255, 255, 255),
        max_pixels: int = MAX_PIXELS,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if resize_mode not in RESIZE_MODES:
            raise ConfigurationError(
                f"resize_mode is {resize_mode!r}; expected one of {', '.join(RESIZE_MODES)}"
            )
        if resample not in RESAMPLING:
            raise ConfigurationError(
                f"resample is {resample!r}; expected one of {', '.join(RESAMPLING)}"
            )
        if size < 1 or max_pixels < 1:
            raise ConfigurationError(
                f"size is {size} and max_pixels {max_pixels}; expected at least 1"
            )
        self.size = size
        self.resize_mode = resize_mode
        self.resample = resample
        self.pad_colour = list(pad_colour)
        self.max_pixels = max_pixels

    def __call__(  # type: ignore[override]
        self,
        images: ImageSource | Sequence[ImageSource],
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn one picture or a list into ``pixel_values``.

        Args:
            images: what :func:`open_image` takes, or a list of it.
            return_tensors: ``"pt"`` or ``"np"``.

        Returns:
            ``pixel_values`` (B, 3, size, size) float32 in [-1, 1].

        Raises:
            ImageError: as :func:`open_image`.
        """
        several: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        if not several:
            raise ImageError("an empty list of pictures came; expected at least one")
        pixels = np.stack([np.asarray(self.fit(image)) for image in several])
        return BatchFeature({"pixel_values": to_pixel_values(pixels)}, tensor_type=return_tensors)

    preprocess = __call__

    def fit(self, image: ImageSource) -> Image.Image:
        """Open one picture and bring it to size × size, RGB."""
        picture = open_image(image, self.max_pixels)
        filter_ = RESAMPLING[self.resample]
        size = (self.size, self.size)
        if picture.size == size:
            return picture
        if self.resize_mode == "squash":
            return picture.resize(size, filter_)
        if self.resize_mode == "pad":
            # ImageOps.pad would give a very long picture a side of 0 pixels, which resize refuses.
            shrink = self.size / max(picture.size)
            width, height = (max(1, round(side * shrink)) for side in picture.size)
            padded = Image.new("RGB", size, tuple(self.pad_colour))
            corner = round((self.size - width) * 0.5), round((self.size - height) * 0.5)
            padded.paste(picture.resize((width, height), filter_), corner)
            return padded
        return ImageOps.fit(picture, size, filter_)

    def postprocess(self, pixel_values: Tensor) -> list[Image.Image]:
        """Turn ``pixel_values`` (B, 3, H, W), any float dtype, in [-1, 1] into RGB pictures."""
        return [Image.fromarray(pixels) for pixels in to_uint8(pixel_values)]


def to_pixel_values(pixels: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_uint8(pixel_values: Tensor) -> np.ndarray:
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), rounded: the exact inverse."""
    scaled = pixel_values.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
