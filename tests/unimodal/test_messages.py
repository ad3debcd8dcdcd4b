"""Messages <-> ids: what a rendering has to satisfy, over four styles of text tokenizer."""

import json
import unicodedata
from functools import cache

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.toy import TEXT_TOKENIZERS, toy_extension
from tokenizer_hf.errors import CodeError, ImageError, MessageError, VocabularyError
from tokenizer_hf.vocabulary import extend_tokenizer
from unimodal.messages import (
    IGNORED,
    ImagePart,
    TextPart,
    image_source,
    parse,
    render,
    render_text,
    with_codes,
)

# Gemma's habits: contents are trimmed, a system role and two user turns in a row are refused.
STRICT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' "
    "+ message['content'] | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"
)
# Qwen3's habit: the last answer has a reasoning block, earlier ones lose theirs.
THINKING_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
STYLES = ("qwen", "llama3", "llama2", "strict", "newlines")
PICTURE = {"type": "image", "codes": [3, 1, 4, 15]}
EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@cache
def extended(style):
    tokenizer = TEXT_TOKENIZERS[style if style in TEXT_TOKENIZERS else "qwen"]()
    if style == "newlines":
        tokenizer = with_a_token_of_two_newlines(tokenizer)
    if style == "strict":
        tokenizer.chat_template = STRICT_TEMPLATE
    if style == "thinking":
        tokenizer.chat_template = THINKING_TEMPLATE
    return extend_tokenizer(tokenizer, toy_extension())


def with_a_token_of_two_newlines(tokenizer):
    """As the real Qwen's: a header's newline and an answer's could become one token."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    words, merges = spec["model"]["vocab"], spec["model"]["merges"]
    last = max(words, key=words.get)
    assert "".join(merges[-1]) == last
    words["ĊĊ"] = words.pop(last)
    merges[-1] = ["Ċ", "Ċ"]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    return tokenizer


def user(*content):
    return {"role": "user", "content": content[0] if len(content) == 1 else _parts(content)}


def assistant(*content):
    return {"role": "assistant", "content": content[0] if len(content) == 1 else _parts(content)}


def _parts(content):
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]


HOSTILE = (
    "<|image_00003|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|im_end|>",
    "<|im_start|>system\n",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<s>",
    "</s>",
    "<unk>",
    "<|image_st",
    "art|>",
    "<",
    "|>",
)
# NFC, because Qwen's tokenizer normalises; no "▁", which is how SentencePiece spells a space;
# no "<", because a control string in an answer is broken and does not come back as it was.
characters = st.characters(exclude_categories=("Cs", "Cc", "Cn"), exclude_characters="▁<")
plain = st.text(characters, min_size=1, max_size=20).map(lambda s: unicodedata.normalize("NFC", s))
words = plain.map(str.strip).filter(lambda s: s and not s[0].isspace())
sometimes_hostile = st.lists(st.one_of(plain, st.sampled_from(HOSTILE)), max_size=6).map("".join)
codes = st.lists(st.integers(0, 15), min_size=4, max_size=4)
pictures = codes.map(lambda c: {"type": "image", "codes": c})
spaced = st.one_of(words, words.map(lambda s: f" {s}"), words.map(lambda s: f"{s} "))
answers = st.lists(
    st.one_of(spaced.map(lambda s: {"type": "text", "text": s}), pictures), min_size=1, max_size=4
).map(lambda parts: _trimmed(parts))


def _trimmed(parts):
    """A turn's outer white space is the template's; the space between text and pictures is ours."""
    if parts[0]["type"] == "text":
        parts[0] = {"type": "text", "text": parts[0]["text"].lstrip()}
    if parts[-1]["type"] == "text":
        parts[-1] = {"type": "text", "text": parts[-1]["text"].rstrip()}
    return parts


@st.composite
def conversations(draw, answer=words, question=words, open_ended=True):
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(user(draw(question)))
        turns.append(assistant(draw(answer)))
    return turns[:-1] if open_ended and draw(st.booleans()) else turns


@pytest.mark.parametrize("style", STYLES)
@given(messages=conversations())
@EXAMPLES
def test_text_prompt_equals_hugging_face(style, messages):
    tokenizer, vocabulary = extended(style)
    prompted = messages[-1]["role"] == "user"
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=prompted, return_dict=False
    )
    rendered = render(messages, tokenizer, vocabulary, add_generation_prompt=prompted)
    assert rendered.input_ids == expected
    assert rendered.spans == []


@pytest.mark.parametrize("style", [*STYLES, "thinking"])
@given(messages=conversations(answer=st.one_of(words, answers, words.map(lambda s: "\n\n" + s))))
@EXAMPLES
def test_supervised_prefix_is_the_generation_prompt(style, messages):
    tokenizer, vocabulary = extended(style)
    rendered = render(messages, tokenizer, vocabulary)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if style == "thinking":  # earlier answers are worded otherwise than they were prompted for
        turns = turns[-1:] if messages[-1]["role"] == "assistant" else []
    assert len(rendered.learnt) == len(turns)
    for turn, span in zip(turns, rendered.learnt, strict=True):
        prompt = render(messages[:turn], tokenizer, vocabulary, add_generation_prompt=True)
        assert rendered.input_ids[: span.start] == prompt.input_ids
        assert rendered.input_ids[span.stop - 1] == tokenizer.eos_token_id


@pytest.mark.parametrize("style", [*STYLES, "thinking"])
@given(messages=conversations(answer=answers, open_ended=False))
@example(messages=[user("a"), assistant("see ", PICTURE, " then", PICTURE, PICTURE, "end")])
@EXAMPLES
def test_parse_is_the_inverse_of_render(style, messages):
    tokenizer, vocabulary = extended(style)
    rendered = render(messages, tokenizer, vocabulary)
    turns = messages[1::2][-1:] if style == "thinking" else messages[1::2]
    for message, span in zip(turns, rendered.learnt, strict=True):
        wanted = []
        for part in message["content"]:
            if part["type"] == "image":
                wanted.append(ImagePart(part["codes"]))
            elif wanted and isinstance(wanted[-1], TextPart):
                wanted[-1] = TextPart(wanted[-1].text + part["text"])
            else:
                wanted.append(TextPart(part["text"]))
        assert parse(rendered.input_ids[span.start : span.stop], tokenizer, vocabulary) == wanted


@pytest.mark.parametrize("style", STYLES)
@given(messages=conversations(answer=answers, open_ended=False))
@EXAMPLES
def test_longer_conversations_extend_shorter_ones(style, messages):
    tokenizer, vocabulary = extended(style)
    whole = render(messages, tokenizer, vocabulary)
    for stop in range(1, len(messages)):
        part = render(messages[:stop], tokenizer, vocabulary)
        assert whole.input_ids[: len(part.input_ids)] == part.input_ids
        if messages[stop - 1]["role"] == "assistant":
            assert whole.labels[: len(part.labels)] == part.labels


@pytest.mark.parametrize("style", STYLES)
@given(text=sometimes_hostile, codes=codes)
@EXAMPLES
def test_what_people_write_never_becomes_a_control_token(style, text, codes):
    tokenizer, vocabulary = extended(style)
    picture = {"type": "image", "codes": codes}
    # The two text parts are joined: a control string that is cut in two does not get through.
    half = len(text) // 2
    hostile = [user(text[:half], text[half:], picture, text), assistant("ok")]
    harmless = [user("a", picture, "a"), assistant("ok")]
    control = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }

    def controls(messages):
        rendered = render(messages, tokenizer, vocabulary)
        return [i for i in rendered.input_ids if i in control]

    assert controls(hostile) == controls(harmless)


@pytest.mark.parametrize("style", STYLES)
@given(conversation=conversations(answer=answers, question=answers))
@EXAMPLES
def test_codes_survive_and_only_answers_are_learnt(style, conversation):
    tokenizer, vocabulary = extended(style)
    rendered = render(conversation, tokenizer, vocabulary)
    given_codes = [
        part["codes"]
        for message in conversation
        for part in message["content"]
        if part["type"] == "image"
    ]
    found = [vocabulary.to_codes(rendered.input_ids[a + 1 : b - 1]) for a, b in rendered.spans]
    assert found == given_codes
    inside = {i for span in rendered.learnt for i in range(span.start, span.stop)}
    assert len(rendered.labels) == len(rendered.input_ids)
    for index, (token_id, label) in enumerate(
        zip(rendered.input_ids, rendered.labels, strict=True)
    ):
        assert label == (token_id if index in inside else IGNORED)


def test_directions():
    tokenizer, vocabulary = extended("qwen")
    messages = [
        user("hello"),
        assistant("hi"),
        user("draw"),
        assistant("here: ", PICTURE),
        user("what is it?"),
        assistant("a star"),
    ]
    rendered = render(messages, tokenizer, vocabulary)
    assert [span.direction for span in rendered.learnt] == [
        "text",
        "text-to-image",
        "image-to-text",
    ]


def test_several_codebooks():
    tokenizer, vocabulary = extend_tokenizer(
        TEXT_TOKENIZERS["qwen"](), toy_extension(num_codebooks=2, num_tokens=3)
    )
    codes = [[1, 2], [3, 4], [5, 6]]
    rendered = render(
        [user("draw"), assistant([{"type": "image", "codes": codes}])], tokenizer, vocabulary
    )
    [(start, stop)] = rendered.spans
    assert stop - start == 8
    assert parse(rendered.input_ids[start:stop], tokenizer, vocabulary) == [ImagePart(codes)]


def test_all_pictures_are_encoded_in_one_call():
    tokenizer, vocabulary = extended("qwen")
    calls = []

    def encode(sources):
        calls.append(list(sources))
        return [[index] * 4 for index in range(len(sources))]

    first = [user({"type": "image", "image": "a.png"}, PICTURE, {"type": "image", "path": "b.png"})]
    second = [user([{"type": "image", "image": b"bytes"}])]
    coded = with_codes([first, second], encode)
    assert calls == [["a.png", "b.png", b"bytes"]]
    assert [part["codes"] for part in coded[0][0]["content"]] == [[0] * 4, [3, 1, 4, 15], [1] * 4]
    assert coded[1][0]["content"][0]["codes"] == [2] * 4
    assert "codes" not in first[0]["content"][0]  # what the caller gave is not changed
    assert len(render(coded[0], tokenizer, vocabulary).spans) == 3


def test_render_text_needs_no_codes():
    tokenizer, vocabulary = extended("qwen")
    text = render_text([user("see ", {"type": "image", "image": "x.png"})], tokenizer, vocabulary)
    assert text == "<|im_start|>user\nsee <|image_start|><|image_end|><|im_end|>\n"


def test_data_uris_are_decoded_and_addresses_refused():
    uri = "data:image/png;base64,aGVsbG8="
    assert image_source({"type": "image", "image": uri}) == b"hello"
    assert image_source({"type": "image_url", "image_url": {"url": uri}}) == b"hello"
    for part in (
        {"type": "image", "image": "https://example.com/cat.png"},
        {"type": "image", "url": "hf://datasets/x/y.png"},
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}},
        {"type": "image_url", "image_url": {"url": "/etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image", "image": "data:image/png;base64,***"},
        {"type": "image", "image": "data:image/png,plain"},
    ):
        with pytest.raises(ImageError):
            image_source(part)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "empty conversation"),
        ("hello", "expected a list"),
        ([{"content": "x"}], "message 0"),
        ([{"role": "user", "content": None}], "NoneType"),
        ([{"role": "user", "content": [{"type": "video"}]}], "expected the type"),
        ([{"role": "user", "content": [{"type": "text"}]}], 'string "text"'),
        ([{"role": "user", "content": [{"type": "image"}]}], '"codes"'),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "without codes"),
    ],
)
def test_messages_of_an_unknown_shape(messages, said):
    tokenizer, vocabulary = extended("qwen")
    with pytest.raises(MessageError, match=said):
        render(messages, tokenizer, vocabulary)


def test_what_the_template_refuses():
    tokenizer, vocabulary = extended("strict")
    with pytest.raises(MessageError, match="no system role here"):
        render([{"role": "system", "content": "x"}, user("y")], tokenizer, vocabulary)
    with pytest.raises(MessageError, match="roles must alternate"):
        render([user("x"), user("y")], tokenizer, vocabulary)
    with pytest.raises(MessageError, match="markers"):
        render([user(PICTURE, "x")], tokenizer, vocabulary, chat_template="no content at all")
    bare = TEXT_TOKENIZERS["qwen"]()
    bare.chat_template = None
    bare, vocabulary = extend_tokenizer(bare, toy_extension())
    with pytest.raises(MessageError, match="chat template"):
        render([user("x")], bare, vocabulary)


def test_codes_that_the_vocabulary_does_not_have():
    tokenizer, vocabulary = extended("qwen")
    with pytest.raises(CodeError, match="3 codes"):
        render([user([{"type": "image", "codes": [1, 2, 3]}])], tokenizer, vocabulary)
    with pytest.raises(VocabularyError, match="16"):
        render([user([{"type": "image", "codes": [1, 2, 3, 16]}])], tokenizer, vocabulary)


def test_parse_refuses_malformed_pictures():
    tokenizer, vocabulary = extended("qwen")
    span = vocabulary.span([1, 2, 3, 4])
    for ids in (
        span[:-1],  # not closed
        span[1:],  # no start
        [*span[:3], *span[4:]],  # a code too few
        [*span[:3], span[3], span[3], *span[4:]],  # a code too many
        [span[0], *span],  # a start inside
        [*span[:2], 5, *span[3:]],  # text inside
        [span[2]],  # a lonely code
        [vocabulary.vocab_size],  # a padding row
    ):
        with pytest.raises(MessageError, match="position"):
            parse(ids, tokenizer, vocabulary)
    assert parse([], tokenizer, vocabulary) == []
    assert parse([tokenizer.eos_token_id] * 3, tokenizer, vocabulary) == []
