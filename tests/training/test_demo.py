"""The whole walk in miniature: every stage runs, a killed walk goes on, a changed one stops."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.training.conftest import write_pictures
from tokenizer_hf.errors import ConfigurationError
from training.demo import DemoRecipe, _Walk, load_demo_recipe, run_demo
from training.recipes import TextModelRecipe, build_recipe
from unimodal.cli import app

TINY = {
    "shapes": {"n": 96, "level": "board", "captions_per_picture": 2, "validation": 24},
    "image_tokenizer": {
        "tokenizer": {
            "patch_local": True,
            "base_channels": 16,
            "channel_multiplier": [1, 1, 2, 4],
            "num_res_blocks": 1,
            "codebook_size": 256,
            "codebook_dim": 32,
        },
        "start": "principal_components",
        "max_steps": 4,
        "batch_size": 8,
    },
    "text_tokenizer": {"vocab_size": 400},
    "text_model": {
        "model_type": "qwen3",
        "config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "max_position_embeddings": 256,
        },
        "training": {"max_steps": 4, "per_device_train_batch_size": 4},
    },
    "merge": {"row_init": "meaning", "caption_instruction": "describe"},
    "lora": {
        "lora": {"rank": 4},
        "training": {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4},
    },
    "evaluate": {"n": 3, "pictures": 6, "texts": 8},
    "draw": ["a red circle"],
    "serve_check": None,
}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def walk(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A walk that stopped in the middle and was started again from the command line."""
    out = tmp_path_factory.mktemp("walk") / "demo"
    run_demo(load_demo_recipe(recipe_file), out, stop_after="merge")
    before = json.loads((out / "demo.json").read_text())["seconds"]
    command = [sys.executable, "-m", "unimodal.cli", "demo", "--config", str(recipe_file)]
    done = subprocess.run(
        [*command, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "merge: done before" in done.stdout
    assert "examples by direction: draw " in done.stderr
    assert "perplexity of the base" in done.stdout  # the result table
    after = json.loads((out / "demo.json").read_text())["seconds"]
    assert {name: after[name] for name in before} == before
    return out


def test_report_holds_what_the_issue_names(walk: Path) -> None:
    report = json.loads((walk / "report.json").read_text())
    for name in ("single", "two", "counting", "colours", "position", "binding", "caption"):
        for section in ("draw", "draw_held_out"):
            assert report[section][name].keys() >= {"score", "n", "low", "high"}
            assert report[section][name]["n"] == 3
    assert report["reconstruction"].keys() >= {"psnr", "parse_agreement", "codes_used"}
    assert report["caption"].keys() >= {"exact", "object_f1", "colour", "relation", "count"}
    assert report["text"].keys() >= {"perplexity_base", "perplexity_tuned", "kl"}
    assert report["spans"]["generated"] > 0 and report["spans"]["malformed"] == 0
    assert {"image_tokenizer", "text_model", "lora", "evaluate"} <= report["seconds"].keys()
    assert report["peak_rss_bytes"] > 10**8
    assert report["environment"]
    page = (walk / "report.html").read_text()
    assert "data:image/png;base64," in page and 'src="http' not in page
    assert (walk / "drawings" / "00.png").read_bytes().startswith(b"\x89PNG")


def test_untrained_principal_components_reconstruct(walk: Path) -> None:
    metrics = json.loads((walk / "image_tokenizer" / "metrics.json").read_text())
    assert metrics["psnr"] > 18  # a random start is at about 10 dB after 4 steps


def test_another_seed_in_the_same_folder_is_refused(recipe_file: Path, walk: Path) -> None:
    with pytest.raises(ConfigurationError, match="seed"):
        run_demo(load_demo_recipe(recipe_file), walk, seed=1)


@pytest.mark.parametrize(
    "name", ["demo", "demo-from-scratch", "emoji", "free", "gpu", "shipped", "shipped-free"]
)
def test_recipes_of_the_package_load(name: str) -> None:
    recipe = load_demo_recipe(name)
    assert (recipe.shapes is None) == (name == "emoji")
    assert recipe.lora


def test_what_is_measured_comes_from_the_validation_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = tmp_path / "both"  # as a hub data set has it: one name, two splits
    write_pictures(both / "train", 6)
    write_pictures(both / "validation", 3)
    recipe = DemoRecipe(
        pictures={"train": str(both), "validation": str(both)},
        text={"train": [], "validation": []},
    )
    walk = _Walk(recipe, tmp_path / "walk", seed=0)
    seen: dict[str, int] = {}

    def evaluate(model: str, llm: str, held_out: Any, *_: Any, **named: Any) -> None:
        seen.update(held_out=len(held_out), train=len(list(named["train_pictures"])))

    monkeypatch.setattr("eval.evaluate.evaluate", evaluate)
    walk.evaluate()
    assert seen == {"held_out": 3, "train": 6}
    assert len(walk.serve_prompts()) == 3


def test_sampling_is_chosen_for_the_shapes_only() -> None:
    with pytest.raises(ConfigurationError, match="choose_sampling without shapes"):
        DemoRecipe(pictures={"train": "a", "validation": "b"}, choose_sampling={"n": 4})


def test_the_printed_commands_do_what_the_stages_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """choose-sampling and serve-check, whose settings stand in no file."""
    calls: list[Any] = []

    def choose(folder: Any, level: str, *, grid: Any, n: int, seed: int) -> list[dict[str, Any]]:
        lists = {name: list(values) for name, values in dataclasses.asdict(grid).items()}
        calls.append((str(folder), level, lists, n, seed))
        chosen = {"guidance": 1.0, "temperature": 0.3, "top_k": None, "candidates": 4}
        return [{**chosen, "score": 1.0}]

    def check(folder: Any, prompts: list[str], *_: Any, **named: Any) -> dict[str, Any]:
        calls.append((str(folder), prompts, named.get("guidance", 1.0), str(named["out"])))
        return {"identical": 0, "prompts": 0}

    monkeypatch.setattr("eval.choose_sampling.choose_sampling", choose)
    monkeypatch.setattr("unimodal.serving.check.check_identical", check)
    monkeypatch.setattr("eval.evaluate.update_report", lambda *_: None)
    grid = {"guidance": [1.0, 2.5], "temperature": [0.3], "top_k": [None, 4], "candidates": [1, 4]}
    recipe = DemoRecipe(
        shapes={"n": 8, "level": "free"},
        choose_sampling={"grid": grid, "n": 3},
        serve_check={"prompts": 3},
    )
    walk = _Walk(recipe, tmp_path / "walk", seed=5)
    pictures = write_pictures(tmp_path / "walk" / "world" / "validation", 4)
    lines = (pictures / "metadata.jsonl").read_text()
    (pictures / "metadata.jsonl").write_text(lines.replace("A red", 'It\'s \\"a\\" red'))
    for stage in walk.measuring_stages():
        if stage.name in ("choose_sampling", "vllm"):
            stage.run()
            result = CliRunner().invoke(app, shlex.split(stage.printed())[1:])
            assert result.exit_code == 0, result.output
    assert len(calls) == 4
    assert calls[0] == calls[1] and calls[0][1:] == ("free", grid, 3, 5)
    assert calls[2] == calls[3] and 'It\'s "a" red circle.' in calls[2][1]


def test_a_text_model_that_goes_on_brings_its_text_tokenizer(tmp_path: Path) -> None:
    def stages(**settings: Any) -> list[str]:
        walk = _Walk(DemoRecipe(shapes={"n": 8}, **settings), tmp_path / "walk", seed=5)
        return [stage.name for stage in walk.stages()]

    anew, on = stages(), stages(text_model={"start": "shipped:text_model"})
    given = stages(llm="shipped:text_model")
    assert [name for name in anew if name not in on] == ["text_tokenizer"]
    assert [name for name in on if name not in given] == ["text_model"]
    recipe = DemoRecipe(shapes={"n": 8}, text_model={"start": "shipped:text_model"})
    settings = _Walk(recipe, tmp_path / "walk", seed=5).text_model_recipe()
    assert build_recipe(TextModelRecipe, settings).tokenizer is None
    own = DemoRecipe(shapes={"n": 8}, text_model={"tokenizer": "/my/tokenizer"})
    assert _Walk(own, tmp_path / "walk", seed=5).text_model_recipe()["tokenizer"] == "/my/tokenizer"
