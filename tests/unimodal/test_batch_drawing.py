"""`unimodal draw --prompts`: the file's lines, the manifest, resuming; drawn by transformers."""

import asyncio
import json

import pytest
from PIL import Image

from tests.toy import toy_merged_folder
from tokenizer_hf.errors import DataError, MismatchError, ServingError
from unimodal import Unimodal
from unimodal.batch_drawing import (
    Defaults,
    Manifest,
    TransformersBackend,
    check_budgets,
    draw_all,
    read_prompts,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = toy_merged_folder(tmp_path_factory.mktemp("toy"), nested=True)
    return Unimodal.from_pretrained(folder, device="cpu")


def write(path, *lines):
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return path


def run(model, drawings, out, backend=None, /, **about):
    backend = backend or TransformersBackend(model)
    return asyncio.run(draw_all(drawings, backend, model.processor, out, about))


def entries(out):
    lines = (out / "manifest.jsonl").read_text().splitlines()
    return {entry["file"]: entry for entry in map(json.loads, lines)}


LINES = (
    {"prompt": "a red circle", "n": 3, "guidance": 2.0},
    "\n",
    {"prompt": "un cœur", "id": "heart", "seed": 99, "temperature": 0.5, "top_k": 4},
    {"prompt": "a star", "negative_prompt": "blue", "budget": 3},
)


def test_lines_become_drawings(tmp_path):
    drawings = read_prompts(write(tmp_path / "p.jsonl", *LINES), Defaults(seed=10, guidance=1.5))
    assert [(d.file, d.seed, d.guidance) for d in drawings] == [
        ("000001-0.png", 10, 2.0),
        ("000001-1.png", 11, 2.0),
        ("000001-2.png", 12, 2.0),
        ("heart.png", 99, 1.5),
        ("000004.png", 14, 1.5),
    ]
    assert (drawings[3].temperature, drawings[3].top_k, drawings[3].budget) == (0.5, 4, None)
    assert (drawings[4].negative_prompt, drawings[4].budget) == ("blue", 3)


def test_lines_end_at_line_feeds_only(tmp_path, model):
    text = "a star\u2028or\x85two"
    line = json.dumps({"prompt": text}, ensure_ascii=False)
    [drawing] = read_prompts(write(tmp_path / "p.jsonl", line + "\n"), Defaults())
    assert drawing.prompt == text
    run(model, [drawing], tmp_path / "out")
    assert Manifest(tmp_path / "out").entries[drawing.file]["prompt"] == text


def test_bad_lines_are_told_by_number_and_together(tmp_path, model):
    lines = [
        {"prompt": "fine"},
        "{not json\n",
        "[1]\n",
        {"text": "x"},
        {"prompt": " "},
        {"prompt": "x", "guidance": "much"},
        {"prompt": "x", "id": "../up"},
        {"prompt": "x", "id": "One"},
        {"prompt": "x", "id": "one"},
        {"prompt": "x", "seed": -1},
    ]
    with pytest.raises(DataError) as caught:
        read_prompts(write(tmp_path / "p.jsonl", *lines), Defaults())
    said = str(caught.value)
    assert "8 bad lines" in said
    for number in (2, 3, 4, 5, 6, 7, 9, 10):
        assert f"line {number}: " in said
    for words in ("no JSON", "no object", "'text'", "'guidance' is 'much'", "same files as line 8"):
        assert words in said
    with pytest.raises(DataError, match="no prompt"):
        read_prompts(write(tmp_path / "empty.jsonl", "\n"), Defaults())
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "missing.jsonl", Defaults())
    wrong = read_prompts(write(tmp_path / "b.jsonl", {"prompt": "x", "budget": 77}), Defaults())
    with pytest.raises(DataError, match=r"000001.*77"):
        check_budgets(wrong, model.processor.vocabulary)


def test_pictures_are_those_of_draw_and_the_manifest_says_how(tmp_path, model):
    drawings = read_prompts(write(tmp_path / "p.jsonl", *LINES), Defaults())
    out = tmp_path / "out"
    summary = run(model, drawings, out, model="toy")
    assert (summary.drawn, summary.skipped, summary.failed) == (5, 0, 0)
    expected = model.draw("a red circle", n=3, seed=0, guidance=2.0)
    expected += model.draw("un cœur", seed=99, temperature=0.5, top_k=4)
    expected += model.draw("a star", seed=4, negative_prompt="blue", budget=3)
    found = entries(out)
    for drawing, picture in zip(drawings, expected, strict=True):
        with Image.open(out / drawing.file) as image:
            assert image.tobytes() == picture.tobytes()
            about = json.loads(image.text["unimodal"])
        entry = found[drawing.file]
        assert about.items() <= entry.items() and about["model"] == "toy"
        assert (entry["status"], entry["prompt"], entry["seed"]) == (
            "done",
            drawing.prompt,
            drawing.seed,
        )
        [again] = model.processor.decode_codes([entry["codes"]])
        assert again.tobytes() == picture.tobytes()


def test_candidates_are_judged_as_in_draw(tmp_path, model):
    lines = [{"prompt": f"a star {i}", "n": 3, "seed": 10 * i, "candidates": 7} for i in range(3)]
    drawings = read_prompts(write(tmp_path / "p.jsonl", *lines), Defaults(guidance=1.0))
    run(model, drawings, tmp_path / "out")
    one = [{**line, "candidates": 1} for line in lines]
    first = read_prompts(write(tmp_path / "p.jsonl", *one), Defaults(guidance=1.0))
    run(model, first, tmp_path / "first")
    found, alone = entries(tmp_path / "out"), entries(tmp_path / "first")
    assert {entry["candidates"] for entry in found.values()} == {7}
    assert any(found[file]["codes"] != alone[file]["codes"] for file in found)
    for line in lines:
        spans = {}
        model.draw(
            line["prompt"],
            n=3,
            seed=line["seed"],
            guidance=1.0,
            candidates=7,
            on_token=lambda row, token, spans=spans: spans.setdefault(row, []).append(token),
        )
        best = model.best_candidates([line["prompt"]] * 3, [spans[row] for row in range(21)])
        files = [d.file for d in drawings if d.prompt == line["prompt"]]
        codes = [model.processor.vocabulary.to_codes(span[1:-1]) for span in best]
        assert [found[file]["codes"] for file in files] == codes


def test_an_error_loses_no_other_picture_and_is_tried_again(tmp_path, model):
    lines = ({"prompt": "a ring"}, {"prompt": "star " * 600}, {"prompt": "a cross"})
    drawings = read_prompts(write(tmp_path / "p.jsonl", *lines), Defaults())
    out = tmp_path / "out"
    for skipped in (0, 2):
        summary = run(model, drawings, out)
        assert (summary.drawn, summary.skipped, summary.failed) == (2 - skipped, skipped, 1)
    found = entries(out)
    assert found["000002.png"]["status"] == "error" and "512" in found["000002.png"]["error"]
    assert not (out / "000002.png").exists()
    [one] = model.draw("a cross", seed=2)
    assert Image.open(out / "000003.png").tobytes() == one.tobytes()


class Dies(TransformersBackend):
    """Draws a few, then the engine is gone."""

    async def draw(self, drawings):
        count = 0
        async for item in super().draw(drawings):
            if count == 2:
                raise ServingError("gone")
            count += 1
            yield item


def test_a_stopped_run_goes_on(tmp_path, model):
    drawings = read_prompts(write(tmp_path / "p.jsonl", *LINES), Defaults())
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(model, drawings, whole)
    with pytest.raises(ServingError):
        run(model, drawings, out, Dies(model))
    # As if it had been killed while it wrote the third line, its picture being there already.
    with (out / "manifest.jsonl").open("a") as stream:
        stream.write('{"file": "000001-2.png", "sta')
    (out / "000001-2.png").write_bytes((whole / "000001-2.png").read_bytes())
    before = (out / "000001-0.png").stat().st_mtime_ns
    summary = run(model, drawings, out)
    assert (summary.drawn, summary.skipped) == (3, 2)
    assert (out / "000001-0.png").stat().st_mtime_ns == before
    assert entries(out) == entries(whole)
    for drawing in drawings:
        assert (out / drawing.file).read_bytes() == (whole / drawing.file).read_bytes()
    assert not [path for path in out.iterdir() if path.suffix not in (".png", ".jsonl")]
    # A picture that was removed is drawn again.
    (out / "heart.png").unlink()
    assert run(model, drawings, out).drawn == 1


def test_a_folder_goes_on_with_the_same_batch_only(tmp_path, model):
    first = read_prompts(write(tmp_path / "p.jsonl", {"prompt": "a ring"}), Defaults())
    out = tmp_path / "out"
    run(model, first, out, model="toy")
    other = read_prompts(write(tmp_path / "p.jsonl", {"prompt": "a star"}), Defaults())
    with pytest.raises(MismatchError, match=r"000001\.png.*'a ring'.*'a star'"):
        run(model, other, out, model="toy")
    with pytest.raises(MismatchError, match="model"):
        run(model, first, out, model="another")
    (out / "manifest.jsonl").write_text("hello\n")
    with pytest.raises(DataError, match="line 1"):
        Manifest(out)
