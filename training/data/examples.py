"""Cached codes and texts → token ids and labels, exactly as ``messages.render`` gives them.

Rendering one chat costs about a millisecond of templates and Python; a small model learns from it
in less. So each direction's template is worded once, with a marker where the text goes; a batch of
texts is put in, tokenised in one call, and the codes are spliced in. Whether that gives the same
ids as ``render`` is checked on real examples when the data are opened (a chat template may change
the text on its way); where it does not, ``render`` itself is used.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer_hf.errors import DataError
from tokenizer_hf.vocabulary import control_strings, neutralise
from training.data.code_cache import CodeCache
from training.data.mixing import Pick
from training.data.sources import Skipped, read_text, report
from unimodal.messages import IGNORED
from unimodal.processing_unimodal import UnimodalProcessor

logger = logging.getLogger(__name__)

MARKER = (
    "\ue000text\ue000"  # private-use characters: no caption holds them, no template touches them
)
CHECKED_EXAMPLES = 16


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        input_ids: int64 (T,).
        labels: int64 (T,), -100 where nothing is learnt; not shifted.
        direction: "draw", "caption", "question", "text" or "chat".
    """

    input_ids: np.ndarray
    labels: np.ndarray
    direction: str


class Examples:
    """Everything a run can learn from, by direction.

    Args:
        processor: of the merged model.
        caches: code caches made by the model's image tokenizer.
        text: JSONL files of the text direction.
        max_length: tokens a plain text is cut into; a longer example of another kind is left out.

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
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.left_out = 0
        vocabulary = processor.vocabulary
        self.caches = [CodeCache(folder, vocabulary.fingerprint) for folder in caches]
        self._token_ids = [_code_token_ids(cache, vocabulary) for cache in self.caches]
        captioned = [np.diff(cache.caption_offsets) > 0 for cache in self.caches]
        asked = [np.diff(cache.question_offsets) > 0 for cache in self.caches]
        chats = [cache.has_messages for cache in self.caches]
        self._rows = {
            "draw": _rows(captioned),
            "caption": _rows(captioned),
            "question": _rows(asked),
            "chat": _rows(chats),
        }
        self.texts = tokenize_texts(
            text, processor.tokenizer, max_length, render=self._render_text_chat
        )
        self.num_items = {name: len(rows) for name, rows in self._rows.items()}
        self.num_items["text"] = len(self.texts)
        controls = control_strings(processor.tokenizer, vocabulary)
        self._neutral = partial(neutralise, strings=controls)
        self._templates = {
            name: _Template(name, processor)
            for name in ("draw", "caption", "question")
            if self.num_items[name]
        }
        kinds = [(name, False) for name in self._templates]
        kinds += [("draw", True)] if "draw" in self._templates else []
        self._exact = {kind for kind in kinds if self._template_is_exact(*kind)}

    def build(self, picks: Sequence[Pick]) -> list[Example]:
        """Build examples, leaving out those that are too long.

        Returns:
            the examples in the order of ``picks``.
        """
        built: list[Example | None] = [None] * len(picks)
        for name, template in self._templates.items():
            chosen = [
                i
                for i, pick in enumerate(picks)
                if pick.direction == name and (name, pick.dropped) in self._exact
            ]
            if chosen:
                examples = self._fast(template, [picks[i] for i in chosen])
                for i, example in zip(chosen, examples, strict=True):
                    built[i] = example
        for i, pick in enumerate(picks):
            if pick.direction == "text":
                built[i] = self.texts[pick.item]
            elif (pick.direction, pick.dropped) not in self._exact:
                built[i] = self.render(pick)
        examples = [example for example in built if example is not None]
        fitting = [e for e in examples if len(e.input_ids) <= self.max_length]
        self.left_out += len(examples) - len(fitting)
        return fitting

    def messages(self, pick: Pick) -> list[dict[str, Any]]:
        """Return the chat that an example stands for, its image part holding codes."""
        cache, row = self._row(pick)
        if pick.direction == "chat":
            messages = cache.messages(row)
            assert messages is not None
            return messages
        image = {"type": "image", "codes": self._shaped_codes(cache, row)}
        prompt, answer = self._words(pick)
        if pick.direction == "draw":
            user = self.processor.draw_messages("" if pick.dropped else prompt)
            return [*user, {"role": "assistant", "content": [image]}]
        return [*_ask(self.processor, image, prompt), {"role": "assistant", "content": answer}]

    def render(self, pick: Pick) -> Example:
        """Build one example the plain way, through ``messages.render``."""
        rendered = self.processor.render(self.messages(pick))
        return Example(np.array(rendered.input_ids), np.array(rendered.labels), pick.direction)

    def mean_loss_tokens(self, samples: int = 256) -> dict[str, float]:
        """Return the mean number of loss tokens of each direction, from evenly spread items.

        Raises:
            DataError: all of the sampled examples of a direction are too long.
        """
        means = {}
        for name, count in self.num_items.items():
            if not count:
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

    def _row(self, pick: Pick) -> tuple[CodeCache, int]:
        cache, row = self._rows[pick.direction][pick.item]
        return self.caches[cache], int(row)

    def _words(self, pick: Pick) -> tuple[str, str]:
        """Return (user's text, assistant's text) of a picture example, its choice made."""
        cache, row = self._row(pick)
        offsets = cache.question_offsets if pick.direction == "question" else cache.caption_offsets
        start, stop = offsets[row : row + 2]
        position = int(start + pick.choice % (stop - start))
        if pick.direction == "question":
            return cache.question(position)
        caption = cache.caption(position)
        return (caption, "") if pick.direction == "draw" else ("", caption)

    def _shaped_codes(self, cache: CodeCache, row: int) -> list[Any]:
        codes, groups = cache.codes(row), cache.manifest.num_codebooks
        return codes.reshape(-1, groups).tolist() if groups > 1 else codes.tolist()

    def _fast(self, template: "_Template", picks: Sequence[Pick]) -> list[Example]:
        words = [("", "") if pick.dropped else self._words(pick) for pick in picks]
        texts = [template.fill(user, assistant, self._neutral) for user, assistant in words]
        prompts, wholes = zip(*texts, strict=True)
        unique = list(dict.fromkeys(prompts))
        ids = _tokenize(self.processor.tokenizer, [*unique, *wholes])
        prompt_ids = dict(zip(unique, ids, strict=False))
        built: list[Example] = []
        for pick, prompt, whole in zip(picks, prompts, ids[len(unique) :], strict=True):
            head = prompt_ids[prompt]
            if whole[: len(head)] != head:  # the tokenizer joins over the border
                built.append(self.render(pick))
            else:
                cache, row = self._rows[pick.direction][pick.item]
                offsets = self.caches[cache].code_offsets
                codes = self._token_ids[cache][offsets[row] : offsets[row + 1]]
                built.append(template.splice(whole, len(head), codes))
        return built

    def _template_is_exact(self, name: str, dropped: bool) -> bool:
        items = np.unique(np.linspace(0, self.num_items[name] - 1, CHECKED_EXAMPLES).astype(int))
        picks = [Pick(name, int(item), k, dropped) for k, item in enumerate(items)]
        for pick, fast in zip(picks, self._fast(self._templates[name], picks), strict=True):
            slow = self.render(pick)
            if not (
                np.array_equal(fast.input_ids, slow.input_ids)
                and np.array_equal(fast.labels, slow.labels)
            ):
                logger.warning(
                    "the chat template changes %s texts on their way; rendering each %s example by "
                    "itself, which is slower",
                    "empty" if dropped else name,
                    "prompt-less" if dropped else name,
                )
                return False
        return True

    def _render_text_chat(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        rendered = self.processor.render(messages)
        return rendered.input_ids, rendered.labels


class TextExamples:
    """The text direction alone, for a language model that has no image vocabulary yet.

    Chats are worded by the tokenizer's chat template and learnt as a whole, user turns too.
    """

    def __init__(self, tokenizer: Any, text: Sequence[str | Path], max_length: int) -> None:
        def render(messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
            worded = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(worded, add_special_tokens=False)["input_ids"]
            return ids, list(ids)

        self.texts = tokenize_texts(text, tokenizer, max_length, render)
        if not self.texts:
            raise DataError("a text model needs text; give .jsonl files in the recipe's text field")
        self.num_items = {"text": len(self.texts)}
        self.left_out = 0

    def build(self, picks: Sequence[Pick]) -> list[Example]:
        """Return the examples of ``picks``."""
        return [self.texts[pick.item] for pick in picks]

    def mean_loss_tokens(self) -> dict[str, float]:
        """Return the mean number of loss tokens of a text."""
        return {"text": float(np.mean([len(text.labels) - 1 for text in self.texts[:1024]]))}


def tokenize_texts(
    files: Sequence[str | Path],
    tokenizer: Any,
    max_length: int,
    render: Callable[[list[dict[str, Any]]], tuple[list[int], list[int]]],
) -> list[Example]:
    """Read and tokenise text files: plain text ends in eos and is cut into pieces of ``max_length``.

    Args:
        render: makes (input_ids, labels) of a chat line.

    Raises:
        DataError: a file is missing, or no line could be used.
    """
    plain: list[str] = []
    examples: list[Example] = []
    skipped: list[Skipped] = []
    for line in read_text(files):
        if isinstance(line, Skipped):
            report(line, len(skipped))
            skipped.append(line)
        elif isinstance(line, str):
            plain.append(line)
        else:
            ids, labels = render(line)
            if len(ids) <= max_length and any(label != IGNORED for label in labels[1:]):
                examples.append(Example(np.array(ids), np.array(labels), "text"))
            else:
                skipped.append(
                    Skipped(0, str(files), f"a chat of {len(ids)} tokens, nothing learnt")
                )
                report(skipped[-1], len(skipped) - 1)
    controls = frozenset(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    plain = [neutralise(text, controls) for text in plain]
    for start in range(0, len(plain), 4096):
        for ids in _tokenize(tokenizer, plain[start : start + 4096], add_special_tokens=True):
            if ids[-1:] != [tokenizer.eos_token_id] and tokenizer.eos_token_id is not None:
                ids = [*ids, tokenizer.eos_token_id]
            for piece in range(0, max(len(ids) - 1, 1), max_length):
                part = np.array(ids[piece : piece + max_length])
                if len(part) > 1:
                    examples.append(Example(part, part, "text"))
    if skipped:
        logger.warning("%s: %d lines skipped", ", ".join(map(str, files)), len(skipped))
    if files and not examples:
        raise DataError(f"no usable line in {', '.join(map(str, files))}; see docs/data_formats.md")
    return examples


class _Template:
    """The words around the text of one direction, as the chat template puts them."""

    def __init__(self, name: str, processor: UnimodalProcessor) -> None:
        vocabulary = processor.vocabulary
        self.name = name
        self.instruction = processor.draw_instruction if name == "draw" else None
        self.pair = [vocabulary.start_token_id, vocabulary.end_token_id]
        # The fewest codes that a picture may have: only their place matters here.
        codes: Any = [0] * vocabulary.min_tokens
        if vocabulary.num_codebooks > 1:
            codes = [[0] * vocabulary.num_codebooks for _ in codes]
        image = {"type": "image", "codes": codes}
        answer: Any = MARKER
        if name == "draw":
            user = [{"role": "user", "content": MARKER}]
            answer = [image]
        elif name == "caption":
            user = _ask(processor, image, "")
        else:
            user = _ask(processor, image, MARKER)
            answer = MARKER + "2"
        whole = [*user, {"role": "assistant", "content": answer}]
        self.prompt: str = processor.apply_chat_template(user, add_generation_prompt=True)
        self.whole: str = processor.apply_chat_template(whole)
        # Ids behind the end of the turn (a line break, usually) are in the text and are not learnt.
        labels = processor.render(whole).labels
        self.behind = next(i for i, label in enumerate(reversed(labels)) if label != IGNORED)

    def fill(self, user: str, assistant: str, neutral: Callable[[str], str]) -> tuple[str, str]:
        """Return the generation prompt and the whole chat with the texts put in."""
        if self.instruction is not None:
            user = self.instruction.replace("{prompt}", user)
        user, assistant = neutral(user), neutral(assistant)
        if self.name == "caption":
            return self.prompt, self.whole.replace(MARKER, assistant)
        whole = self.whole.replace(MARKER + "2", assistant) if assistant else self.whole
        return self.prompt.replace(MARKER, user), whole.replace(MARKER, user, 1)

    def splice(self, ids: list[int], prompt_length: int, codes: np.ndarray) -> Example:
        """Put codes between the start and end ids; label what stands behind the prompt."""
        at = ids.index(self.pair[0]) + 1
        input_ids = np.concatenate((ids[:at], codes, ids[at:])).astype(np.int64)
        first = prompt_length if at > prompt_length else prompt_length + len(codes)
        labels = np.full(len(input_ids), IGNORED, dtype=np.int64)
        stop = len(input_ids) - self.behind
        labels[first:stop] = input_ids[first:stop]
        return Example(input_ids, labels, self.name)


def _ask(processor: UnimodalProcessor, image: Any, question: str) -> list[dict[str, Any]]:
    """A user turn with a picture and a question; without one, the caption instruction."""
    if not question:
        return processor.caption_messages(image)
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def _tokenize(
    tokenizer: Any, texts: list[str], add_special_tokens: bool = False
) -> list[list[int]]:
    return tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _rows(usable: Sequence[np.ndarray]) -> np.ndarray:
    """Return (cache, row) of every usable row: int64 (N, 2)."""
    found = [
        np.stack((np.full(int(mask.sum()), cache), np.flatnonzero(mask)), axis=1)
        for cache, mask in enumerate(usable)
    ]
    return np.concatenate(found) if found else np.empty((0, 2), dtype=np.int64)


def _code_token_ids(cache: CodeCache, vocabulary: Any) -> np.ndarray:
    groups = cache.manifest.num_codebooks
    values = cache.code_values
    return vocabulary.to_token_ids(values.reshape(-1, groups) if groups > 1 else values).reshape(-1)
