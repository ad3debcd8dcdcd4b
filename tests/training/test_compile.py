"""torch.compile: the same losses, with hooks, folded LoRA, frozen parts, an adapter that is off."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_language_model import metrics, recipe_of, settings_of
from tokenizer_hf.errors import ConfigurationError
from training.language_model import train
from training.trainer import training_arguments


@pytest.mark.parametrize("packing", [False, True])
def test_compiled_layers_learn_the_same(
    packing: bool,
    merged: Path,
    cache: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hooked heads, changing lengths and frozen parts survive the tracing (the eager backend runs
    the traced graph as it is, so that a difference is one of tracing)."""
    torch.compiler.reset()
    graphs: list[Any] = []
    plain = torch.compile

    def compile(function: Any, **options: Any) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        return plain(function, **{**options, "backend": backend})

    monkeypatch.setattr(torch, "compile", compile)
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


def test_what_cannot_be_compiled_is_refused(
    merged: Path, cache: Path, text: Path, tmp_path: Path
) -> None:
    settings = settings_of(merged, cache, text, tmp_path)
    with pytest.raises(ConfigurationError, match="compile does not go with mode qlora"):
        recipe_of(settings, mode="qlora", compile=True)
    with pytest.raises(ConfigurationError, match="set by the recipe's field compile"):
        training_arguments(str(tmp_path), False, {"max_steps": 1, "torch_compile": True})
