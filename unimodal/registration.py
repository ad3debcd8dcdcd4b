"""Tells transformers' auto classes about ours, without loading transformers.

``import unimodal`` has to be quick (the command line answers ``--help`` at once), and
``AutoProcessor`` has to know our classes after it. So the registration waits for the modules that
hold the auto classes, and runs as each of them has been imported.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig

    AutoConfig.register(ImageTokenizerConfig.model_type, ImageTokenizerConfig, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModel

    from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer, ImageTokenizerConfig

    AutoModel.register(ImageTokenizerConfig, ImageTokenizer, exist_ok=True)


def _register_image_processor() -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
    from tokenizer_hf.image_processing_image_tokenizer import ImageTokenizerImageProcessor

    AutoImageProcessor.register(
        ImageTokenizerConfig,
        slow_image_processor_class=ImageTokenizerImageProcessor,
        exist_ok=True,
    )


def _register_processor() -> None:
    from transformers.models.auto.processing_auto import AutoProcessor

    from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
    from unimodal.processing_unimodal import UnimodalProcessor

    AutoProcessor.register(ImageTokenizerConfig, UnimodalProcessor, exist_ok=True)


_WHEN_IMPORTED: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.models.auto.image_processing_auto": _register_image_processor,
    "transformers.models.auto.processing_auto": _register_processor,
}


class _AfterImport(MetaPathFinder):
    """Runs a registration right after the module that it waits for."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self.waiting = waiting

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        register = self.waiting.pop(name, None)
        if register is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_when_needed() -> None:
    """Register with the auto classes that are loaded; arrange it for those that are not yet."""
    waiting = dict(_WHEN_IMPORTED)
    for name in [name for name in waiting if name in sys.modules]:
        waiting.pop(name)()
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))
