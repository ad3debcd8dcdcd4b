"""Puts the source of our classes into a model folder, for interpreters that have never heard of us.

``trust_remote_code=True`` makes transformers import Python files that lie beside the weights. It
follows relative imports of flat files only, so every module that is needed is copied under a flat
name (``tokenizer_hf/encoders/conv.py`` becomes ``encoders_conv.py``), and the lines
``from tokenizer_hf.encoders.conv import X`` become ``from .encoders_conv import X``.

The language model and the text tokenizer need none of it: the root's ``config.json`` and
``tokenizer_config.json`` get no ``auto_map``.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.files import atomic_write

AUTO_PROCESSOR = {"AutoProcessor": "processing_unimodal.UnimodalProcessor"}
AUTO_IMAGE_TOKENIZER = {
    "AutoConfig": "configuration_image_tokenizer.ImageTokenizerConfig",
    "AutoModel": "modeling_image_tokenizer.ImageTokenizer",
}
AUTO_IMAGE_PROCESSOR = {
    "AutoImageProcessor": "image_processing_image_tokenizer.ImageTokenizerImageProcessor"
}
_OWN_IMPORT = re.compile(r"^(\s*)from (tokenizer_hf|unimodal)\.([\w.]+) import ", re.MULTILINE)
_OTHER_FORM = re.compile(
    r"^\s*(?:import (?:tokenizer_hf|unimodal)\b|from (?:tokenizer_hf|unimodal) import )",
    re.MULTILINE,
)


def add_remote_code(folder: str | Path) -> None:
    """Make a merged folder loadable with ``trust_remote_code=True`` alone.

    ``AutoProcessor`` finds its class through ``processor_config.json``; without that entry it would
    silently return the text tokenizer.

    Args:
        folder: a merged folder, with ``processor_config.json`` and ``image_tokenizer/``.
    """
    folder = Path(folder)
    copy_sources("unimodal.processing_unimodal", folder)
    _set_auto_map(folder / "processor_config.json", AUTO_PROCESSOR)
    add_image_tokenizer_code(folder / "image_tokenizer")


def add_image_tokenizer_code(folder: str | Path) -> None:
    """The same for an image tokenizer's folder: AutoConfig, AutoModel, AutoImageProcessor.

    ``AutoModel`` with ``subfolder=`` looks for code in the root of a repository; give it the path
    of the folder itself.
    """
    folder = Path(folder)
    copy_sources("tokenizer_hf.modeling_image_tokenizer", folder)
    _set_auto_map(folder / "config.json", AUTO_IMAGE_TOKENIZER)
    _set_auto_map(folder / "preprocessor_config.json", AUTO_IMAGE_PROCESSOR)


def copy_sources(entry: str, folder: Path) -> list[str]:
    """Copy a module of ours, and every module of ours that it imports, into ``folder``.

    Returns:
        The names of the files.

    Raises:
        ConfigurationError: an import that the rewriting does not understand, or two modules with
            the same flat name. Both are mistakes in our own source.
    """
    sources: dict[str, str] = {}
    origin: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        name = _flat_name(module)
        if origin.setdefault(name, module) != module:
            raise ConfigurationError(
                f"{module} and {origin[name]} both become {name}.py; rename one"
            )
        if name in sources:
            continue
        text = _source(module)
        if wrong := _OTHER_FORM.search(text):
            raise ConfigurationError(
                f"{module} has the line {wrong.group().strip()!r}; expected imports of the form "
                "`from tokenizer_hf.module import name`"
            )
        waiting += [f"{package}.{path}" for _, package, path in _OWN_IMPORT.findall(text)]
        sources[name] = _OWN_IMPORT.sub(
            lambda m: f"{m[1]}from .{_flat_name(f'{m[2]}.{m[3]}')} import ", text
        )
    for name, text in sources.items():
        with atomic_write(folder / f"{name}.py") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return sorted(f"{name}.py" for name in sources)


def _flat_name(module: str) -> str:
    return module.partition(".")[2].replace(".", "_")


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigurationError(f"the source of {module} cannot be found; install unimodal again")
    return Path(spec.origin).read_text(encoding="utf-8")


def _set_auto_map(path: Path, auto_map: dict[str, str]) -> None:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    values["auto_map"] = auto_map
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
