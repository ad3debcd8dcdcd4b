"""A text model from scratch: it learns, it is a plain folder, it can be merged and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.toy import qwen_tokenizer, tiny_image_tokenizer
from tokenizer_hf.errors import CheckpointError, ConfigurationError, DataError
from training.recipes import TextModelRecipe, build_recipe
from training.text_model import train_text_model
from unimodal.merge import merge


@pytest.fixture
def settings(text: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of 30 steps for a model of width 32."""
    qwen_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return {
        "tokenizer": str(tmp_path / "tokenizer"),
        "output_dir": str(tmp_path / "run"),
        "text": [str(text)],
        "config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
        "optimizer": {"learning_rate": 1e-2},
        "training": {
            "max_steps": 30,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "logging_steps": 5,
            "disable_tqdm": True,
        },
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_it_learns_and_can_be_merged(
    optimizer: str, model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"model_type": model_type, "optimizer": {"name": optimizer, "learning_rate": 1e-2}}
    folder = train_text_model(build_recipe(TextModelRecipe, settings))
    losses = [
        entry["loss"]
        for entry in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if "loss" in entry
    ]
    assert losses[-1] < losses[0] - 2.5
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == qwen_tokenizer().chat_template
    assert model.config.model_type == model_type
    assert model.config.eos_token_id == tokenizer.eos_token_id
    tiny_image_tokenizer().save_pretrained(tmp_path / "image_tokenizer")
    merged = merge(folder, tmp_path / "image_tokenizer", tmp_path / "merged")
    assert (merged / "processor_config.json").is_file()


def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    for changes, message in (
        ({"model_type": "qwen99"}, "qwen99"),
        ({"config": {"vocab_size": 5}}, "comes from the tokenizer"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            train_text_model(build_recipe(TextModelRecipe, {**settings, **changes}), resume=False)
    with pytest.raises(CheckpointError, match="no text tokenizer"):
        train_text_model(build_recipe(TextModelRecipe, {**settings, "tokenizer": "/nowhere"}))
    with pytest.raises(DataError, match="no such text file"):
        changed = {**settings, "text": ["/nowhere.jsonl"]}
        train_text_model(build_recipe(TextModelRecipe, changed), resume=False)


def test_it_goes_on_from_another_model(settings: dict[str, Any], tmp_path: Path) -> None:
    first = train_text_model(build_recipe(TextModelRecipe, settings))
    more = {name: settings[name] for name in ("text", "optimizer", "training")}
    more |= {"start": str(first), "output_dir": str(tmp_path / "second")}
    second = train_text_model(build_recipe(TextModelRecipe, more))
    losses = [
        [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
        for lines in ((one / "metrics.jsonl").read_text().splitlines() for one in (first, second))
    ]
    assert losses[1][0] < losses[0][-1] < losses[0][0] / 2
    models = [AutoModelForCausalLM.from_pretrained(one) for one in (first, second)]
    assert models[0].config.to_diff_dict() == models[1].config.to_diff_dict()
    tokenizers = [(one / "tokenizer.json").read_bytes() for one in (first, second)]
    assert tokenizers[0] == tokenizers[1]
    # Not a run of the same recipe on other weights.
    shorter = {**settings, "training": {**settings["training"], "max_steps": 1}}
    train_text_model(build_recipe(TextModelRecipe, shorter), resume=False)
    with pytest.raises(ConfigurationError, match="start"):
        train_text_model(build_recipe(TextModelRecipe, more))


def test_what_it_starts_from_must_be_given_and_there(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    more = {"output_dir": str(tmp_path / "run"), "text": settings["text"]}
    with pytest.raises(ConfigurationError, match="give a tokenizer, or a text model"):
        build_recipe(TextModelRecipe, more)
    with pytest.raises(ConfigurationError, match="leave tokenizer and config out"):
        build_recipe(TextModelRecipe, {**settings, "start": "shipped:text_model"})
    with pytest.raises(CheckpointError, match="there is no folder /nowhere"):
        train_text_model(build_recipe(TextModelRecipe, {**more, "start": "/nowhere"}))
    with pytest.raises(CheckpointError, match="no text model to start from"):
        only_tokenizer = settings["tokenizer"]
        train_text_model(build_recipe(TextModelRecipe, {**more, "start": only_tokenizer}))
