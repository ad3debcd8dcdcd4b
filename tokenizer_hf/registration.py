"""Make transformers' Auto classes know our classes, without importing transformers before its time.

``import tokenizer_hf`` has to be light (the command line starts with it), and after it
``AutoModel.from_pretrained(folder)`` has to work, whether transformers was imported before or is
imported later. So each registration waits until transformers has loaded the module that keeps the
mapping.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds nothing itself: the other finders find; it wraps the loader of awaited modules."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callable[[], None]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.callbacks:
            return None
        callbacks = self.callbacks.pop(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            for callback in callbacks:
                callback()

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


_waiting = _Waiting()


def after_import(module: str, callback: Callable[[], None]) -> None:
    """Call ``callback`` once ``module`` is imported: now, or right after its import.

    Args:
        module: the full name of a module, for example ``"transformers.models.auto.modeling_auto"``.
        callback: takes nothing; imports what it needs itself.
    """
    if module in sys.modules:
        callback()
        return
    _waiting.callbacks.setdefault(module, []).append(callback)
    if _waiting not in sys.meta_path:
        sys.meta_path.insert(0, _waiting)


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig

    AutoConfig.register(ImageTokenizerConfig.model_type, ImageTokenizerConfig, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModel

    from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer

    AutoModel.register(ImageTokenizer.config_class, ImageTokenizer, exist_ok=True)


def _register_image_processor() -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
    from tokenizer_hf.image_processing_image_tokenizer import ImageTokenizerImageProcessor

    AutoImageProcessor.register(
        ImageTokenizerConfig,
        image_processor_classes={"pil": ImageTokenizerImageProcessor},
        exist_ok=True,
    )


def register_auto_classes() -> None:
    """Register the image tokenizer with AutoConfig, AutoModel and AutoImageProcessor."""
    auto = "transformers.models.auto"
    after_import(f"{auto}.configuration_auto", _register_config)
    after_import(f"{auto}.modeling_auto", _register_model)
    after_import(f"{auto}.image_processing_auto", _register_image_processor)
