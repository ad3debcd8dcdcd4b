"""Chat messages <-> token ids and labels: ``render`` and its inverse ``parse``.

A message is ``{"role": ..., "content": ...}``. The content is a string or a list of parts:

- ``{"type": "text", "text": "..."}``
- ``{"type": "image", "image": X}``, X a PIL image, a path, bytes, a numpy array or a data URI
- ``{"type": "image", "codes": [...]}``, a picture that is already encoded
- ``{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}``, the OpenAI shape;
  data URIs only, nothing is ever fetched and no path is ever opened through it

The base model's own chat template does the wording. Each image becomes
``<|image_start|><|image_end|>`` inside the text that the template sees; the tokenizer reads the
whole text once; then each such pair of ids is filled with the ids of the codes. What people wrote
is neutralised first, so no text can spell a control token or an image.
"""

import base64
import binascii
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

from tokenizer_hf.errors import CodeError, ImageError, MessageError, VocabularyError
from tokenizer_hf.vocabulary import ImageVocabulary, harmless, harmless_values

Message = dict[str, Any]
Direction = Literal["text-to-image", "image-to-text", "text"]
EncodeImages = Callable[[list[Any]], Sequence[Any]]

IGNORED = -100  # the label of an id that is not learnt
TEMPLATE_DEFAULTS = {"enable_thinking": False}  # a reply begins where the generation prompt ends


@dataclass(frozen=True)
class LearntSpan:
    """The ids of one assistant turn that training learns."""

    start: int
    stop: int
    """Half-open, in ``Rendered.input_ids``; the end-of-turn id is inside."""
    direction: Direction
    """Text-to-image if the turn holds a picture, image-to-text if one came before it."""


@dataclass(frozen=True)
class Rendered:
    """One conversation as ids."""

    input_ids: list[int]
    labels: list[int]
    """``input_ids`` where the id is learnt, else -100. The same length; not shifted."""
    spans: list[tuple[int, int]]
    """Half-open positions of each image, start and end ids included."""
    learnt: list[LearntSpan]


@dataclass(frozen=True)
class TextPart:
    """Text of a reply."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """A picture of a reply, not yet decoded."""

    codes: list[Any]
    """``(L,)`` or, with G > 1 codebooks, ``(L, G)`` integers in ``[0, codebook_size)``."""


@dataclass
class _Turn:
    role: str
    text: str  # neutralised, with a start-end pair for each image
    codes: list[Any] = field(default_factory=list)


# --- messages -> ids ------------------------------------------------------------------------------


def render(
    messages: Sequence[Message],
    tokenizer: Any,
    vocabulary: ImageVocabulary,
    encode_images: EncodeImages | None = None,
    *,
    add_generation_prompt: bool = False,
    chat_template: str | None = None,
    **template_values: Any,
) -> Rendered:
    """Turn a conversation into ids and labels.

    Learnt are the assistant turns, from the first id behind the generation prompt to the
    end-of-turn id, image ids included. What is supervised always begins with exactly the ids that
    generation is prompted with; an earlier turn that the template words otherwise once another turn
    follows (some templates drop its reasoning block) is not learnt.

    Args:
        messages: see the module's docstring.
        tokenizer: the extended text tokenizer, with a chat template.
        vocabulary: the image vocabulary bound to its ids.
        encode_images: maps a list of image sources to their codes. Needed where a part has no
            codes.
        add_generation_prompt: end with the words that open an assistant turn.
        chat_template: used in place of the tokenizer's own.
        template_values: variables of the template, ``tools=...`` for example. ``enable_thinking``
            is False unless given.

    Raises:
        MessageError: messages of an unknown shape, or that the template refuses.
        ImageError: a picture that cannot be read, or an address that is no data URI.
        CodeError, VocabularyError: codes that this vocabulary does not have.

    Source: the properties that a rendering must have are those of tinker-cookbook's
    ``renderers/README.md``; tests/unimodal/test_messages.py states ours.
    """
    [messages] = with_codes([messages], encode_images)
    turns = _turns(messages, tokenizer, vocabulary)
    chat = _Chat(turns, tokenizer, vocabulary, chat_template, template_values)
    text = chat.text(len(turns), add_generation_prompt)
    answers = assistant_turns(text, [turn.role for turn in turns], chat.text)
    breaks = chat.breaks(text, [start for _, start, _ in answers])
    marked = chat.encode(text, breaks)
    filled, position, spans = _fill(marked, vocabulary, [c for turn in turns for c in turn.codes])

    labels = [IGNORED] * len(filled)
    learnt = []
    for turn, first, last in answers:
        start = position[len(chat.encode(text[:first], breaks))]
        stop = position[chat.stop_of_turn(marked, len(chat.encode(text[:last], breaks)))]
        if start < stop:
            labels[start:stop] = filled[start:stop]
            learnt.append(LearntSpan(start, stop, _direction(turns, turn)))
    return Rendered(filled, labels, spans, learnt)


def render_text(
    messages: Sequence[Message],
    tokenizer: Any,
    vocabulary: ImageVocabulary,
    *,
    add_generation_prompt: bool = False,
    chat_template: str | None = None,
    **template_values: Any,
) -> str:
    """The text that ``render`` gives to the tokenizer; pictures are unfilled start-end pairs."""
    turns = _turns(messages, tokenizer, vocabulary, need_codes=False)
    chat = _Chat(turns, tokenizer, vocabulary, chat_template, template_values)
    return chat.text(len(turns), add_generation_prompt)


def with_codes(
    conversations: Sequence[Sequence[Message]], encode_images: EncodeImages | None
) -> list[list[Message]]:
    """Copies of the conversations whose pictures have codes; all are encoded in one call."""
    conversations = [_checked(messages) for messages in conversations]
    parts = [
        part
        for messages in conversations
        for message in messages
        for part in _parts(message)
        if _is_image(part) and part.get("codes") is None
    ]
    if parts and encode_images is None:
        raise MessageError(
            f"{len(parts)} pictures came without codes, and this processor was loaded without its "
            'image tokenizer; give {"type": "image", "codes": [...]} or load the processor with it'
        )
    sources = [image_source(part) for part in parts]
    codes = encode_images(sources) if parts and encode_images is not None else []
    found = {id(part): code for part, code in zip(parts, codes, strict=True)}
    return [
        [
            message
            if isinstance(message["content"], str)
            else {
                **message,
                "content": [
                    {**part, "codes": found[id(part)]} if id(part) in found else part
                    for part in message["content"]
                ],
            }
            for message in messages
        ]
        for messages in conversations
    ]


def image_source(part: Message) -> Any:
    """What an image part shows: a PIL image, path, bytes or array. Data URIs come out as bytes.

    Raises:
        ImageError: an http(s) or hub address, or base64 that cannot be read. Nothing is ever
            fetched.
        MessageError: the part names no picture.
    """
    if part["type"] == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise MessageError('an image_url part without {"image_url": {"url": "data:..."}}')
        if not url.startswith("data:"):
            raise ImageError(
                f"image_url {url[:60]!r} is no data URI; expected data:image/png;base64,... "
                "(nothing is fetched and no file is opened on a message's behalf)"
            )
        return _data_uri(url)
    source = next(
        (part[key] for key in ("image", "path", "url") if part.get(key) is not None), None
    )
    if source is None:
        raise MessageError(
            f'an image part with the keys {sorted(part)}; expected "image" (PIL image, path, '
            'bytes, data URI) or "codes"'
        )
    if isinstance(source, str):
        if source.startswith("data:"):
            return _data_uri(source)
        if "://" in source:
            raise ImageError(
                f"picture {source[:60]!r} is an address; nothing is fetched: download it and give "
                "its path"
            )
    return source


def _data_uri(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ImageError(f"data URI {uri[:40]!r}...; expected data:image/png;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"data URI whose base64 cannot be read: {error}") from error


def _checked(messages: Sequence[Message]) -> list[Message]:
    if isinstance(messages, str | dict) or not isinstance(messages, Sequence):
        raise MessageError(
            f"a conversation of type {type(messages).__name__}; expected a list of messages"
        )
    if not messages:
        raise MessageError("an empty conversation; expected at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise MessageError(
                f'message {index} is {message!r:.80}; expected {{"role", "content"}}'
            )
        for part in _parts(message):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "image", "image_url"):
                raise MessageError(
                    f"message {index} has a part {part!r:.80}; expected the type text, image or "
                    "image_url"
                )
            if kind == "text" and not isinstance(part.get("text"), str):
                raise MessageError(f'message {index} has a text part without a string "text"')
    return list(messages)


def _parts(message: Message) -> list[Message]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list | tuple):
        return list(content)
    raise MessageError(
        f"a {message.get('role')} message whose content is {type(content).__name__}; "
        "expected a string or a list of parts"
    )


def _is_image(part: Message) -> bool:
    return part["type"] != "text"


def _turns(
    messages: Sequence[Message],
    tokenizer: Any,
    vocabulary: ImageVocabulary,
    need_codes: bool = True,
) -> list[_Turn]:
    """Each message as text with markers; runs of text are neutralised as a whole."""
    clean = partial(harmless, tokenizer=tokenizer, extension=vocabulary)
    turns = []
    for message in _checked(messages):
        turn, run = _Turn(clean(message["role"]), ""), ""
        for part in _parts(message):
            if _is_image(part):
                turn.text += clean(run) + vocabulary.start_string + vocabulary.end_string
                turn.codes.append(part["codes"] if need_codes else part.get("codes"))
                run = ""
            else:
                run += part["text"]
        turn.text += clean(run)
        turns.append(turn)
    return turns


def _direction(turns: list[_Turn], index: int) -> Direction:
    if turns[index].codes:
        return "text-to-image"
    return "image-to-text" if any(turn.codes for turn in turns[:index]) else "text"


def assistant_turns(
    text: str, roles: Sequence[str], worded: Callable[[int, bool], str]
) -> list[tuple[int, int, int]]:
    """Find the assistant's turns in a conversation as a chat template words it.

    Args:
        text: the whole conversation in words.
        roles: who speaks, turn by turn.
        worded: given n and whether the generation prompt follows, the first n turns in words; a
            MessageError where the template refuses so few.

    Returns:
        (turn, first character, last character + 1) of each that can be learnt: those whose
        generation prompt, and words, are where they are in ``text``.
    """
    found = []
    for index, role in enumerate(roles):
        if role != "assistant":
            continue
        try:
            prompt = worded(index, True)
        except MessageError:  # a template that has no words for an empty or cut conversation
            continue
        last = index == len(roles) - 1
        done = worded(index + 1, False)
        if text.startswith(prompt) and done.startswith(prompt):
            if text.startswith(done):
                found.append((index, len(prompt), len(done)))
            elif last:
                found.append((index, len(prompt), len(text)))
    return found


class _Chat:
    """The turns of one conversation, worded by the chat template and read by the tokenizer."""

    def __init__(
        self,
        turns: list[_Turn],
        tokenizer: Any,
        vocabulary: ImageVocabulary,
        chat_template: str | None,
        template_values: dict[str, Any],
    ) -> None:
        self.turns = turns
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.chat_template = chat_template
        clean = partial(harmless, tokenizer=tokenizer, extension=vocabulary)
        self.template_values = {**TEMPLATE_DEFAULTS, **harmless_values(template_values, clean)}

    def text(self, num_turns: int, add_generation_prompt: bool) -> str:
        """The first turns as the template words them."""
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.text} for turn in self.turns[:num_turns]],
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.template_values,
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(turn.role for turn in self.turns[:num_turns])
            raise MessageError(
                f"the model's chat template refuses messages with the roles [{roles}]: {error}"
            ) from error

    def breaks(self, text: str, boundaries: list[int]) -> list[int]:
        """The boundaries at which the tokenizer would join an answer with the words before it.

        There the text is read in two pieces, so that a supervised prefix is the generation prompt.
        """
        breaks: list[int] = []
        for boundary in boundaries:
            prompt = self.encode(text[:boundary], breaks)
            if self.encode(text, breaks)[: len(prompt)] != prompt:
                breaks.append(boundary)
        return breaks

    def encode(self, text: str, breaks: list[int]) -> list[int]:
        """Token ids of the text, images unfilled."""
        edges = [0, *(b for b in breaks if b < len(text)), len(text)]
        ids: list[int] = []
        for first, last in itertools.pairwise(edges):
            if first == 0:
                ids += self._ids(text[:last])
            else:  # read behind a control token, so that nothing is put before the piece
                ids += self._ids(self.vocabulary.end_string + text[first:last])[1:]
        return ids

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def stop_of_turn(self, ids: list[int], stop: int) -> int:
        """Cut the white space behind the end-of-turn id: generation never gets there."""
        special = _special_ids(self.tokenizer, self.vocabulary)
        end = next((i for i in range(stop - 1, -1, -1) if ids[i] in special), None)
        if end is None or self.tokenizer.decode(ids[end + 1 : stop]).strip():
            return stop
        return end + 1


def fill_images(ids: list[int], vocabulary: ImageVocabulary, codes: list[Any]) -> list[int]:
    """Put the codes of each picture between the start and end ids that stand for it, in order.

    Raises:
        MessageError: numbers of pictures and of start-end pairs that differ.
    """
    return _fill(ids, vocabulary, codes)[0]


def _fill(
    marked: list[int], vocabulary: ImageVocabulary, codes: list[Any]
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Put the codes between each start and end id.

    Returns:
        ids: the filled ids.
        position: for each index into ``marked`` (and one past it) its index into the filled ids.
        spans: half-open positions of the pictures in the filled ids.
    """
    pair = [vocabulary.start_token_id, vocabulary.end_token_id]
    ids: list[int] = []
    position: list[int] = []
    spans: list[tuple[int, int]] = []
    index = 0
    while index < len(marked):
        position.append(len(ids))
        if marked[index : index + 2] == pair and len(spans) < len(codes):
            span = vocabulary.span(codes[len(spans)])
            spans.append((len(ids), len(ids) + len(span)))
            position.append(len(ids) + len(span) - 1)
            ids += span
            index += 2
        else:
            ids.append(marked[index])
            index += 1
    position.append(len(ids))
    if len(spans) != len(codes) or sum(i in pair for i in marked) != 2 * len(codes):
        raise MessageError(
            f"{len(codes)} pictures, but the chat template and the tokenizer kept {len(spans)} of "
            f"their markers {vocabulary.start_string}{vocabulary.end_string}; expected every "
            "message's content in the prompt exactly once, unchanged: use another chat_template"
        )
    return ids, position, spans


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any, vocabulary: ImageVocabulary) -> frozenset[int]:
    """Ids of control tokens that are no image ids."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset((special | set(tokenizer.all_special_ids)) - set(vocabulary.new_token_ids))


# --- ids -> parts ---------------------------------------------------------------------------------


def parse(
    ids: Sequence[int] | Any, tokenizer: Any, vocabulary: ImageVocabulary
) -> list[TextPart | ImagePart]:
    """Split the ids of a reply into text and pictures: the inverse of ``render``.

    Control ids (end of turn, padding) and the white space around the whole reply are dropped; the
    white space between text and pictures stays.

    Args:
        ids: one sequence; a list, or anything with ``tolist()``.

    Raises:
        MessageError: a picture that is not closed, has a wrong number of codes, or an image id
            where none belongs; the message gives the position.
    """
    ids = [int(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    special = _special_ids(tokenizer, vocabulary)
    controls = vocabulary.control_token_ids
    parts: list[TextPart | ImagePart] = []
    text_ids: list[int] = []

    def close_text() -> None:
        if text := _decode(text_ids, tokenizer, vocabulary):
            parts.append(TextPart(text))
        text_ids.clear()

    index = 0
    while index < len(ids):
        token_id = ids[index]
        if token_id == vocabulary.start_token_id:
            close_text()
            try:
                stop = ids.index(vocabulary.end_token_id, index)
                codes = vocabulary.to_codes(ids[index + 1 : stop])
                if vocabulary.span(codes) != ids[index : stop + 1]:  # checks the number too
                    raise CodeError("its ends of rows are not where its rows end")
            except (ValueError, VocabularyError, CodeError) as error:
                what = "is not closed" if type(error) is ValueError else f"cannot be read: {error}"
                raise MessageError(
                    f"the picture at position {index} of {len(ids)} ids {what}; generate with the "
                    "image-span grammar, and enough new ids for a whole picture"
                ) from error
            parts.append(ImagePart(codes))
            index = stop
        elif token_id in controls or token_id in vocabulary.code_token_ids:
            raise MessageError(
                f"image id {token_id} at position {index} stands outside a picture; generate with "
                "the image-span grammar"
            )
        elif not 0 <= token_id < vocabulary.vocab_size:
            raise MessageError(
                f"id {token_id} at position {index}; expected ids below {vocabulary.vocab_size} "
                "(padding rows of the embedding have no token)"
            )
        elif token_id not in special:
            text_ids.append(token_id)
        index += 1
    close_text()
    return _trimmed(parts)


def _decode(ids: list[int], tokenizer: Any, vocabulary: ImageVocabulary) -> str:
    """Text of ids in mid-sentence: behind a control token a leading space stays."""
    if not ids:
        return ""
    text = tokenizer.decode(
        [vocabulary.end_token_id, *ids],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    return text.removeprefix(vocabulary.end_string)


def _trimmed(parts: list[TextPart | ImagePart]) -> list[TextPart | ImagePart]:
    if parts and isinstance(parts[0], TextPart):
        parts[0] = TextPart(parts[0].text.lstrip())
    if parts and isinstance(parts[-1], TextPart):
        parts[-1] = TextPart(parts[-1].text.rstrip())
    return [part for part in parts if not isinstance(part, TextPart) or part.text]
