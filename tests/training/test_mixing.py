"""Rendering fast gives what render gives; mixing keeps its shares and is a function of the step."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.toy import toy_merged_folder
from tests.training.conftest import write_pictures
from tokenizer_hf.errors import ConfigurationError, DataError, MismatchError
from training.data.code_cache import build_cache
from training.data.collate import Steps, collate
from training.data.examples import Example, Examples, TextExamples
from training.data.mixing import Mix, Pick
from training.data.rendering import Renderer
from training.recipes import DIRECTIONS, DataRecipe
from unimodal.messages import IGNORED
from unimodal.processing_unimodal import UnimodalProcessor

COUNTS = {"draw": 40, "caption": 40, "question": 7, "text": 100, "chat": 0}
TOKENS = {"draw": 18.0, "caption": 12.0, "question": 3.0, "text": 20.0}
WEIGHTS = {"draw": 5.0, "caption": 3.0, "question": 1.0, "text": 2.0, "chat": 1.0}


def processor_of(folder: Path) -> UnimodalProcessor:
    return UnimodalProcessor.from_pretrained(folder, load_image_tokenizer=False)


# --- rendering ---


def conversations(codes: list[int]) -> list[list[dict[str, Any]]]:
    image = {"type": "image", "codes": codes}
    texts = [
        "A red circle.",
        "naïve café – two  blanks, <|im_end|> and <|image_00003|>",
        " outer space ",
        "",
        "line\nbreak",
        "7",
        "«quoted» 'text' it's",
    ]
    found = []
    for text in texts:
        found += [
            [user("Draw: " + text), {"role": "assistant", "content": [image]}],
            [user([image, part("Describe the picture.")]), assistant(text or "nothing")],
            [user([image, part(text)]), assistant("Yes, " + text)],
            [user(text), assistant("One."), user([part(text), image]), assistant("Two: " + text)],
            [user("Both"), assistant([part(text), image, part(text), image])],
            [user([part("a"), part(text)]), assistant("joined")],
        ]
    return found


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize("style", ["qwen", "llama3", "llama2"])
@pytest.mark.parametrize("nested, row_ends", [(False, 0), (True, 0), (False, 2)])
def test_fast_rendering_equals_render(
    style: str, nested: bool, row_ends: int, tmp_path: Path
) -> None:
    folder = toy_merged_folder(tmp_path, style=style, nested=nested, row_ends=row_ends)
    processor = processor_of(folder)
    chats = conversations([1, 5, 15, 0][: 3 if nested else 4])
    # A checking renderer would hide a difference behind its fall-back: look at the fast path alone.
    renderer = Renderer(processor)
    words = [renderer._take_apart(chat) for chat in chats]
    shapes = [renderer._shape(one) for one in words]
    fast = renderer._fast(words, shapes)
    compared = 0
    for chat, one in zip(chats, fast, strict=True):
        if one is not None:
            plain = processor.render(chat)
            assert one[0].tolist() == plain.input_ids, chat
            assert one[1].tolist() == plain.labels, chat
            compared += 1
    assert compared >= len(chats) * (0.5 if style == "llama2" else 1)
    for chat, one in zip(chats, renderer.render(chats), strict=True):
        assert one[0].tolist() == processor.render(chat).input_ids


def test_a_template_that_changes_text_falls_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor = processor_of(toy_merged_folder(tmp_path))
    processor.chat_template = processor.tokenizer.chat_template.replace(
        "message['content']", "message['content'] | replace('blank', 'gap')"
    )
    chats = conversations([1, 5, 15, 0])
    for chat, one in zip(chats, Renderer(processor).render(chats), strict=True):
        plain = processor.render(chat)
        assert one[0].tolist() == plain.input_ids and one[1].tolist() == plain.labels
    assert "changes texts" in caplog.text


# --- examples ---


@pytest.fixture(scope="module")
def examples(merged: Path, cache: Path, text: Path) -> Examples:
    return Examples(processor_of(merged), [cache], [text])


def test_directions_are_the_processors_conversations(examples: Examples) -> None:
    processor = examples.processor
    image = {"type": "image", "codes": examples.caches[0].codes(4).tolist()}
    picked = [
        examples.messages(Pick(direction, 4, choice, dropped))
        for direction, choice, dropped in (
            ("draw", 1, False),
            ("draw", 1, True),
            ("caption", 2, False),
            ("question", 0, False),
            ("dialogue", 0, False),
        )
    ]
    drawing = [*processor.draw_messages("There is a large green square, number 4")]
    assert picked[0] == [*drawing, assistant([image])]
    assert picked[1] == [*processor.draw_messages(""), assistant([image])]
    assert picked[2] == [*processor.caption_messages(image), assistant("A green circle.")]
    answer = assistant("It's green!")
    assert picked[3] == [user([image, part("What colour is it?")]), answer]
    drawn = [*processor.draw_messages("A green circle."), assistant([image])]
    assert picked[4] == [*drawn, user("What colour is it?"), answer]


def test_several_questions_are_asked_one_after_the_other(merged: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 1)
    pairs = [(f"Question {i}?", f"Answer {i}.") for i in range(3)]
    asked = [{"question": question, "answer": answer} for question, answer in pairs]
    row = {"file_name": "000.png", "text": "A star.", "questions": asked}
    (pictures / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    build_cache(pictures, merged, tmp_path / "codes", progress=False)
    processor = processor_of(merged)

    def turns(direction: str, choice: int, **settings: int) -> list[str]:
        examples = Examples(processor, [tmp_path / "codes"], **settings)
        said = examples.messages(Pick(direction, 0, choice, False))
        texts = [message["content"] for message in said[2:]]
        if direction == "question":
            texts = [said[0]["content"][1]["text"], said[1]["content"], *texts]
            [example] = examples.build([Pick(direction, 0, choice, False)])
            learnt = example.input_ids[example.labels != IGNORED]
            answers = processor.tokenizer.decode(learnt)
            assert all(answer in answers for answer in texts[1::2])
            assert not any(question in answers for question in texts[::2])
        return texts

    assert turns("question", 4) == [*pairs[1]]
    assert turns("question", 4, questions=2) == [*pairs[1], *pairs[2]]
    assert turns("question", 2, questions=9) == [*pairs[2], *pairs[0], *pairs[1]]
    assert turns("dialogue", 0) == [*pairs[0], *pairs[1]]
    assert turns("dialogue", 1, dialogue_questions=1) == [*pairs[1]]
    with pytest.raises(ConfigurationError, match=r"data\.questions"):
        DataRecipe(questions=0)


def test_the_shares_of_codes_are_those_of_the_caches(examples: Examples) -> None:
    shares = examples.code_shares()
    values = examples.caches[0].code_values.tolist()
    assert shares.shape == (examples.processor.vocabulary.codebook_size,)
    assert shares.sum() == pytest.approx(1)
    for code in (values[0], values[-1]):
        assert shares[code] == pytest.approx(values.count(code) / len(values))


def test_pictures_that_only_chats_hold_count_as_well(merged: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 2)
    image = {"type": "image", "image": str((pictures / "001.png").resolve())}
    turns = [user("Draw."), {"role": "assistant", "content": [image]}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    cache = build_cache(tmp_path / "chat.jsonl", merged, tmp_path / "codes", progress=False)
    shares = Examples(processor_of(merged), [tmp_path / "codes"]).code_shares()
    assert set(np.flatnonzero(shares).tolist()) == set(cache.chat_codes(0)[0])
    assert shares.sum() == pytest.approx(1)


def test_pictures_are_drawn_from_their_prompts_where_they_have_some(
    merged: Path, tmp_path: Path
) -> None:
    pictures = write_pictures(tmp_path / "pictures", 2)
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    lines[1]["prompts"] = ["green", "something green"]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    build_cache(str(pictures), merged, tmp_path / "codes", progress=False)
    examples = Examples(UnimodalProcessor.from_pretrained(merged), [tmp_path / "codes"])
    processor = examples.processor
    for row, choice, expected in (
        (0, 0, "A red circle."),
        (1, 0, "green"),
        (1, 3, lines[1]["prompts"][1]),
    ):
        messages = examples.messages(Pick("draw", row, choice, False))
        assert messages[:-1] == processor.draw_messages(expected)
    assert examples.messages(Pick("caption", 1, 0, False))[-1] == assistant("A green circle.")


def test_examples_learn_the_answer_only(examples: Examples) -> None:
    vocabulary, tokenizer = examples.processor.vocabulary, examples.processor.tokenizer
    draw, caption = examples.build([Pick("draw", 4, 0, False), Pick("caption", 4, 0, False)])
    span = vocabulary.span(examples.caches[0].codes(4))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert draw.labels[draw.labels != IGNORED].tolist() == [*span, end]
    learnt = caption.labels[caption.labels != IGNORED]
    assert tokenizer.decode(learnt) == "A green circle.<|im_end|>"
    prompt = processor_prompt(examples, "A green circle.")
    assert draw.input_ids[: len(prompt)].tolist() == prompt


def test_a_dropped_prompt_is_the_unconditional_one(examples: Examples) -> None:
    [dropped] = examples.build([Pick("draw", 4, 0, True)])
    prompt = processor_prompt(examples, "")
    assert dropped.input_ids[: len(prompt)].tolist() == prompt


def processor_prompt(examples: Examples, prompt: str) -> list[int]:
    messages = examples.processor.draw_messages(prompt)
    return examples.processor.render(messages, add_generation_prompt=True).input_ids


def test_plain_text_is_learnt_whole_and_cut(merged: Path, text: Path) -> None:
    processor = processor_of(merged)
    whole = Examples(processor, text=[text]).texts
    cut = Examples(processor, text=[text], max_length=8).texts
    assert len(whole) == 36  # 30 texts, 6 chats
    assert all((one.labels == one.input_ids).all() for one in whole)
    plain = whole[:30]
    assert all(one.input_ids[-1] == processor.tokenizer.eos_token_id for one in plain)
    assert max(len(one.input_ids) for one in cut) == 8
    joined = np.concatenate([one.input_ids for one in cut]).tolist()
    lost = sum(len(one.input_ids) % 8 == 1 for one in whole)  # a rest of one token has no target
    assert len(joined) == sum(len(one.input_ids) for one in whole) - lost


def test_text_model_learns_chats_whole(merged: Path, text: Path) -> None:
    tokenizer = processor_of(merged).tokenizer
    found = TextExamples(tokenizer, [text], max_length=256).texts
    assert len(found) == 36
    assert tokenizer.decode(found[-1].labels).startswith("<|im_start|>user\nWhat is left of")


def test_too_long_examples_are_left_out_and_counted(merged: Path, cache: Path) -> None:
    picks = [Pick("draw", 0, choice, False) for choice in (0, 1)]
    built = Examples(processor_of(merged), [cache]).build(picks)
    short, long = (len(example.input_ids) for example in built)
    assert short < long
    examples = Examples(processor_of(merged), [cache], max_length=short)
    built = examples.build([Pick("draw", 0, choice, False) for choice in (0, 1, 0)])
    assert len(built) == 2 and examples.left_out == 1
    with pytest.raises(DataError, match="max_length"):
        Examples(processor_of(merged), [cache], max_length=8).mean_loss_tokens()


def test_a_cache_of_another_tokenizer_is_refused(cache: Path, tmp_path: Path) -> None:
    other = toy_merged_folder(tmp_path, nested=True)
    with pytest.raises(MismatchError, match="encode the pictures again"):
        Examples(processor_of(other), [cache])


def test_chats_with_pictures_are_a_direction(merged: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 2)
    turns = [
        user([{"type": "image", "image": "000.png"}, part("What is it?")]),
        assistant("A circle."),
        user("Draw it in green."),
        assistant([{"type": "image", "image": "001.png"}]),
    ]
    file = folder / "chat.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n")
    build_cache(file, merged, tmp_path / "cache", progress=False)
    examples = Examples(processor_of(merged), [tmp_path / "cache"])
    assert {name: count for name, count in examples.num_items.items() if count} == {"chat": 1}
    [example] = examples.build([Pick("chat", 0, 0, False)])
    vocabulary = examples.processor.vocabulary
    learnt = example.labels[example.labels != IGNORED].tolist()
    assert vocabulary.start_token_id in learnt
    assert example.input_ids.tolist().count(vocabulary.start_token_id) == 2


# --- mixing ---


def mix(**changes: Any) -> Mix:
    values: dict[str, Any] = {"examples_per_step": 16, "prompt_dropout": 0.25, "seed": 3}
    return Mix(COUNTS, TOKENS, WEIGHTS, **{**values, **changes})


def test_loss_tokens_come_in_the_wanted_shares() -> None:
    counted: Counter[str] = Counter()
    drawing = mix()
    for step in range(250):
        for pick in drawing.picks(step):
            counted[pick.direction] += TOKENS[pick.direction]  # type: ignore[assignment]
    total, weights = sum(counted.values()), {d: WEIGHTS[d] for d in TOKENS}
    for direction, weight in weights.items():
        wanted = weight / sum(weights.values())
        assert counted[direction] / total == pytest.approx(wanted, abs=0.003)


def test_any_step_can_be_drawn_alone() -> None:
    drawing = mix()
    inorder = [drawing.picks(step) for step in range(40)]
    assert mix().picks(33) == inorder[33]
    assert drawing.picks(12) == inorder[12]
    assert mix(seed=4).picks(33) != inorder[33]


def test_every_item_comes_once_before_any_comes_twice() -> None:
    drawing, seen = mix(), []
    for step in range(60):
        seen += [pick.item for pick in drawing.picks(step) if pick.direction == "draw"]
    assert sorted(seen[:40]) == sorted(seen[40:80]) == list(range(40))
    assert seen[:40] != seen[40:80]


def test_prompts_are_dropped_for_drawing_only() -> None:
    drawing = mix()
    picks = [pick for step in range(200) for pick in drawing.picks(step)]
    dropped = [pick.dropped for pick in picks if pick.direction == "draw"]
    assert np.mean(dropped) == pytest.approx(0.25, abs=0.05)
    assert not any(pick.dropped for pick in picks if pick.direction != "draw")
    assert not any(pick.dropped for pick in mix(prompt_dropout=0.0).picks(0))


def test_a_curriculum_moves_from_its_weights_to_the_others() -> None:
    start = {"caption": 1.0, "text": 3.0}
    drawing = mix(starting_weights=start, moving_steps=200)
    steps = [drawing.picks(step) for step in range(400)]
    tokens = [Counter() for _ in range(4)]  # of a hundred steps each
    for step, picks in enumerate(steps):
        for pick in picks:
            tokens[step // 100][pick.direction] += TOKENS[pick.direction]
    shares = [{d: t[d] / sum(t.values()) for d in TOKENS} for t in tokens]
    assert {pick.direction for pick in steps[0]} == set(start)
    for part, way in ((0, 0.25), (1, 0.75), (2, 1), (3, 1)):
        for direction in TOKENS:
            wanted = way * WEIGHTS[direction] / 11 + (1 - way) * start.get(direction, 0) / 4
            assert shares[part][direction] == pytest.approx(wanted, abs=0.012)
    assert mix(starting_weights=start, moving_steps=200).picks(150) == steps[150]
    assert drawing.picks(350) == steps[350] and drawing.picks(20) == steps[20]
    seen = [pick.item for picks in steps for pick in picks if pick.direction == "draw"]
    assert sorted(seen[:40]) == sorted(seen[40:80]) == list(range(40))


def test_the_same_weights_at_the_start_are_no_curriculum() -> None:
    picks = [mix().picks(step) for step in range(30)]
    moving = mix(starting_weights={d: 2 * w for d, w in WEIGHTS.items()}, moving_steps=10)
    assert [moving.picks(step) for step in range(30)] == picks


@pytest.mark.parametrize(
    ("changes", "digest"),
    [
        ({}, "78a7c72248bf2c1db5ca7ddc7d8fc1776a3bee18bf2f9b406b109692bb0efb32"),
        (
            {"seed": 11, "examples_per_step": 7},
            "614cfe56fe1763088642d23ea7942815998b7d02190819ae5c8d97f912d8de29",
        ),
    ],
)
def test_without_a_curriculum_the_picks_are_those_of_before(
    changes: dict[str, Any], digest: str
) -> None:
    """Hashes of what the code before the curriculum picked (revision ec26b1c)."""
    drawing = mix(**changes)
    picks = [
        [(p.direction, p.item, p.choice, p.dropped) for p in drawing.picks(step)]
        for step in range(60)
    ]
    assert hashlib.sha256(repr(picks).encode()).hexdigest() == digest


def test_a_curriculum_keeps_its_shares_in_every_stretch() -> None:
    """The examples so far are never more than 6 away from the sum of the wanted shares (4.4
    measured; with random draws: 39)."""
    start, steps = {"caption": 1.0, "text": 2.0}, 50
    drawing = mix(starting_weights=start, moving_steps=steps)
    wanted, found = Counter[str](), Counter[str]()
    for step in range(120):
        way = min(1, step / steps)
        rates = {
            d: ((1 - way) * start.get(d, 0) / 3 + way * WEIGHTS[d] / 11) / TOKENS[d] for d in TOKENS
        }
        for direction, rate in rates.items():
            wanted[direction] += 16 * rate / sum(rates.values())  # type: ignore[assignment]
        found += Counter(pick.direction for pick in drawing.picks(step))
        assert max(abs(wanted[d] - found[d]) for d in TOKENS) < 6


def test_nothing_to_train_on() -> None:
    with pytest.raises(ConfigurationError, match="nothing to train on"):
        Mix({"draw": 0, "text": 3}, {"text": 5.0}, {"draw": 1.0}, examples_per_step=4)
    with pytest.raises(ConfigurationError, match="nothing to train on"):
        mix(starting_weights={"chat": 1.0}, moving_steps=5)


# --- batches ---


def test_batches_of_a_step_hold_its_picks_sorted(examples: Examples) -> None:
    drawing = Mix(examples.num_items, examples.mean_loss_tokens(), WEIGHTS, 12, 0.1, seed=0)
    steps = Steps(examples, drawing, num_steps=5, batch_size=4, batches_per_step=3)
    loader = DataLoader(steps, batch_size=4, shuffle=False, collate_fn=collate)
    batches = list(loader)
    assert len(batches) == len(loader) == 15
    for step in range(5):
        wanted = sorted(len(e.input_ids) for e in examples.build(drawing.picks(step)))
        numbers = range(3 * step, 3 * step + 3)
        found = [len(example.input_ids) for n in numbers for example in steps.batch(n)]
        assert found == wanted
    again = Steps(examples, drawing, num_steps=5, batch_size=4, batches_per_step=3)
    alone = collate(again.batch(7))
    assert all(torch.equal(alone[key], batches[7][key]) for key in alone)


def test_padding_is_never_learnt() -> None:
    short = Example(np.array([5, 6]), np.array([IGNORED, 6]), "draw")
    long = Example(np.array([1, 2, 3, 4]), np.array([IGNORED, 2, 3, 4]), "text")
    batch = collate([short, long], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 9, 9], [1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED, IGNORED], [IGNORED, 2, 3, 4]]
    assert [DIRECTIONS[i] for i in batch["directions"]] == ["draw", "text"]
