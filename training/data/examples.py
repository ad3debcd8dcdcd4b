"""What a run learns from: cached pictures, chats and texts, as ids and labels by direction."""

import logging
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer_hf.errors import DataError
from tokenizer_hf.vocabulary import neutralise
from training.data.code_cache import CodeCache
from training.data.mixing import Pick
from training.data.rendering import Renderer, tokenize
from training.data.sources import Skipped, read_text, report
from training.recipes import DIRECTIONS, DataRecipe
from unimodal.messages import IGNORED, assistant_turns
from unimodal.processing_unimodal import UnimodalProcessor

logger = logging.getLogger(__name__)

TEXTS_AT_ONCE = 1024
"""Texts that are tokenised in one call."""


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        input_ids: int64 (T,).
        labels: int64 (T,), -100 where nothing is learnt; not shifted.
        direction: one of `training.recipes.DIRECTIONS`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    direction: str


class Examples:
    """Everything a run can learn from, by direction.

    - draw: user "Draw: {prompt}" → the picture (a dropped prompt: the empty one)
    - caption: the picture and "Describe the picture." → a caption
    - question: the picture and a question → its answer; where there are to be more, the next → its
    - dialogue: draw, then questions about the picture that was drawn, each with its answer
    - chat: a cached chat with pictures → its assistant turns
    - text: a text or a chat without pictures, learnt as a whole, as `TextExamples` has them: the
      replay keeps what the base could say, user turns too

    Args:
        processor: of the merged model.
        caches: code caches made by the model's image tokenizer.
        text: JSONL files of the text direction.
        max_length: tokens that a text, a chat in words too, is cut into; longer examples of other
            kinds are left out.
        questions: most questions of a question example.
        dialogue_questions: most questions of a dialogue.

    Attributes:
        num_items: number of pictures, texts or chats of each direction.
        left_out: examples that were longer than ``max_length``, so far.

    Raises:
        MismatchError: a cache was made by another image tokenizer.
        CheckpointError: a cache is missing or half built.
        DataError: a text file is missing or has no usable line.
    """

    def __init__(
        self,
        processor: UnimodalProcessor,
        caches: Sequence[str | Path] = (),
        text: Sequence[str | Path] = (),
        max_length: int = 1024,
        questions: int = 1,
        dialogue_questions: int = 2,
    ) -> None:
        self.processor = processor
        self._most_questions = {"question": questions, "dialogue": dialogue_questions}
        self.renderer = Renderer(processor)
        self.max_length = max_length
        self.left_out = 0
        fingerprint = processor.vocabulary.fingerprint
        self.caches = [CodeCache(folder, fingerprint) for folder in caches]
        captioned = _rows([np.diff(cache.caption_offsets) > 0 for cache in self.caches])
        asked = [np.diff(cache.question_offsets) > 0 for cache in self.caches]
        both = [
            has & (np.diff(cache.caption_offsets) > 0)
            for has, cache in zip(asked, self.caches, strict=True)
        ]
        self._rows = {
            "draw": captioned,
            "caption": captioned,
            "question": _rows(asked),
            "dialogue": _rows(both),
            "chat": _rows([cache.has_messages for cache in self.caches]),
        }
        self.texts = read_texts(text, processor.tokenizer, max_length)
        self.num_items = {name: len(rows) for name, rows in self._rows.items()}
        self.num_items["text"] = len(self.texts)

    @classmethod
    def of(cls, processor: UnimodalProcessor, data: DataRecipe) -> "Examples":
        """Return the examples of a recipe."""
        return cls(
            processor,
            data.caches,
            data.text,
            data.max_length,
            data.questions,
            data.dialogue_questions,
        )

    def build(self, picks: Sequence[Pick]) -> list[Example]:
        """Build examples, in the order of ``picks``; those that are too long are left out."""
        plain = {
            i: self.texts[pick.item] for i, pick in enumerate(picks) if pick.direction == "text"
        }
        chats = [i for i in range(len(picks)) if i not in plain]
        rendered = self.renderer.render([self.messages(picks[i]) for i in chats])
        for i, (input_ids, labels) in zip(chats, rendered, strict=True):
            plain[i] = Example(input_ids, labels, picks[i].direction)
        fitting = [e for _, e in sorted(plain.items()) if len(e.input_ids) <= self.max_length]
        self.left_out += len(picks) - len(fitting)
        return fitting

    def messages(self, pick: Pick) -> list[dict[str, Any]]:
        """Return the conversation that a pick stands for, its pictures as codes.

        Of several captions or questions, ``pick.choice`` takes one.
        """
        number, row = self._rows[pick.direction][pick.item]
        cache = self.caches[number]
        if pick.direction == "chat":
            messages = cache.messages(row)
            assert messages is not None
            return messages
        codes: Any = cache.codes(row)
        if cache.manifest.num_codebooks > 1:
            codes = codes.reshape(-1, cache.manifest.num_codebooks)
        image = {"type": "image", "codes": codes.tolist()}
        answer: Any = [image]
        asked: list[tuple[str, str]] = []
        if pick.direction in self._most_questions:
            pairs = cache.questions(row)
            first = pick.choice % len(pairs)
            asked = (pairs[first:] + pairs[:first])[: self._most_questions[pick.direction]]
        if pick.direction == "question":
            (question, answer), *asked = asked
            user = [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
        elif pick.direction == "caption":
            user = self.processor.caption_messages(image)
            answer = cache.caption(_chosen(cache.caption_offsets, row, pick.choice))
        else:
            prompt = "" if pick.dropped else cache.prompt(row, pick.choice)
            user = self.processor.draw_messages(prompt)
        turns = [*user, {"role": "assistant", "content": answer}]
        for question, reply in asked:
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": reply})
        return turns

    def code_shares(self) -> np.ndarray:
        """Tell how much of the cached pictures each code fills.

        Returns:
            float64 (codes of all codebooks,): its share of the codes of its codebook.
        """
        vocabulary = self.processor.vocabulary
        books, size = vocabulary.num_codebooks, vocabulary.codebook_size
        counts = np.zeros((books, size))
        for cache in self.caches:
            chats = np.flatnonzero(cache.has_messages).tolist()
            drawn = [np.ravel(codes) for row in chats for codes in cache.chat_codes(row)]
            values = np.concatenate([cache.code_values, *drawn])
            for book, one in enumerate(counts):
                one += np.bincount(values[book::books], minlength=size)
        return (counts / np.maximum(1, counts.sum(1, keepdims=True))).reshape(-1)

    def mean_loss_tokens(
        self, directions: Collection[str] = DIRECTIONS, samples: int = 256
    ) -> dict[str, float]:
        """Return the mean number of loss tokens of each direction, from evenly spread items.

        Args:
            directions: only these, and of them only those with data.

        Raises:
            DataError: all of the sampled examples of a direction are too long.
        """
        means = {}
        for name, count in self.num_items.items():
            if not count or name not in directions:
                continue
            items = np.unique(np.linspace(0, count - 1, samples).astype(int))
            picks = [Pick(name, int(item), k, False) for k, item in enumerate(items)]
            examples = self.build(picks)
            if not examples:
                raise DataError(
                    f"every {name} example is longer than data.max_length = {self.max_length} "
                    "tokens; set it higher"
                )
            means[name] = float(np.mean([(e.labels[1:] != IGNORED).sum() for e in examples]))
        self.left_out = 0
        return means


class TextExamples:
    """The text direction alone, for a language model that has no image vocabulary yet.

    Chats are worded by the tokenizer's chat template and learnt as a whole, user turns too, but for
    the share ``assistant_only`` of them.
    """

    def __init__(
        self,
        tokenizer: Any,
        text: Sequence[str | Path],
        max_length: int,
        assistant_only: float = 0.0,
    ) -> None:
        self.texts = read_texts(text, tokenizer, max_length, assistant_only)
        if not len(self.texts):
            raise DataError("a text model needs text; give .jsonl files in the recipe's text field")
        self.num_items = {"text": len(self.texts)}
        self.left_out = 0

    def build(self, picks: Sequence[Pick]) -> list[Example]:
        """Return the examples of ``picks``."""
        return [self.texts[pick.item] for pick in picks]

    def mean_loss_tokens(self, directions: Collection[str] = ("text",)) -> dict[str, float]:
        """Return the mean number of loss tokens of a text."""
        return {"text": float(np.mean(self.texts.learnt()))}


class Texts(Sequence[Example]):
    """Texts in four bytes a token; an `Example` is made when asked for.

    Args:
        ids: int32, the token ids of all texts, one after the other; ``~id`` where an id is not
            learnt.
        offsets: int64; text i is ``ids[offsets[i]:offsets[i + 1]]``.
    """

    def __init__(self, ids: np.ndarray, offsets: np.ndarray) -> None:
        self.ids, self.offsets = ids, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        """Return a text, or a list of texts for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        start, stop = self.offsets[index % len(self) :][:2]
        part = self.ids[start:stop].astype(np.int64)
        learnt = part >= 0
        return Example(np.where(learnt, part, ~part), np.where(learnt, part, IGNORED), "text")

    def lengths(self) -> np.ndarray:
        """Return the tokens of each text: int64 (number of texts,)."""
        return np.diff(self.offsets)

    def learnt(self) -> np.ndarray:
        """Return the tokens of each text that are learnt, its first aside: int64 like `lengths`."""
        counted = np.concatenate(([0], np.cumsum(self.ids >= 0)))
        return counted[self.offsets[1:]] - counted[self.offsets[:-1] + 1]


class _Growing:
    """Token ids that come text by text, cut into pieces of ``max_length``."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.ids, self.lengths = array("i"), array("q")

    def add(self, ids: list[int]) -> None:
        """Add a text; a piece in which nothing is learnt behind its first token is left out."""
        for start in range(0, max(len(ids) - 1, 1), self.max_length):
            part = ids[start : start + self.max_length]
            if max(part[1:], default=-1) >= 0:
                self.ids.extend(part)
                self.lengths.append(len(part))


def read_texts(
    files: Sequence[str | Path], tokenizer: Any, max_length: int, assistant_only: float = 0.0
) -> Texts:
    """Read and tokenise text files, a few thousand lines at a time.

    Plain texts come first and end in eos, then chats as the chat template words them; both are cut
    into pieces of ``max_length`` tokens. Control words in what was written are neutralised.

    Args:
        assistant_only: share of the chats, evenly spread, of which only the assistant's turns are
            learnt, each with its end of turn.

    Raises:
        DataError: a file is missing, or no line could be used.
    """
    controls = _controls(tokenizer)
    plain, chats = _Growing(max_length), _Growing(max_length)
    waiting: list[str] = []
    waiting_chats: list[tuple[str, list[tuple[int, int]] | None]] = []

    def flush() -> None:
        if waiting:
            eos = tokenizer.eos_token_id
            for ids in tokenize(tokenizer, waiting, add_special_tokens=True)["input_ids"]:
                plain.add(ids if eos is None or ids[-1:] == [eos] else [*ids, eos])
        waiting.clear()

    def flush_chats() -> None:
        if waiting_chats:
            worded = [text for text, _ in waiting_chats]
            offsets = assistant_only > 0
            read = tokenize(tokenizer, worded, add_special_tokens=False, offsets=offsets)
            for index, (ids, (_, answers)) in enumerate(
                zip(read["input_ids"], waiting_chats, strict=True)
            ):
                if answers is not None:
                    ids = _learnt_alone(ids, read["offset_mapping"][index], answers)
                chats.add(ids)
        waiting_chats.clear()

    skipped = lines = number = 0
    for line in read_text(files):
        lines += 1
        if isinstance(line, Skipped):
            report(line, skipped)
            skipped += 1
        elif isinstance(line, str):
            waiting.append(neutralise(line, controls))
            if len(waiting) == TEXTS_AT_ONCE:
                flush()
        else:
            said = [{**m, "content": neutralise(m["content"], controls)} for m in line]
            text = tokenizer.apply_chat_template(said, tokenize=False)
            number += 1
            alone = int(number * assistant_only) > int((number - 1) * assistant_only)
            waiting_chats.append((text, _answers(tokenizer, said, text) if alone else None))
            if len(waiting_chats) == TEXTS_AT_ONCE:
                flush_chats()
    flush()
    flush_chats()
    if skipped:
        logger.warning("%s: %d lines skipped", ", ".join(map(str, files)), skipped)
    if files and skipped == lines:
        raise DataError(f"no usable line in {', '.join(map(str, files))}; see docs/data_formats.md")
    ids = np.concatenate([np.frombuffer(kind.ids, np.int32) for kind in (plain, chats)])
    lengths = np.concatenate([np.frombuffer(kind.lengths, np.int64) for kind in (plain, chats)])
    return Texts(ids, np.concatenate(([0], np.cumsum(lengths))))


def _answers(tokenizer: Any, messages: Any, text: str) -> list[tuple[int, int]]:
    """(first character, last + 1) of the assistant's turns in a chat as it is worded."""

    def worded(count: int, add_generation_prompt: bool) -> str:
        said = messages[:count]
        return tokenizer.apply_chat_template(
            said, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    turns = assistant_turns(text, [message["role"] for message in messages], worded)
    return [(first, len(text[:last].rstrip())) for _, first, last in turns]


def _learnt_alone(
    ids: list[int], where: list[tuple[int, int]], answers: list[tuple[int, int]]
) -> list[int]:
    """The ids of a text; ``~id`` of those that do not begin within an answer."""
    inside = [any(first <= start < last for first, last in answers) for start, _ in where]
    return [i if learnt else ~i for i, learnt in zip(ids, inside, strict=True)]


def _controls(tokenizer: Any) -> frozenset[str]:
    return frozenset(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)


def _rows(usable: Sequence[np.ndarray]) -> np.ndarray:
    """Return (cache, row) of every usable row: int64 (N, 2)."""
    found = [
        np.stack((np.full(int(mask.sum()), cache), np.flatnonzero(mask)), axis=1)
        for cache, mask in enumerate(usable)
    ]
    return np.concatenate(found) if found else np.empty((0, 2), dtype=np.int64)


def _chosen(offsets: np.ndarray, row: int, choice: int) -> int:
    start, stop = offsets[row : row + 2]
    return int(start + choice % (stop - start))
