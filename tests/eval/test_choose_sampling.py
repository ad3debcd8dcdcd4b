"""Sampling is chosen on prompts that no score uses, and written into the model's folder."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eval import choose_sampling as module
from eval.choose_sampling import VALIDATION_SEED, SamplingGrid, choose_sampling
from eval.shapes.prompts import prompts
from eval.shapes.scene import CATEGORIES
from tests.toy import toy_merged_folder
from tokenizer_hf.errors import CheckpointError, DataError
from unimodal.cli import app
from unimodal.pipeline import Unimodal


def test_the_best_setting_becomes_the_models_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = toy_merged_folder(tmp_path)
    asked: list[dict[str, object]] = []
    plain = Unimodal.draw

    def draw(self: Unimodal, texts: list[str], **settings: object) -> object:
        asked.append({"texts": texts, **settings})
        return plain(self, texts, **settings)  # type: ignore[arg-type]

    # A random model fulfils nothing, so the verdict stands in: guidance 2 at 0.5 is what it likes.
    def judge(pictures: list[object], plan: list[object]) -> list[bool]:
        return [asked[-1]["guidance"] == 2.0 and asked[-1]["temperature"] == 0.5] * len(plan)

    monkeypatch.setattr(Unimodal, "draw", draw)
    monkeypatch.setattr(module, "judge_drawings", judge)
    grid = SamplingGrid(guidance=(1.0, 2.0), temperature=(0.5, 1.0))
    tried = choose_sampling(folder, "board", grid=grid, n=1, progress=False)
    assert [one["score"] for one in tried] == [1.0, 0.0, 0.0, 0.0]
    chosen = {"guidance": 2.0, "temperature": 0.5, "top_k": None, "candidates": 1}
    assert chosen.items() <= tried[0].items() and set(tried[0]["categories"]) == set(CATEGORIES)
    assert json.loads((folder / "processor_config.json").read_text())["draw_settings"] == chosen
    scored = {p.text for c in CATEGORIES for p in prompts(c, 1, 0)}
    wanted = [p.text for c in CATEGORIES for p in prompts(c, 1, VALIDATION_SEED)]
    assert asked[0]["texts"] == wanted and set(wanted) != scored

    monkeypatch.undo()
    model = Unimodal.from_pretrained(folder)
    assert model.processor.draw_settings == chosen
    own = model.draw("a star", seed=1)[0]
    given = model.draw("a star", seed=1, guidance=2.0, temperature=0.5)[0]
    assert own.tobytes() == given.tobytes()


def test_the_command_tries_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = toy_merged_folder(tmp_path)
    monkeypatch.setattr(module, "judge_drawings", lambda pictures, plan: [True] * len(plan))
    words = ["--guidance=1.5", "--temperature=0.5", "--top-k=0", "--top-k=4", "--n=1"]
    words.append("--candidates=2")
    result = CliRunner().invoke(app, ["choose-sampling", str(folder), *words])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("guidance")]
    assert sorted(line.split()[5] for line in lines) == ["4", "all"]
    chosen = json.loads((folder / "processor_config.json").read_text())["draw_settings"]
    assert chosen["guidance"] == 1.5 and chosen["top_k"] in (None, 4)
    assert chosen["candidates"] == 2


def test_a_model_that_draws_nothing_right_keeps_its_settings(tmp_path: Path) -> None:
    folder = toy_merged_folder(tmp_path)
    before = (folder / "processor_config.json").read_bytes()
    grid = SamplingGrid(guidance=(1.0,), temperature=(0.3, 1.0))
    with pytest.raises(DataError, match=r"any of 2 settings.*world of shapes.*draw_settings"):
        choose_sampling(folder, "board", grid=grid, n=1, progress=False)
    assert (folder / "processor_config.json").read_bytes() == before


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"processor_config\.json"):
        choose_sampling(tmp_path, "board")
