"""Which caption fits: trials, ranks, the model's own likelihood, the small classifier."""

import json
import logging
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eval.evaluate import Captioned, EvaluationSettings, evaluate
from eval.report import write_report
from eval.retrieval import (
    CaptionLikelihood,
    Trial,
    WordClassifier,
    make_trials,
    own_likelihood,
    score_retrieval,
    train_word_classifier,
    words_of,
)
from tests.toy import toy_merged_folder
from tokenizer_hf.errors import ConfigurationError, DataError
from unimodal.cli import main
from unimodal.pipeline import Unimodal

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220)}


def picture(colour: str, rng: random.Random, side: int = 16) -> Image.Image:
    """A square of a colour somewhere on white."""
    image = Image.new("RGB", (side, side), "white")
    left, top = rng.randrange(side // 2), rng.randrange(side // 2)
    image.paste(COLOURS[colour], (left, top, left + side // 2, top + side // 2))
    return image


def coloured(number: int, seed: int) -> list[tuple[Image.Image, list[str]]]:
    rng = random.Random(seed)
    names = [rng.choice(list(COLOURS)) for _ in range(number)]
    return [(picture(name, rng), [f"{name} square", f"a {name} thing"]) for name in names]


# --- trials and ranks -----------------------------------------------------------------------------


def test_trials_hold_the_true_caption_and_none_else_that_is_true() -> None:
    captions = [[f"name {i}", f"other {i}", "name 0" if i < 5 else "x"] for i in range(40)]
    captions[7] = ["Name  3"]  # equal to another but for case and white space
    trials = make_trials(captions, seed=1)
    assert len(trials) == 40 and {len(trial.captions) for trial in trials} == {20}
    for own, trial in zip(captions, trials, strict=True):
        assert trial.captions[trial.true] == own[0]
        plain = [" ".join(text.lower().split()) for text in trial.captions]
        assert len(set(plain)) == 20
        mine = {" ".join(text.lower().split()) for text in own}
        assert [text for text in plain if text in mine] == [plain[trial.true]]
    assert len({trial.true for trial in trials}) > 5
    assert trials == make_trials(captions, seed=1) != make_trials(captions, seed=2)


def test_few_pictures_make_smaller_trials() -> None:
    trials = make_trials([["a"], ["b"], ["c", "a"]], seed=0)  # "c" has no foreign but "b"
    assert [sorted(trial.captions) for trial in trials][2] == ["b", "c"]
    assert {len(trial.captions) for trial in trials} == {2}
    with pytest.raises(DataError, match="at least one caption that is not its own"):
        make_trials([["a"], ["A"]], seed=0)


def test_ranks_of_a_judge_that_is_known() -> None:
    trials = [Trial(("a", "b", "c", "d"), true) for true in (0, 1, 2, 3)]
    shown = [Image.new("RGB", (2, 2))] * 4
    values = torch.tensor([0.5, 3.0, 2.0, -1.0])  # ranks 3, 1, 2, 4
    found = score_retrieval(lambda _, captions: values[: len(captions)], shown, trials)
    assert found["first"]["score"] == 0.25 and found["first"]["n"] == 4
    assert found["reciprocal_rank"]["score"] == pytest.approx((1 / 3 + 1 + 1 / 2 + 1 / 4) / 4)
    assert found["reciprocal_rank"]["low"] < found["reciprocal_rank"]["high"]


def test_a_judge_that_knows_nothing_is_right_by_chance() -> None:
    trials = make_trials([[f"name {i}"] for i in range(2000)], seed=0)
    shown = [Image.new("RGB", (2, 2))] * 2000
    first = score_retrieval(lambda _, c: torch.zeros(len(c)), shown, trials)["first"]
    assert first["low"] < 0.05 < first["high"] and first["score"] > 0


# --- the model's own likelihood -------------------------------------------------------------------


def test_a_caption_that_is_likely_anyway_does_not_win() -> None:
    """Raw likelihood would choose "thing" for every picture; the difference never does."""
    shown = {name: Image.new("RGB", (2, 2), name) for name in COLOURS}

    def log_likelihood(image: Image.Image, captions: Sequence[str]) -> torch.Tensor:
        [name] = [n for n, one in shown.items() if one is image]
        table = {f"a very long caption of {n}": -60.0 + 2 * (n == name) for n in COLOURS}
        return torch.tensor([{**table, "thing": -1.0}[text] for text in captions])

    texts = [*(f"a very long caption of {n}" for n in COLOURS), "thing"]
    trials = [Trial(tuple(texts), i) for i in range(3)]
    pictures = list(shown.values())
    assert score_retrieval(log_likelihood, pictures, trials)["first"]["score"] == 0
    judge = own_likelihood(log_likelihood, texts, pictures, seed=0)
    assert score_retrieval(judge, pictures, trials)["first"]["score"] == 1
    values = judge(pictures[0], texts)
    likely = math.log((math.e**2 + 2) / 3)
    assert values.tolist() == pytest.approx([2 - likely, -likely, -likely, 0], abs=1e-4)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval")
    toy_merged_folder(folder)
    return folder


def test_likelihood_is_that_of_a_plain_forward(parts: Path) -> None:
    """With the end of the turn, of captions of many lengths, over more rows than one forward."""
    model = Unimodal.from_pretrained(parts / "merged")
    image = picture("red", random.Random(0))
    captions = [*(f"a {'very ' * i}red star" for i in range(70)), "é – 3"]
    found = CaptionLikelihood(model)(image, captions)
    assert found.shape == (71,) and found.dtype == torch.float32
    for index in (0, 1, 37, 69, 70):
        turn = {"role": "assistant", "content": captions[index]}
        rendered = model.processor.render([*model.processor.caption_messages(image), turn])
        assert rendered.learnt[0].direction == "image-to-text"
        ids = torch.tensor([rendered.input_ids])
        with torch.inference_mode():
            log_TV = model.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(rendered.labels[1:])
        learnt = labels != -100
        expected = log_TV[learnt].gather(-1, labels[learnt][:, None]).sum().item()
        assert found[index].item() == pytest.approx(expected, abs=2e-3, rel=1e-4), captions[index]


def test_a_model_that_has_learnt_its_captions_ranks_them_first(parts: Path) -> None:
    model = Unimodal.from_pretrained(parts / "merged")
    pairs = [(Image.new("RGB", (16, 16), COLOURS[name]), [name]) for name in COLOURS]
    pictures, trials = [p for p, _ in pairs], make_trials([c for _, c in pairs], seed=0)
    assert len({str(model.processor.encode_images(p).tolist()) for p in pictures}) == 3
    optimizer = torch.optim.Adam(model.model.parameters(), 3e-3)
    turns = [
        [*model.processor.caption_messages(p), {"role": "assistant", "content": c}]
        for p, [c] in pairs
    ]
    rendered = [model.processor.render(turn) for turn in turns]

    def first() -> Any:
        judge = own_likelihood(CaptionLikelihood(model), COLOURS, pictures, seed=0)
        return score_retrieval(judge, pictures, trials)["first"]["score"]

    for _ in range(40):
        for row in rendered:
            ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
            model.model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert first() == 1


# --- the classifier -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier() -> WordClassifier:
    return train_word_classifier(coloured(90, seed=0), seed=0)


def test_the_classifier_learns_colours(classifier: WordClassifier) -> None:
    held_out = coloured(60, seed=1)
    captions = tuple(f"{name} square" for name in COLOURS)
    trials = [Trial(captions, captions.index(own[0])) for _, own in held_out]
    found = score_retrieval(classifier, [image for image, _ in held_out], trials)["first"]
    assert found["score"] > 0.9 and found["low"] > 0.6  # chance is 1/3


def test_unknown_words_say_nothing(classifier: WordClassifier) -> None:
    assert set(classifier.words) == set(COLOURS)  # "square" stands for every picture, so for none
    assert classifier.known("Red RED  zebra") == ["red"]
    image = picture("red", random.Random(3))
    values = classifier(image, ["a zebra", "", "red", "blue", "red square, red"]).tolist()
    assert values[0] == values[1] == 0  # and not minus infinity, nor the best
    assert values[3] < 0 < values[2] == values[4]


def test_same_seed_same_classifier(classifier: WordClassifier) -> None:
    before = torch.random.get_rng_state()
    again = train_word_classifier(coloured(90, seed=0), seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    image, texts = picture("green", random.Random(5)), ["red", "green thing"]
    assert torch.equal(again(image, texts), classifier(image, texts))
    other = train_word_classifier(coloured(90, seed=0), seed=1)
    assert not torch.equal(other(image, texts), classifier(image, texts))


def test_rare_words_are_not_learnt() -> None:
    with pytest.raises(DataError, match="no word comes in the captions of 5 of 4 training"):
        train_word_classifier(coloured(4, seed=0), seed=0)
    assert words_of("Flag: Åland_Islands, 3D!") == ["flag", "åland", "islands", "3d"]


# --- in the evaluation ----------------------------------------------------------------------------


def held_out() -> list[Captioned]:
    rng = random.Random(9)
    names = [rng.choice(list(COLOURS)) for _ in range(24)]
    return [Captioned(picture(n, rng), [f"{n} star {i}", n]) for i, n in enumerate(names)]


def measure(parts: Path, out: Path, train: list[Captioned] | None) -> dict[str, Any]:
    return evaluate(
        parts / "merged",
        parts / "llm",
        held_out(),
        out,
        settings=EvaluationSettings(n=4, pictures=24),
        train_pictures=train,
        progress=False,
    )


def test_evaluate_with_and_without_training_pictures(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = [Captioned(image, captions) for image, captions in coloured(60, seed=2)]
    found = measure(parts, tmp_path / "report.json", train)["retrieval"]
    assert list(found) == ["candidates", "own_likelihood", "classifier"]
    assert found["candidates"]["score"] == 20
    for judge in ("own_likelihood", "classifier"):
        assert set(found[judge]) >= {"drawings", "pictures"}
        for shown, n in (("drawings", 4), ("pictures", 24)):
            assert set(found[judge][shown]) == {"first", "reciprocal_rank"}
            for score in found[judge][shown].values():
                assert score["n"] == n and score["low"] <= score["score"] <= score["high"]
    assert found["classifier"]["known"]["score"] == 1
    assert found["classifier"]["words"]["score"] == 3
    # Twenty captions of three colours: the right colour halves the rank, and more.
    assert found["classifier"]["pictures"]["reciprocal_rank"]["low"] > 0.18
    schema = Path("docs/report_schema.md").read_text(encoding="utf-8")
    assert "`retrieval`.`candidates`" in schema
    for judge in ("own_likelihood", "classifier"):
        assert all(f"`retrieval`.`{judge}`.`{key}`" in schema for key in found[judge])
    told = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "## Retrieval" in told and "which of 20 captions fits" in told
    assert "| chance: true one first | 5.0 % | 5.0 % |" in told
    assert "No parser reads these drawings" in told

    assert measure(parts, tmp_path / "again" / "report.json", train)["retrieval"] == found
    with caplog.at_level(logging.WARNING):
        less = measure(parts, tmp_path / "less" / "report.json", None)["retrieval"]
    assert less == {key: found[key] for key in ("candidates", "own_likelihood")}
    assert "give --train-pictures" in caplog.text
    told = write_report(tmp_path / "less")[0].read_text(encoding="utf-8")
    assert "trained on the real training pictures: true one first | – | – |" in told


def test_too_few_captions_are_no_retrieval(parts: Path, tmp_path: Path) -> None:
    one = [Captioned(picture("red", random.Random(0)), ["red"])]
    report = evaluate(
        parts / "merged", parts / "llm", one, tmp_path / "report.json", progress=False
    )
    assert "retrieval" not in report and report["caption"]["exact"]["n"] == 1


def test_command(
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for split, seed in (("train", 0), ("validation", 1)):
        folder = tmp_path / split
        folder.mkdir()
        rows = coloured(30, seed)
        for number, (image, _) in enumerate(rows):
            image.save(folder / f"{number}.png")
        lines = [
            json.dumps({"file_name": f"{i}.png", "captions": [f"{own[0]} {i}", *own]})
            for i, (_, own) in enumerate(rows)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = ["evaluate", "--model", parts / "merged", "--base-llm", parts / "llm"]
    command += ["--world", tmp_path / "validation", "--train-pictures", tmp_path / "train"]
    command += ["--out", tmp_path / "report.json", "--n", 2, "--pictures", 22]
    monkeypatch.setattr(sys, "argv", ["unimodal", *map(str, command)])
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr().out
    assert not left.value.code
    for judge in ("own_likelihood", "classifier"):
        assert f"retrieval by {judge}, drawings: the true caption first" in told
    found = json.loads((tmp_path / "report.json").read_text())["retrieval"]
    assert found["classifier"]["pictures"]["first"]["n"] == 22
    command[command.index(tmp_path / "train")] = tmp_path / "missing"  # told before the work
    command[command.index("--out") + 1] = tmp_path / "none.json"
    monkeypatch.setattr(sys, "argv", ["unimodal", *map(str, command)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and "missing" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


def test_training_pictures_beside_a_world_are_refused(parts: Path, tmp_path: Path) -> None:
    from eval.shapes.world import write_world

    write_world(tmp_path / "world", 2, validation=2, progress=False)
    with pytest.raises(ConfigurationError, match="leave them out"):
        evaluate(
            parts / "merged",
            parts / "llm",
            tmp_path / "world",
            tmp_path / "report.json",
            train_pictures=[],
        )
