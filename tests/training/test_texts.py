"""Texts in memory: the same examples in the same order as one by one, in four bytes a token."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.toy import qwen_tokenizer
from tokenizer_hf.errors import DataError
from training.data import examples
from training.data.examples import TextExamples, read_texts
from unimodal.messages import IGNORED

LINES: list[dict[str, Any]] = [
    {"text": "a red ring"},
    {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a"}]},
    {"text": "three blue stars <|im_end|> and a heart " * 4},
    {"text": "x"},
    {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "b" * 50}]},
]


def one_by_one(tokenizer: Any, max_length: int) -> list[list[int]]:
    """Plain texts with eos first, then chats, each cut by itself."""
    whole = [
        [*tokenizer(line["text"].replace("<|im_end|>", "<|im_end|\u200b>"))["input_ids"],
         tokenizer.eos_token_id]
        for line in LINES
        if "text" in line and "<|" not in line["text"]
    ]  # fmt: skip
    whole += [
        tokenizer(tokenizer.apply_chat_template(line["messages"], tokenize=False))["input_ids"]
        for line in LINES
        if "messages" in line
    ]
    cut = [ids[i : i + max_length] for ids in whole for i in range(0, len(ids), max_length)]
    return [part for part in cut if len(part) > 1]


@pytest.mark.parametrize("at_once", [1, 2, 1024])
@pytest.mark.parametrize("max_length", [8, 256])
def test_same_examples_however_many_at_once(
    at_once: int, max_length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "TEXTS_AT_ONCE", at_once)
    file, tokenizer = tmp_path / "text.jsonl", qwen_tokenizer()
    lines = [line for line in LINES if "<|" not in line.get("text", "")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = read_texts([file], tokenizer, max_length)
    expected = one_by_one(tokenizer, max_length)
    assert [text.input_ids.tolist() for text in texts] == expected
    assert [text.labels.tolist() for text in texts] == expected
    assert texts.lengths().tolist() == [len(ids) for ids in expected]
    assert texts[-1].input_ids.tolist() == expected[-1]
    assert [text.input_ids.tolist() for text in texts[1:3]] == expected[1:3]
    assert texts[0].input_ids.dtype == np.int64
    with pytest.raises(IndexError):
        texts[len(texts)]


def test_a_token_takes_four_bytes(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    texts = TextExamples(qwen_tokenizer(), [file], 256).texts
    assert texts.ids.nbytes == 4 * texts.lengths().sum()
    written = qwen_tokenizer().decode(texts[1].input_ids[:-1])
    assert "stars" in written and "<|im_end|>" not in written  # what was written is neutralised


def test_files_without_a_usable_line_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": ""}\nnonsense\n')
    with pytest.raises(DataError, match="no usable line"):
        read_texts([file], qwen_tokenizer(), 256)
    assert len(read_texts([], qwen_tokenizer(), 256)) == 0
    with pytest.raises(DataError, match="needs text"):
        TextExamples(qwen_tokenizer(), [], 256)


def test_only_the_answers_of_a_share_of_the_chats_are_learnt(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "text.jsonl", qwen_tokenizer()
    turns = [("how many rings?", "two"), ("what colour?", "two blue rings")]
    chat = {
        "messages": [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
    }
    file.write_text("".join(json.dumps(line) + "\n" for line in [LINES[0], *[chat] * 4]))
    whole = read_texts([file], tokenizer, 256)
    half = read_texts([file], tokenizer, 256, assistant_only=0.5)
    assert [t.input_ids.tolist() for t in half] == [t.input_ids.tolist() for t in whole]
    said = [
        tokenizer.decode(
            [i for i in text.labels.tolist() if i != IGNORED], skip_special_tokens=False
        )
        for text in half
    ]
    answers = "two<|im_end|>two blue rings<|im_end|>"
    assert [text == answers for text in said] == [False, False, True, False, True]
    for text, count in zip(half, half.learnt(), strict=True):
        assert count == (text.labels[1:] != IGNORED).sum()
    found = TextExamples(tokenizer, [file], 256, 0.5).mean_loss_tokens()["text"]
    assert found == pytest.approx(half.learnt().mean())


def test_pieces_without_anything_learnt_are_left_out(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "text.jsonl", qwen_tokenizer()
    file.write_text(json.dumps(LINES[-1]) + "\n")
    pieces = read_texts([file], tokenizer, 4, assistant_only=1.0)
    assert len(pieces) < len(read_texts([file], tokenizer, 4))
    assert (pieces.learnt() > 0).all()
