"""The whole evaluation and the report, on a tiny untrained model, through the real commands."""

import json
import random
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.curves import draw_curves, find_curves, read_log
from eval.evaluate import Captioned, EvaluationSettings, data_uri, evaluate, update_report
from eval.report import number, percent, write_report
from eval.resume import FinishedDrawings
from eval.shapes.render import render
from eval.shapes.scene import CATEGORIES, sample_scene
from eval.shapes.world import write_world
from tests.toy import toy_merged_folder
from tokenizer_hf.errors import CheckpointError, ConfigurationError, DataError
from unimodal.cli import main
from unimodal.pipeline import Unimodal

SMALL = EvaluationSettings(n=2, pictures=6, texts=8, dialogues=3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    toy_merged_folder(folder)
    write_world(folder / "world", 10, validation=8, progress=False)
    return folder


@pytest.fixture(scope="module")
def report(parts: Path) -> dict[str, Any]:
    return evaluate(
        parts / "merged",
        parts / "llm",
        parts / "world",
        parts / "run" / "report.json",
        settings=SMALL,
        progress=False,
    )


def _is_score(value: Any) -> bool:
    if set(value) != {"score", "n", "low", "high"}:
        return False
    return value["score"] is None or value["low"] is None or value["low"] <= value["score"]


def test_sections(report: dict[str, Any], parts: Path) -> None:
    assert json.loads((parts / "run/report.json").read_text()) == report
    assert set(report["reconstruction"]) == {"psnr", "parse_agreement", "codes_used"}
    assert tuple(report["draw"]) == tuple(report["draw_held_out"]) == CATEGORIES
    names = {"exact", "object_f1", "colour", "relation", "count"}
    assert set(report["caption"]) == set(report["caption_held_out"]) == names
    assert set(report["text"]) == {"perplexity_base", "perplexity_tuned", "kl", "image_mass"}
    scores = [report["answers"]]
    assert set(report["dialogue"]) == {"drawing", "answers"}
    assert report["dialogue"]["drawing"]["n"] == SMALL.dialogues
    for name in (
        "dialogue",
        "reconstruction",
        "draw",
        "draw_held_out",
        "caption",
        "caption_held_out",
        "text",
    ):
        scores += report[name].values()
    assert all(map(_is_score, scores))
    assert all(score["n"] == SMALL.n for score in report["draw"].values())
    # Two drawings of each of 14 kinds, one legal span each.
    assert report["spans"] == {"generated": 28, "malformed": 0}
    # An untrained merge leaves the text alone, and the parser sees nothing in random codes.
    assert report["text"]["kl"]["score"] == pytest.approx(0, abs=1e-6)
    assert report["caption"]["exact"]["score"] == 0
    assert report["peak_rss_bytes"] > 10**8
    assert report["environment"]["packages"]["torch"]


def test_every_key_is_documented(report: dict[str, Any]) -> None:
    text = Path("docs/report_schema.md").read_text(encoding="utf-8")
    for key, value in report.items():
        assert f"`{key}" in text, key
        if key in ("reconstruction", "caption", "draw", "dialogue", "text", "spans"):
            assert all(f"`{name}`" in text for name in value), (key, value)


def test_same_seed_same_scores(report: dict[str, Any], parts: Path, tmp_path: Path) -> None:
    again = evaluate(
        parts / "merged",
        parts / "llm",
        parts / "world",
        tmp_path / "report.json",
        settings=SMALL,
        progress=False,
    )
    for key in ("reconstruction", "draw", "draw_held_out", "caption", "answers", "text"):
        assert again[key] == report[key]
    assert (tmp_path / "samples.json").read_bytes() == (parts / "run/samples.json").read_bytes()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        elif tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_killed_evaluation_goes_on_behind_its_drawings(
    report: dict[str, Any], parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it draws the second half; the file's last line is torn as well."""
    out = tmp_path / "report.json"
    arguments = (parts / "merged", parts / "llm", parts / "world", out)
    monkeypatch.setattr("eval.evaluate._CHUNK", 7)
    drawn: list[int] = []
    draw = Unimodal.draw

    def counted(self: Unimodal, texts: Any, **options: Any) -> Any:
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(len(texts))
        return draw(self, texts, **options)

    with monkeypatch.context() as killed:
        killed.setattr(Unimodal, "draw", counted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(*arguments, settings=SMALL, progress=False)
    part = tmp_path / "drawings.part.jsonl"
    assert drawn == [7, 7, 7] and len(part.read_text().splitlines()) == 4 and not out.exists()
    part.write_text(part.read_text()[:-9])

    again: list[int] = []
    with monkeypatch.context() as counting:
        counting.setattr(
            Unimodal, "draw", lambda self, t, **o: again.append(len(t)) or draw(self, t, **o)
        )
        found = evaluate(*arguments, settings=SMALL, progress=False)
    assert again == [7, 7] and not part.exists()  # the torn chunk and the one that was killed
    for section in ("draw", "draw_held_out", "spans"):
        assert found[section] == report[section]
    samples = [json.loads((f / "samples.json").read_text()) for f in (parts / "run", tmp_path)]
    assert samples[0]["drawings_held_out"] == samples[1]["drawings_held_out"]


def test_drawings_of_another_model_or_prompt_are_not_taken(tmp_path: Path) -> None:
    file, picture = tmp_path / "part.jsonl", Image.new("RGB", (4, 4), "red")
    first = FinishedDrawings(file, {"seed": 1})
    first.add("drawings", 0, ["a star"], [picture], {"generated": 1})
    same = FinishedDrawings(file, {"seed": 1})
    assert same.count == 1 and same.find("drawings", 0, ["a ring"]) is None
    found = same.find("drawings", 0, ["a star"])
    assert found is not None and found[0][0].tobytes() == picture.tobytes()
    assert FinishedDrawings(file, {"seed": 2}).count == 0
    assert FinishedDrawings(file, {"seed": 1}).count == 0  # begun anew by the line before


def test_report_pages(report: dict[str, Any], parts: Path) -> None:
    run = parts / "run"
    update_report(run / "report.json", {"vllm": {"prompts": 16, "identical": 16}})
    log = [{"step": i, "loss": 2.0 / (i + 1), "loss_draw": 1.0} for i in range(5)]
    (run / "lora").mkdir(exist_ok=True)
    (run / "lora/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    markdown, html = write_report(run)
    told = markdown.read_text(encoding="utf-8")
    assert "| single | 0.0 % (0.0–65.8), n = 2 |" in told and "16 of 16" in told
    page = _Page()
    source = html.read_text(encoding="utf-8")
    page.feed(source)
    assert page.open == []
    assert len(page.images) > 30 and all(
        src.startswith("data:image/png;base64,") for src in page.images
    )
    text = " ".join(page.text)
    for heading in ("Drawing", "Captions", "Losses", "Reconstructions", "Failures", "Seconds"):
        assert heading in text
    assert "loss_draw" in text
    assert "http" not in source.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")


def test_markup_in_a_prompt_is_harmless(tmp_path: Path) -> None:
    picture = data_uri(Image.new("RGB", (4, 4)))
    row = {"prompt": "<script>x</script> $body", "category": "a&b", "picture": picture}
    samples = {"drawings": [{**row, "fulfilled": False, "seen": "<b>"}]}
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    source = write_report(tmp_path)[1].read_text(encoding="utf-8")
    assert "<script>" not in source and "&lt;script&gt;x&lt;/script&gt; $body" in source


def test_pictures_without_scenes(parts: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    pictures = [Captioned(render(sample_scene(rng)), [f"picture {i}"]) for i in range(5)]
    found = evaluate(
        parts / "merged",
        parts / "llm",
        pictures,
        tmp_path / "report.json",
        settings=SMALL,
        text_files=[parts / "world/text/validation.jsonl"],
        progress=False,
    )
    assert set(found["reconstruction"]) == {"psnr", "codes_used"}
    assert set(found["caption"]) == {"exact"} and "draw" not in found
    assert found["spans"] == {"generated": 2, "malformed": 0}
    assert found["text"]["kl"]["n"] == 8
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert [row["prompt"] for row in samples["drawings"]] == ["picture 0", "picture 1"]
    write_report(tmp_path)


def test_update_report_keeps_what_others_measured(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    update_report(path, {"seconds": {"merge": 3}, "vllm": {"prompts": 2}, "peak_rss_bytes": 9})
    merged = update_report(path, {"seconds": {"evaluate": 1}, "peak_rss_bytes": 5, "spans": {}})
    assert merged == {
        "seconds": {"merge": 3, "evaluate": 1},
        "vllm": {"prompts": 2},
        "peak_rss_bytes": 9,
        "spans": {},
    }
    path.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        update_report(path, {})


def test_curves(tmp_path: Path) -> None:
    assert draw_curves(find_curves(tmp_path)) == ""
    (tmp_path / "text_model").mkdir()
    (tmp_path / "text_model/trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "loss": 3}, {"step": 2, "loss": 2, "lr": 1}]})
    )
    (tmp_path / "lora/checkpoint-5").mkdir(parents=True)
    (tmp_path / "lora/checkpoint-5/trainer_state.json").write_text("{}")
    (tmp_path / "lora/metrics.jsonl").write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 1}\n{"step": 3, "lo'
    )
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "image_tokenizer/training/tensorboard")) as board:
        for step in range(3):
            board.add_scalar("losses/reconstruction", 1 / (step + 1), step)
    curves = find_curves(tmp_path)
    assert curves["text_model"] == {"loss": [(1, 3), (2, 2)]}
    assert curves["lora"] == {"loss": [(1, 3), (2, 1)]}
    assert [p[0] for p in curves["image_tokenizer"]["losses/reconstruction"]] == [0, 1, 2]
    assert set(curves) == {"text_model", "lora", "image_tokenizer"}
    assert draw_curves(curves).startswith("<svg")
    (tmp_path / "trainer_state.json").write_text("[]")
    with pytest.raises(DataError, match="no training log"):
        read_log(tmp_path / "trainer_state.json")


def test_numbers_in_words() -> None:
    assert percent({"score": 0.83, "n": 100, "low": 0.754, "high": 0.886}) == (
        "83.0 % (75.4–88.6), n = 100"
    )
    assert number({"score": 12, "n": 3, "low": None, "high": None}) == "12, n = 3"
    assert percent(None) == number({"score": None, "n": 0, "low": None, "high": None}) == "–"


def test_errors(parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    with pytest.raises(ConfigurationError, match="n is 0"):
        EvaluationSettings(n=0)
    with pytest.raises(DataError, match="is not a world"):
        evaluate(parts / "merged", parts / "llm", tmp_path, out)
    with pytest.raises(CheckpointError):
        evaluate(tmp_path / "nowhere", parts / "llm", parts / "world", out)
    with pytest.raises(DataError, match="run `unimodal evaluate` first"):
        write_report(tmp_path)
    assert not out.exists()


def test_commands(
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unimodal", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code or 0, *capsys.readouterr()  # type: ignore[return-value]

    code, told, _ = run(
        *("evaluate", "--model", parts / "merged", "--base-llm", parts / "llm"),
        *("--world", parts / "world", "--out", tmp_path / "report.json"),
        *("--n", 1, "--pictures", 3, "--texts", 4, "--guidance", 1),
    )
    assert code == 0 and "draw single" in told
    code, told, _ = run("report", tmp_path)
    assert code == 0
    assert told.split() == [str(tmp_path / "report.md"), str(tmp_path / "report.html")]
    code, _, error = run("report", parts)
    assert code == 2
    assert len(error.splitlines()) == 1 and "unimodal evaluate" in error
    code, told, _ = run("shapes", tmp_path / "world", "--n", 5, "--validation", 3)
    assert code == 0 and (tmp_path / "world/world.json").exists()
    code, _, error = run("shapes", tmp_path / "other", "--level", "x")
    assert code == 2 and "expected 'board' or 'free'" in error
    assert not (tmp_path / "other").exists()
