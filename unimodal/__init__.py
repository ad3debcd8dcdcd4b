"""One model that sees and draws: any discrete image tokenizer, any Hugging Face text LLM.

>>> from unimodal import Unimodal
>>> model = Unimodal.from_pretrained("my-model")
>>> model.caption("cat.png")
>>> [picture] = model.draw("a red circle above a blue square", seed=0)
"""

import importlib
from typing import TYPE_CHECKING, Any

from tokenizer_hf.registration import after_import

if TYPE_CHECKING:
    from unimodal.merge import merge
    from unimodal.pipeline import Reply, Unimodal
    from unimodal.processing_unimodal import UnimodalProcessor

_HOME = {
    "Reply": "pipeline",
    "Unimodal": "pipeline",
    "UnimodalProcessor": "processing_unimodal",
    "merge": "merge",
}

__all__ = ["Reply", "Unimodal", "UnimodalProcessor", "merge"]


def _register_processor() -> None:
    from transformers.models.auto.processing_auto import AutoProcessor

    from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
    from unimodal.processing_unimodal import UnimodalProcessor

    AutoProcessor.register(ImageTokenizerConfig, UnimodalProcessor, exist_ok=True)


after_import("transformers.models.auto.processing_auto", _register_processor)


def __getattr__(name: str) -> Any:
    """Import a public name on first use: ``import unimodal`` itself loads nothing heavy."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # `merge` is also a module's name: the function wins
    return value
