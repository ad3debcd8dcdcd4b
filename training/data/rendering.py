"""Many conversations → ids and labels, exactly as ``messages.render`` gives them, 20× faster.

Rendering one conversation costs milliseconds of templates and small tokenizer calls; a small model
learns from it in less. Training sees few *shapes* of conversations (who speaks, where pictures
stand) with ever new texts. So the chat template words each shape once, with a marker for every
text; a batch of texts is put in, tokenised in one call, and the codes are spliced in. A template
may change texts on their way, so the first conversations of each shape are rendered both ways: a
shape for which the results differ is rendered the plain way for good.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tokenizer_hf.errors import MessageError
from tokenizer_hf.vocabulary import control_strings, neutralise
from unimodal.messages import IGNORED
from unimodal.processing_unimodal import UnimodalProcessor

logger = logging.getLogger(__name__)

Ids = tuple[np.ndarray, np.ndarray]
Key = tuple[tuple[str, tuple[str, ...]], ...]

CHECKS_PER_SHAPE = 8
MOST_SHAPES = 256
MARKER = re.compile("\ue000([0-9]+)\ue001")  # private-use characters: no template touches them


@dataclass(frozen=True)
class _Words:
    """A conversation taken apart: its shape, its texts and its pictures' codes."""

    shape: Key
    texts: list[str]
    codes: list[Any]


@dataclass
class _Turn:
    """An assistant turn of a shape: the text before it, the text up to its end."""

    prompt: str
    done: str
    behind: int
    """Ids after the end-of-turn id that are in ``done`` and not learnt: a line break, usually."""


@dataclass
class _Shape:
    whole: str
    turns: list[_Turn]
    exact: bool = True
    checks: int = CHECKS_PER_SHAPE


class Renderer:
    """Renders conversations whose pictures come as codes.

    Args:
        processor: of the merged model; its image tokenizer is not needed.
    """

    def __init__(self, processor: UnimodalProcessor) -> None:
        self.processor = processor
        self.vocabulary = processor.vocabulary
        controls = control_strings(processor.tokenizer, processor.vocabulary)
        self._neutral = partial(neutralise, strings=controls)
        self._shapes: dict[Key, _Shape] = {}

    def render(self, conversations: Sequence[Sequence[dict[str, Any]]]) -> list[Ids]:
        """Render conversations.

        Args:
            conversations: messages as ``messages.render`` takes them, image parts with "codes".

        Returns:
            for each, (input_ids, labels): int64 (T,), labels -100 where nothing is learnt.

        Raises:
            MessageError, CodeError, VocabularyError: as ``messages.render``.
        """
        words = [self._take_apart(messages) for messages in conversations]
        shapes = [self._shape(one) for one in words]
        fast = self._fast(words, shapes)
        for i, (one, shape) in enumerate(zip(fast, shapes, strict=True)):
            if one is not None and shape is not None and shape.checks and shape.exact:
                shape.checks -= 1
                plain = self.plain(conversations[i])
                shape.exact = all(map(np.array_equal, one, plain))
                if not shape.exact:
                    logger.warning(
                        "the chat template changes texts on their way; conversations such as this "
                        "are rendered one by one, which is slower: %.200s",
                        conversations[i],
                    )
        return [
            one if one is not None and shape is not None and shape.exact else self.plain(messages)
            for one, shape, messages in zip(fast, shapes, conversations, strict=True)
        ]

    def plain(self, messages: Sequence[dict[str, Any]]) -> Ids:
        """Render one conversation through ``messages.render``."""
        rendered = self.processor.render(messages)
        return np.array(rendered.input_ids), np.array(rendered.labels)

    def _take_apart(self, messages: Sequence[dict[str, Any]]) -> _Words | None:
        shape: list[tuple[str, list[str]]] = []
        texts: list[str] = []
        codes: list[Any] = []
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            kinds: list[str] = []
            for part in parts:
                if part["type"] != "text":
                    kinds.append("image")
                    codes.append(part["codes"])
                elif kinds[-1:] == ["text"]:
                    texts[-1] += part["text"]  # parts that meet are one text, as in render
                else:
                    kinds.append("text")
                    texts.append(part["text"])
            shape.append((message["role"], kinds))
        if any("think>" in text for text in texts):
            return None  # many templates look for reasoning inside the text
        # Templates like to trim; a text with outer space is a shape of its own, checked by itself.
        outer = iter("" if text == text.strip() else " " for text in texts)
        key = tuple(
            (role, tuple(k + (next(outer) if k == "text" else "") for k in kinds))
            for role, kinds in shape
        )
        return _Words(key, [self._neutral(text) for text in texts], codes)

    def _shape(self, words: _Words | None) -> _Shape | None:
        if words is None:
            return None
        if words.shape not in self._shapes:
            if len(self._shapes) == MOST_SHAPES:
                return None
            self._shapes[words.shape] = self._word(words)
        shape = self._shapes[words.shape]
        return shape if shape.exact else None

    def _word(self, words: _Words) -> _Shape:
        """Let the chat template word a shape, with markers in the place of the texts."""
        messages, number, codes = [], 0, iter(words.codes)
        for role, kinds in words.shape:
            content: list[dict[str, Any]] = []
            for kind in kinds:
                if kind == "image":
                    content.append({"type": "image", "codes": next(codes)})
                else:
                    content.append({"type": "text", "text": f"\ue000{number}\ue001"})
                    number += 1
            messages.append({"role": role, "content": content})
        word = self.processor.apply_chat_template
        try:
            whole = word(messages)
            learnt = self.processor.render(messages).learnt
            turns = []
            for index, (role, _) in enumerate(words.shape):
                if role == "assistant":
                    prompt = word(messages[:index], add_generation_prompt=True)
                    done = word(messages[: index + 1])
                    if not whole.startswith(done) or not done.startswith(prompt):
                        return _Shape(whole, [], exact=False)
                    turns.append(_Turn(prompt, done, 0))
        except MessageError:
            return _Shape("", [], exact=False)
        if len(turns) != len(learnt) or set(MARKER.findall(whole)) != set(map(str, range(number))):
            return _Shape(whole, [], exact=False)
        for turn, span in zip(turns, learnt, strict=True):
            marked = self._tokenize([turn.done])[0]
            pictures = marked.count(self.vocabulary.start_token_id)
            extra = sum(len(self.vocabulary.span(one)) - 2 for one in words.codes[:pictures])
            turn.behind = len(marked) + extra - span.stop
        return _Shape(whole, turns)

    def _fast(
        self, words: Sequence[_Words | None], shapes: Sequence[_Shape | None]
    ) -> list[Ids | None]:
        texts: list[list[tuple[str, str]] | None] = []
        for one, shape in zip(words, shapes, strict=True):
            if one is None or shape is None:
                texts.append(None)
            else:
                put = partial(MARKER.sub, lambda found, t=one.texts: t[int(found[1])])
                whole = put(shape.whole)
                pairs = [
                    (put(turn.prompt), whole if turn.done == shape.whole else put(turn.done))
                    for turn in shape.turns
                ]
                texts.append([*pairs, ("", whole)])
        unique = list(dict.fromkeys(t for row in texts if row for pair in row for t in pair if t))
        ids = dict(zip(unique, self._tokenize(unique), strict=True)) if unique else {}
        return [
            self._join(one, shape, row, ids) if one and shape and row else None
            for one, shape, row in zip(words, shapes, texts, strict=True)
        ]

    def _join(
        self,
        words: _Words,
        shape: _Shape,
        texts: list[tuple[str, str]],
        ids: dict[str, list[int]],
    ) -> Ids | None:
        """Splice the codes in and label the turns; None if the tokenizer joins over a border."""
        *pairs, (_, whole_text) = texts
        whole = ids[whole_text]
        filled: list[int] = []
        grown: list[tuple[int, int]] = []
        done = 0
        for codes in words.codes:
            span = self.vocabulary.span(codes)
            at = whole.index(span[0], done) + 1
            filled += whole[done:at] + span[1:-1]
            grown.append((at, len(span) - 2))
            done = at
        filled += whole[done:]
        input_ids = np.array(filled)
        labels = np.full(len(filled), IGNORED)
        for turn, (prompt, until) in zip(shape.turns, pairs, strict=True):
            head, body = ids[prompt], ids[until]
            if whole[: len(head)] != head or whole[: len(body)] != body:
                return None
            first, stop = (
                n + sum(extra for at, extra in grown if n >= at) for n in (len(head), len(body))
            )
            stop -= turn.behind
            labels[first:stop] = input_ids[first:stop]
        return input_ids, labels

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        read = tokenize(self.processor.tokenizer, texts, add_special_tokens=False)
        return read["input_ids"]


def tokenize(
    tokenizer: Any, texts: list[str], *, add_special_tokens: bool, offsets: bool = False
) -> Any:
    """Tokenise many texts in one call: ``input_ids``, with ``offsets`` ``offset_mapping`` too."""
    return tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )
