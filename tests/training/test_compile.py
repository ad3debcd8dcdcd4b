"""torch.compile: the same losses, with hooks, folded LoRA, frozen parts, an adapter that is off."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy import tiny_llm
from tests.training.test_language_model import metrics, recipe_of, settings_of
from tokenizer_hf.errors import ConfigurationError
from training.language_model import train
from training.trainer import compile_layers, training_arguments


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The traced graphs; they run as they are, so that a difference is one of tracing."""
    torch.compiler.reset()
    found: list[Any] = []
    plain = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    def compile(function: Any, **options: Any) -> Any:
        return plain(function, **{**options, "backend": backend})

    monkeypatch.setattr(torch, "compile", compile)
    return found


@pytest.mark.parametrize("packing", [False, True])
def test_compiled_layers_learn_the_same(
    packing: bool, merged: Path, cache: Path, text: Path, tmp_path: Path, graphs: list[Any]
) -> None:
    """Hooked heads, changing lengths and frozen parts survive the tracing."""
    changes: dict[str, Any] = {
        "optimizer": {"rows_first_steps": 1},
        "loss": {"text_kl": 0.5},
        "lora": {"rank": 4, "fold": True},
        "training": {"max_steps": 3},
    }
    losses = []
    for compiled in (False, True):
        settings = settings_of(merged, cache, text, tmp_path / str(compiled))
        data = {**settings["data"], "packing": packing}
        folder = train(recipe_of(settings, data=data, compile=compiled, **changes))
        losses.append([entry["loss"] for entry in metrics(folder)])
        assert bool(graphs) == compiled
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert len(set(losses[1])) == 3


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_layers_and_lengths_share_one_graph(
    mode: str, merged: Path, cache: Path, text: Path, tmp_path: Path, graphs: list[Any]
) -> None:
    settings = settings_of(merged, cache, text, tmp_path / "out")
    changes: dict[str, Any] = {"lora": {"rank": 4, "fold": True}} if mode == "lora" else {}
    data = {**settings["data"], "packing": True}
    train(recipe_of(settings, mode=mode, data=data, compile=True, **changes))
    assert len(graphs) == 1


def test_a_length_that_equals_another_size_is_no_case_of_its_own(graphs: list[Any]) -> None:
    model = tiny_llm(vocab_size=64)
    width, head = model.config.hidden_size, model.config.head_dim
    compile_layers(model)
    for rows, length in ((2, width), (2, width + 4), (head, head), (3, 9)):
        model(torch.ones(rows, length, dtype=torch.int64), use_cache=False)
    assert len(graphs) == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++: torch.compile needs it on a CPU")
def test_compiled_to_machine_code(
    merged: Path, cache: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no pool of processes
    losses = []
    for compiled in (False, True):
        settings = settings_of(merged, cache, text, tmp_path / str(compiled))
        data = {**settings["data"], "packing": True}
        lora = {"rank": 4, "fold": True}
        folder = train(recipe_of(settings, data=data, lora=lora, compile=compiled, bf16=False))
        losses.append([entry["loss"] for entry in metrics(folder)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_no_compiler(
    merged: Path, cache: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    settings = settings_of(merged, cache, text, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="install one, or set compile to false"):
        train(recipe_of(settings, compile=True))


def test_what_cannot_be_compiled_is_refused(
    merged: Path, cache: Path, text: Path, tmp_path: Path
) -> None:
    settings = settings_of(merged, cache, text, tmp_path)
    with pytest.raises(ConfigurationError, match="compile does not go with mode qlora"):
        recipe_of(settings, mode="qlora", compile=True)
    with pytest.raises(ConfigurationError, match="set by the recipe's field compile"):
        training_arguments(str(tmp_path), False, {"max_steps": 1, "torch_compile": True})
