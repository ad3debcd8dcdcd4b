"""One model that sees and draws: any discrete image tokenizer joined with any Hugging Face text LLM.

>>> from unimodal import Unimodal
>>> model = Unimodal.from_pretrained("my-model")
>>> model.caption("cat.png")
>>> [picture] = model.draw("a red circle above a blue square", seed=0)
"""

import importlib
from typing import TYPE_CHECKING, Any

from unimodal.registration import register_when_needed

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

register_when_needed()


def __getattr__(name: str) -> Any:
    """Import a public name on first use: ``import unimodal`` itself loads nothing heavy."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # `merge` is also a module's name: the function wins
    return value
