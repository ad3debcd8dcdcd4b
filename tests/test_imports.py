"""The house's levels: imports go down only, and the packages load without the heavy libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = ("tokenizer_hf", "unimodal", "eval", "training")  # each may import those before it
ROOF = Path("unimodal/cli.py")  # may import all four, inside its commands
HEAVY = ("vllm", "bitsandbytes", "gradio", "datasets", "matplotlib", "torchvision")


def imports(path):
    """(module, line, at the top) of every import in a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield node.module, node.lineno, id(node) in top


def sources():
    return [path.relative_to(ROOT) for package in LEVELS for path in (ROOT / package).rglob("*.py")]


def test_imports_go_down_only():
    files = sources()
    assert len(files) > 20
    wrong = []
    for path in files:
        level = LEVELS.index(path.parts[0])
        for module, line, _ in imports(path):
            package = module.partition(".")[0]
            if package in LEVELS and LEVELS.index(package) > level and path != ROOF:
                wrong.append(f"{path}:{line} imports {module}")
            if package == "torchvision":
                wrong.append(f"{path}:{line} imports torchvision; expected Pillow and numpy")
    assert wrong == []


def test_the_roof_imports_inside_its_commands():
    wrong = [
        f"{ROOF}:{line}: {m}" for m, line, top in imports(ROOF) if top and m.startswith(LEVELS)
    ]
    assert wrong == []


def loaded_by(code):
    """Names of the modules that a fresh interpreter has loaded after ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_packages_load_nothing_heavy():
    loaded = loaded_by("import tokenizer_hf, unimodal, eval, training, unimodal.cli")
    assert loaded & {*HEAVY, "torch", "transformers", "peft"} == set()


@pytest.mark.parametrize("first", ["unimodal", "transformers"])
def test_public_classes_stay_light_and_auto_classes_know_them(first):
    second = "transformers" if first == "unimodal" else "unimodal"
    code = f"""
import {first}, {second}
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
from transformers.models.auto.processing_auto import processor_class_from_name
from tokenizer_hf import ImageTokenizer, ImageTokenizerConfig
from unimodal import Reply, Unimodal, UnimodalProcessor, merge
assert processor_class_from_name("UnimodalProcessor") is UnimodalProcessor
assert type(AutoConfig.for_model("unimodal_image_tokenizer")) is ImageTokenizerConfig
assert AutoModel._model_mapping[ImageTokenizerConfig] is ImageTokenizer
assert callable(merge)
"""
    assert loaded_by(code) & set(HEAVY) == set()
