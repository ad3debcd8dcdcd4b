"""The image-span grammar against an independent description of it: a regular expression."""

import itertools
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.vocabulary import ImageVocabulary, VocabularyExtension
from unimodal.generation.grammar import ImageSpanGrammar, SpanState


def bound(
    codebook_size: int = 3,
    num_codebooks: int = 1,
    min_tokens: int = 2,
    num_tokens: int = 2,
    text_ids: int = 5,
    row_length: int = 0,
    row_ends: int = 1,
) -> ImageVocabulary:
    extension = VocabularyExtension(
        codebook_size=codebook_size,
        num_codebooks=num_codebooks,
        num_tokens=num_tokens,
        min_tokens=min_tokens,
        nested=min_tokens < num_tokens,
        row_length=row_length,
        row_ends=row_ends if row_length else 0,
        fingerprint="0" * 64,
    )
    return extension.bind(text_ids, pad_to=16)


@st.composite
def grammars(draw: st.DrawFn) -> ImageSpanGrammar:
    least = draw(st.integers(1, 5))
    most = draw(st.integers(least, 7))
    rows = [n for n in range(most + 1) if n == 0 or most % n == 0] if least == most else [0]
    vocabulary = bound(
        draw(st.integers(1, 9)),
        draw(st.integers(1, 3)),
        least,
        most,
        draw(st.integers(1, 9)),
        draw(st.sampled_from(rows)),
        draw(st.integers(1, 3)),
    )
    min_codes = draw(st.none() | st.integers(least, most)) if least < most else None
    max_codes = draw(st.none() | st.integers(min_codes or least, most)) if least < most else None
    return ImageSpanGrammar(
        vocabulary,
        min_codes,
        max_codes,
        draw(st.sampled_from(("auto", "image", "text"))),
        draw(st.none() | st.integers(0, 3)),
    )


def assert_reply(grammar: ImageSpanGrammar, ids: list[int], budget: int) -> int:
    """Check everything that a finished reply to a plain prompt promises; return its spans."""
    spans = grammar.find_spans(ids)
    assert [span for span in spans if span.problem] == []
    assert all(0 <= token_id < grammar.vocabulary.vocab_size for token_id in ids)
    if grammar.mode == "text":
        assert spans == []
    if grammar.mode == "image":
        fits = budget >= grammar.min_span_ids
        assert len(spans) == fits
        assert not fits or spans[0].start == 0
    if grammar.mode == "auto" and grammar.max_images is not None:
        assert len(spans) <= grammar.max_images
    return len(spans)


@settings(deadline=None, max_examples=400)
@given(grammars(), st.integers(1, 40), st.randoms(use_true_random=False), st.floats(0, 1))
def test_any_walk_along_allowed_ids_is_well_formed(grammar, budget, random, eagerness):
    state, ids = grammar.initial([0]), []
    for step in range(budget):
        allowed = grammar.allowed(state, budget - step)
        if allowed.start and random.random() < eagerness:
            token_id = grammar.vocabulary.start_token_id
        else:
            token_id = random.choice([i for pair in allowed.ranges for i in range(*pair)])
        ids.append(token_id)
        state = grammar.advance(state, token_id)
    assert_reply(grammar, ids, budget)
    assert not state.inside


@pytest.mark.parametrize("mode", ["auto", "image", "text"])
@pytest.mark.parametrize("max_images", [None, 0, 1, 2])
@pytest.mark.parametrize(
    "books, least, most, row, ends",
    [
        (1, 1, 1, 0, 0),
        (1, 1, 3, 0, 0),
        (2, 1, 2, 0, 0),
        (3, 1, 1, 0, 0),
        (1, 2, 2, 1, 1),
        (1, 2, 2, 1, 2),
        (1, 2, 2, 2, 1),
    ],
)
def test_language_equals_a_regular_expression(mode, max_images, books, least, most, row, ends):
    """Exactly the strings of n letters that the expression matches can be written in n steps."""
    vocabulary = bound(2, books, least, most, 1, row, ends)
    grammar = ImageSpanGrammar(vocabulary, mode=mode, max_images=max_images)
    letters = {0: "t", vocabulary.start_token_id: "s", vocabulary.end_token_id: "e"}
    for book, (first, _) in enumerate(vocabulary.ranges):
        letters[first] = "abc"[book]
    position = "abc"[:books]
    span = f"s(?:{position}){{{least},{most}}}e"
    if row:
        letters[vocabulary.row_end_token_id] = "r"
        span = f"s{('r' * ends).join([position * row] * (most // row))}e"
    limit = "*" if max_images is None else f"{{0,{max_images}}}"
    for length in range(1, 7):
        fits = length >= 2 + books * least + (ends * (least // row - 1) if row else 0)
        image = f"{span}t*" if fits else "t*"
        pattern = {"auto": f"(?:t*{span}){limit}t*", "image": image, "text": "t*"}[mode]
        written = set()
        paths = [("", SpanState())]
        for step in range(length):
            paths = [
                (word + letter, grammar.advance(state, token_id))
                for word, state in paths
                for token_id, letter in letters.items()
                if any(
                    first <= token_id < stop
                    for first, stop in grammar.allowed(state, length - step).ranges
                )
            ]
        written = {word for word, _ in paths}
        words = map("".join, itertools.product(sorted(letters.values()), repeat=length))
        assert written == {word for word in words if re.fullmatch(pattern, word)}


def test_allowed_says_what_its_ranges_hold():
    vocabulary = bound(3, 2, 1, 2)  # 5 text ids; start 5, end 6; codes 7-9 and 10-12; 16 rows
    grammar = ImageSpanGrammar(vocabulary)
    text = grammar.allowed(SpanState(), 3)
    assert (text.ranges, text.text, text.start) == (((0, 5),), True, False)
    roomy = grammar.allowed(SpanState(), 4)
    assert (roomy.ranges, roomy.start, roomy.image) == (((0, 6),), True, False)
    first = grammar.allowed(SpanState(0, 1), 3)
    assert (first.ranges, first.codes, first.end, first.forced) == (((7, 10),), True, False, None)
    assert grammar.allowed(SpanState(1, 1), 2).ranges == ((10, 13),)
    either = grammar.allowed(SpanState(2, 1), 3)
    assert (either.ranges, either.codes, either.end) == (((6, 7), (7, 10)), True, True)
    assert grammar.allowed(SpanState(2, 1), 2).forced == 6
    assert grammar.allowed(SpanState(4, 1), 9).forced == 6
    forced = ImageSpanGrammar(vocabulary, mode="image").allowed(SpanState(), 9)
    assert (forced.forced, forced.start, forced.text) == (5, True, False)


def test_text_ids_behind_the_image_ids_stay_legal():
    """A vocabulary that was extended again later has text on both sides."""
    vocabulary = bound()
    wider = ImageVocabulary.from_dict({**vocabulary.to_dict(), "vocab_size": 12})
    assert vocabulary.vocab_size == 10
    assert ImageSpanGrammar(wider).allowed(SpanState(), 1).ranges == ((0, 5), (10, 12))


def test_initial_state_reads_the_prompt():
    grammar = ImageSpanGrammar(bound())  # start 5, end 6, codes 7-9, two of them
    assert grammar.initial([]) == SpanState()
    assert grammar.initial([1, 5, 7, 8, 6]) == SpanState()
    assert grammar.initial([5, 7, 8, 6, 2, 5]) == SpanState(0, 1)
    assert grammar.initial([5, 7]) == SpanState(1, 1)
    assert grammar.initial([5, 7, 2]) == SpanState()  # broken off long ago


@pytest.mark.parametrize(
    "ids, found",
    [
        ([1, 5, 7, 8, 6, 2], [(1, 5, None)]),
        ([5, 7, 8, 6, 5, 9, 9, 6], [(0, 4, None), (4, 8, None)]),
        ([5, 7, 6], [(0, 3, "1 code ids")]),
        ([5, 7, 8, 9, 6], [(0, 5, "3 code ids")]),
        ([5, 6], [(0, 2, "0 code ids")]),
        ([5], [(0, 1, "no end")]),
        ([5, 7, 8], [(0, 3, "no end")]),
        ([5, 7, 1, 8, 6], [(0, 2, "no end"), (3, 5, "without a start")]),
        ([5, 7, 5, 7, 8, 6], [(0, 2, "no end"), (2, 6, None)]),
        ([1, 7, 1, 6], [(1, 2, "without a start"), (3, 4, "without a start")]),
        ([1, 2, 11], []),
    ],
)
def test_find_spans(ids, found):
    spans = ImageSpanGrammar(bound()).find_spans(ids)
    assert [(span.start, span.stop) for span in spans] == [(a, b) for a, b, _ in found]
    for span, (_, _, problem) in zip(spans, found, strict=True):
        assert (span.problem is None) == (problem is None)
        assert problem is None or problem in span.problem


def test_an_end_of_row_stands_between_rows_and_nowhere_else():
    grammar = ImageSpanGrammar(bound(3, 1, 4, 4, 5, row_length=2))  # row end 7, codes 8-10
    assert grammar.min_span_ids == grammar.max_span_ids == 7
    middle = grammar.allowed(SpanState(2, 1), 5)
    assert (middle.forced, middle.row_end, middle.image, middle.codes) == (7, True, True, False)
    assert grammar.advance(SpanState(2, 1), 7) == SpanState(3, 1)
    assert not grammar.advance(SpanState(2, 1), 8).inside
    assert grammar.allowed(SpanState(), 9).ranges == ((0, 6),)  # no row end in text
    assert grammar.check_span([5, 8, 9, 7, 10, 8, 6]) is None
    assert "id 10 at position 2, expected 7 to 7" in grammar.check_span([5, 8, 9, 10, 7, 8, 6])
    assert "2 code and row-end ids, expected 5 to 5" in grammar.check_span([5, 8, 9, 6])
    [stray] = grammar.find_spans([1, 7, 1])
    assert (stray.start, stray.stop) == (1, 2) and "without a start" in stray.problem


def test_ends_of_row_may_come_several_times():
    grammar = ImageSpanGrammar(bound(3, 1, 4, 4, 5, row_length=2, row_ends=2))
    assert grammar.max_span_ids == 8
    assert grammar.check_span([5, 8, 9, 7, 7, 10, 8, 6]) is None
    assert "position 3" in grammar.check_span([5, 8, 9, 7, 10, 8, 6])


def test_codes_of_the_wrong_codebook_are_malformed():
    grammar = ImageSpanGrammar(bound(3, 2, 1, 1))  # codebook 0: 7-9, codebook 1: 10-12
    assert grammar.check_span([5, 7, 10, 6]) is None
    assert "position 1" in grammar.check_span([5, 7, 8, 6])


def test_lengths_that_do_not_decode_are_refused():
    nested, fixed = bound(3, 1, 2, 8), bound(3, 1, 4, 4)
    assert ImageSpanGrammar(nested, max_codes=4).max_span_ids == 6
    assert ImageSpanGrammar(nested).min_span_ids == 4
    for vocabulary, lengths in [
        (nested, (1, 4)),
        (nested, (2, 9)),
        (fixed, (2, 4)),
        (nested, (5, 4)),
    ]:
        with pytest.raises(ConfigurationError, match="choose a budget"):
            ImageSpanGrammar(vocabulary, *lengths)
    with pytest.raises(ConfigurationError, match="exactly 4"):
        ImageSpanGrammar(fixed, max_codes=3)
    with pytest.raises(ConfigurationError, match="choose a budget"):
        ImageSpanGrammar(nested, max_codes=0)
    with pytest.raises(ConfigurationError, match="unknown mode"):
        ImageSpanGrammar(fixed, mode="picture")
    with pytest.raises(ConfigurationError, match="max_images"):
        ImageSpanGrammar(fixed, max_images=-1)


def test_grammar_needs_neither_torch_nor_transformers():
    check = (
        "import sys, unimodal.generation.grammar;"
        "print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
