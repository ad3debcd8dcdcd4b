"""The models that come inside the package: they load, they work from the command line, and they
still score what docs/shipped_models.md says.

The scores stand in ``unimodal/shipped/report.json``, as `unimodal evaluate` wrote them. Here fewer
things are measured, of another seed; each share has to lie within the two 95 % intervals together.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import AutoTokenizer
from typer.testing import CliRunner

from eval.evaluate import _load_base
from eval.reconstruction import agreements
from eval.scores import judge_drawings, score_answers, score_captions, share
from eval.shapes.captions import questions
from eval.shapes.parser import parse_picture
from eval.shapes.prompts import prompts
from eval.shapes.reading import parse_caption
from eval.shapes.render import render
from eval.shapes.requirement import satisfies
from eval.shapes.scene import CATEGORIES, Level, Scene, sample_scene
from tokenizer_hf.errors import CheckpointError, ConfigurationError
from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
from training.data.code_cache import CodeCache
from unimodal.cli import app
from unimodal.merge import find_folder
from unimodal.pipeline import Unimodal
from unimodal.shipped import FOLDER, NAMES, resolve

N = 40
REPORT = json.loads((FOLDER / "report.json").read_text(encoding="utf-8"))
FREE_REPORT = json.loads((FOLDER / "free_report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> Unimodal:
    return Unimodal.from_pretrained("shipped:model")


@pytest.fixture(scope="module")
def free_model() -> Unimodal:
    return Unimodal.from_pretrained("shipped:free_model")


def scenes(count: int, held_out: Any = "exclude", level: Level = "board") -> list[Scene]:
    rng = random.Random(f"shipped-{held_out}")
    return [sample_scene(rng, level, None, held_out) for _ in range(count)]


def agrees(measured: Any, recorded: Any) -> bool:
    """Whether the 95 % intervals of two shares meet."""
    return measured["high"] >= recorded["low"] and recorded["high"] >= measured["low"]


def test_they_are_small_and_hold_safetensors_only() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 30e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert all(resolve(f"shipped:{name}") == str(FOLDER / name) for name in NAMES)
    with pytest.raises(CheckpointError, match="shipped:text_model"):
        resolve("shipped:other")


@pytest.mark.parametrize("level", ["", "free_"])
def test_the_text_models_have_never_seen_a_code(level: str) -> None:
    base = json.loads((find_folder(f"shipped:{level}text_model") / "config.json").read_text())
    merged = json.loads((find_folder(f"shipped:{level}model") / "config.json").read_text())
    assert base["vocab_size"] < merged["vocab_size"]
    assert base["architectures"] == merged["architectures"] == ["Qwen3ForCausalLM"]


def test_evaluate_takes_the_text_model_by_name() -> None:
    assert _load_base("shipped:text_model").config.vocab_size == 640


def run_command(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_that_take_a_folder_take_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    render(scenes(1)[0]).save(pictures / "a.png")
    (pictures / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a picture"}\n')
    options = ("--image-tokenizer", "shipped:image_tokenizer", "--out")
    told = run_command("reconstruct", pictures / "a.png", *options, tmp_path / "out")
    codes = told.strip().split("\t")[2].split()
    run_command("encode", pictures, *options, tmp_path / "codes")
    assert CodeCache(tmp_path / "codes").code_values.tolist() == [int(code) for code in codes]

    asked: list[str] = []

    def check(model: str, *_: Any, **__: Any) -> dict[str, Any]:
        asked.append(model)
        return {}

    monkeypatch.setattr("unimodal.serving.check.check_identical", check)
    run_command("serve-check", "--model", "shipped:model")
    assert asked == [str(FOLDER / "model")]


def test_a_text_model_takes_the_shipped_tokenizer_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "A red circle is above a blue star."}\n' * 4)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    recipe = {
        "tokenizer": "shipped:text_model",
        "output_dir": str(tmp_path / "run"),
        "text": [str(tmp_path / "text.jsonl")],
        "config": {**size, "num_attention_heads": 1, "num_key_value_heads": 1},
        "training": {"max_steps": 1, "per_device_train_batch_size": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "text_model" in run_command("estimate", "--config", tmp_path / "recipe.yaml")
    run_command("train-text-model", "--config", tmp_path / "recipe.yaml")
    vocabularies = [
        AutoTokenizer.from_pretrained(folder).get_vocab()
        for folder in (tmp_path / "run", FOLDER / "text_model")
    ]
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.parametrize(
    "words",
    [
        ["export-vocabulary", "shipped:image_tokenizer"],
        ["export-vocabulary", str(FOLDER / "image_tokenizer")],
        ["choose-sampling", "shipped:model"],
        ["choose-sampling", str(FOLDER / "model")],
    ],
)
def test_nothing_is_written_into_the_package(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise AssertionError("written")

    monkeypatch.setattr("tokenizer_hf.vocabulary.VocabularyExtension.save", write)
    monkeypatch.setattr("unimodal.pipeline.Unimodal.draw", write)
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ConfigurationError)
    assert "comes with this package" in str(result.exception)


def test_the_vocabulary_of_a_shipped_tokenizer_can_be_exported(tmp_path: Path) -> None:
    run_command("export-vocabulary", "shipped:image_tokenizer", "--out", tmp_path / "words")
    assert (tmp_path / "words" / "vocabulary_extension.json").is_file()


@pytest.mark.parametrize(
    ("name", "level", "codes", "least"),
    [("image_tokenizer", "board", 16, 97), ("free_model/image_tokenizer", "free", 64, 97)],
)
@pytest.mark.parametrize("held_out", ["exclude", "only"])
def test_pictures_survive_the_tokenizer(
    held_out: str, name: str, level: Level, codes: int, least: int
) -> None:
    tokenizer = ImageTokenizer.from_pretrained(FOLDER / name)
    unseen = scenes(100, held_out, level)
    pixels = tokenizer.image_processor([np.asarray(render(scene)) for scene in unseen])
    found = tokenizer.encode(pixels["pixel_values"])
    assert found.shape == (100, codes)
    painted = tokenizer.image_processor.postprocess(tokenizer.decode(found))
    assert sum(agreements(painted, unseen)) >= least


@pytest.mark.parametrize("category", CATEGORIES)
def test_it_draws_as_well_as_it_says(model: Unimodal, category: str) -> None:
    plan = prompts(category, N, seed=77)
    drawn = model.draw([prompt.text for prompt in plan], seed=77)
    assert agrees(share(judge_drawings(drawn, plan)), REPORT["draw"][category])


def test_the_free_model_draws_as_well_as_it_says(free_model: Unimodal) -> None:
    """Few prompts: each is the best of 16, as the model's own settings have it."""
    plan = {category: prompts(category, 6, 77, level="free") for category in CATEGORIES}
    drawn = free_model.draw([p.text for some in plan.values() for p in some], seed=77)
    for first, (category, some) in enumerate(plan.items()):
        judged = judge_drawings(drawn[6 * first : 6 * first + 6], some)
        assert agrees(share(judged), FREE_REPORT["draw"][category]), category


@pytest.mark.parametrize("level", ["board", "free"])
def test_they_caption_and_answer_as_well_as_they_say(
    level: Level, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue({"board": "model", "free": "free_model"}[level])
    report = {"board": REPORT, "free": FREE_REPORT}[level]
    shown = scenes(2 * N, level=level)
    pictures = [render(scene) for scene in shown]
    captions = score_captions(model.caption(pictures), shown)
    assert agrees(captions["exact"], report["caption"]["exact"])
    rng = random.Random(0)
    pairs = [questions(scene, rng, 1)[0] for scene in shown]
    talks = []
    for picture, (question, _) in zip(pictures, pairs, strict=True):
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        talks.append([{"role": "user", "content": parts}])
    replies = model.chat(talks, images="never", max_new_tokens=8)
    answers = score_answers([r.text for r in replies], [answer for _, answer in pairs])
    assert agrees(answers, report["answers"])


def test_draw_and_caption_need_no_model_name(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "unimodal.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    file = tmp_path / "star.png"
    wanted = "a red star and a blue ring"
    run("draw", wanted, "--seed", "1", "--out", str(file))
    requirement = parse_caption(wanted)
    assert requirement is not None
    assert satisfies(parse_picture(Image.open(file)), requirement)
    caption = parse_caption(run("caption", str(file)).split("\t")[1])
    assert caption is not None and satisfies(parse_picture(Image.open(file)), caption)
