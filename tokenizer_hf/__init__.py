"""Pixels <-> codes <-> token ids: an image tokenizer that is a Hugging Face model."""

import importlib
from typing import TYPE_CHECKING, Any

from tokenizer_hf.registration import register_auto_classes

if TYPE_CHECKING:
    from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
    from tokenizer_hf.image_processing_image_tokenizer import (
        ImageTokenizerImageProcessor,
        open_image,
    )
    from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer, ImageTokenizerOutput

_HOME = {
    "ImageTokenizer": "modeling_image_tokenizer",
    "ImageTokenizerConfig": "configuration_image_tokenizer",
    "ImageTokenizerImageProcessor": "image_processing_image_tokenizer",
    "ImageTokenizerOutput": "modeling_image_tokenizer",
    "open_image": "image_processing_image_tokenizer",
}

__all__ = [
    "ImageTokenizer",
    "ImageTokenizerConfig",
    "ImageTokenizerImageProcessor",
    "ImageTokenizerOutput",
    "open_image",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: ``import tokenizer_hf`` itself loads nothing heavy."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


register_auto_classes()
