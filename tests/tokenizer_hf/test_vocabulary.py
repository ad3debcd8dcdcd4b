"""Codes <-> token ids, extended text tokenizers, and texts that spell control words."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.toy import TEXT_TOKENIZERS, corpus, qwen_tokenizer, toy_extension
from tokenizer_hf.errors import CheckpointError, CodeError, VocabularyError
from tokenizer_hf.vocabulary import (
    ImageVocabulary,
    VocabularyExtension,
    control_strings,
    extend_tokenizer,
    neutralise,
)

FIRST = 1000
ONE = toy_extension(codebook_size=16).bind(FIRST)
THREE = toy_extension(codebook_size=16, num_codebooks=3).bind(FIRST)
STYLES_AND_MODES = [(style, mode) for style in TEXT_TOKENIZERS for mode in ("added", "base")]
TRICKY = [
    "",
    " ",
    "\n\n  two  blanks\t",
    "naïve café – 日本語 🙂 e\u0301",
    "1234567 1 22 333",
    "<|im_start|>user\nA red circle<|im_end|>\n",
    "<|begin_of_text|><|eot_id|></s><s>[INST] a [/INST]",
    "<think>it's 'quoted'</think>",
    "\u200b\u2581 x\u0000y",
]


@pytest.fixture(scope="module", params=STYLES_AND_MODES, ids="-".join)
def extended(request, tmp_path_factory):
    """(base tokenizer, extended in memory, extended from disk, vocabulary, mode)."""
    style, mode = request.param
    base = TEXT_TOKENIZERS[style]()
    tokenizer, vocabulary = extend_tokenizer(base, toy_extension(), mode)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return base, tokenizer, AutoTokenizer.from_pretrained(folder), vocabulary, mode


# --- arithmetic -----------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 15), min_size=3, max_size=3), min_size=1, max_size=5))
def test_to_codes_undoes_to_token_ids(rows):
    for values in (rows, np.array(rows), torch.tensor(rows)):
        ids = ONE.to_token_ids(values)
        assert type(ids) is type(values)
        assert np.array_equal(np.asarray(ids), np.asarray(rows) + FIRST + 2)
        assert np.array_equal(np.asarray(ONE.to_codes(ids)), np.asarray(rows))
        flat = THREE.to_token_ids(values)
        assert np.asarray(flat).shape == (len(rows) * 3,)
        assert np.array_equal(np.asarray(THREE.to_codes(flat)), np.asarray(rows))


def test_several_codebooks_have_disjoint_ranges_position_by_position():
    assert THREE.ranges == ((1002, 1018), (1018, 1034), (1034, 1050))
    assert THREE.to_token_ids([[0, 1, 2], [15, 15, 15]]) == [1002, 1019, 1036, 1017, 1033, 1049]
    batch = torch.randint(0, 16, (2, 4, 3))
    assert THREE.to_token_ids(batch).shape == (2, 12)
    assert torch.equal(THREE.to_codes(THREE.to_token_ids(batch)), batch)


def test_small_integer_types_do_not_overflow():
    far = toy_extension(codebook_size=16).bind(100_000)
    ids = far.to_token_ids(np.array([0, 15], dtype=np.uint8))
    assert ids.dtype == np.int64 and ids.tolist() == [100_002, 100_017]
    assert far.to_token_ids(torch.tensor([15], dtype=torch.uint8)).tolist() == [100_017]


@pytest.mark.parametrize("bad", [[16], [-1], [0.5], [True], [[0, 1], [2, 16]], ["3"]])
def test_values_that_are_no_codes_are_refused(bad):
    with pytest.raises(VocabularyError):
        ONE.to_token_ids(bad)


def test_messages_name_the_value_and_the_range():
    with pytest.raises(VocabularyError, match="code 16; expected 0 to 15"):
        ONE.to_token_ids(torch.tensor([3, 16]))
    with pytest.raises(VocabularyError, match="token id 1001; expected 1002 to 1017"):
        ONE.to_codes([1001, 1002])
    with pytest.raises(VocabularyError, match=r"expected \(\.\.\., length, 3\)"):
        THREE.to_token_ids([1, 2])
    with pytest.raises(VocabularyError, match="multiple of the 3 codebooks"):
        THREE.to_codes([1002, 1018])
    with pytest.raises(VocabularyError, match="token id 1018 is not a code of the codebook"):
        THREE.to_codes([1018, 1019, 1036])


def test_empty_stays_empty():
    assert ONE.to_token_ids([]) == [] and ONE.to_codes([]) == []
    assert THREE.to_token_ids(torch.empty(2, 0, 3, dtype=torch.int64)).shape == (2, 0)


def test_is_code_marks_codes_and_nothing_else():
    ids = [0, 999, 1000, 1001, 1002, 1017, 1018, 5000]
    expected = [False, False, False, False, True, True, False, False]
    assert ONE.is_code(ids) == expected
    assert ONE.is_code(torch.tensor(ids)).tolist() == expected
    assert ONE.is_code(1002) is True


def test_span_wraps_codes_and_checks_their_number():
    assert ONE.span([0, 1, 2, 3]) == [1000, 1002, 1003, 1004, 1005, 1001]
    assert ONE.span(torch.tensor([0, 1, 2, 3])) == ONE.span(np.array([0, 1, 2, 3]))
    with pytest.raises(CodeError, match="3 codes; expected 4"):
        ONE.span([0, 1, 2])
    assert len(THREE.span([[0, 1, 2]] * 4)) == 14
    assert ONE.span_length() == 6 and THREE.span_length() == 14 and THREE.span_length(2) == 8


@pytest.mark.parametrize("row_ends", [1, 2])
@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_ends_of_row_stand_between_rows(num_codebooks, row_ends):
    plain = toy_extension(codebook_size=16, num_codebooks=num_codebooks, num_tokens=6)
    extension = replace(plain, row_length=2, row_ends=row_ends)
    vocabulary = extension.bind(FIRST)
    assert vocabulary.strings()[:3] == ["<|image_start|>", "<|image_end|>", "<|image_row_end|>"]
    assert vocabulary.row_end_token_id == FIRST + 2 and vocabulary.code_token_ids[0] == FIRST + 3
    assert vocabulary.new_token_ids == list(range(FIRST, vocabulary.vocab_size))
    codes = np.arange(6 * num_codebooks).reshape(6, num_codebooks) % 16
    codes = codes[:, 0] if num_codebooks == 1 else codes
    span = vocabulary.span(codes)
    width = 2 * num_codebooks
    ends = [FIRST + 2] * row_ends
    plain_ids = vocabulary.to_token_ids(codes).tolist()
    rows = [plain_ids[i : i + width] for i in range(0, 3 * width, width)]
    assert span == [FIRST, *rows[0], *ends, *rows[1], *ends, *rows[2], FIRST + 1]
    assert len(span) == vocabulary.span_length() == 6 * num_codebooks + 2 * row_ends + 2
    assert vocabulary.span_length(2) == width + 2
    assert vocabulary.span_length(3) == 3 * num_codebooks + row_ends + 2
    inner = span[1:-1]
    for values in (inner, np.array(inner), torch.tensor(inner)):
        found = vocabulary.to_codes(values)
        assert type(found) is type(values) and np.array_equal(np.asarray(found), codes)
    batch = vocabulary.to_codes(torch.tensor([inner, inner]))
    assert np.array_equal(batch.numpy(), np.stack([codes, codes]))
    assert not vocabulary.is_code(FIRST + 2)
    assert ImageVocabulary.from_dict(vocabulary.to_dict()) == vocabulary
    uneven = torch.tensor([inner, [*inner[:width], *inner[width + 1 :], inner[-1]]])
    with pytest.raises(VocabularyError, match="different numbers of row ends"):
        vocabulary.to_codes(uneven)


def test_row_ends_that_cannot_be_are_refused():
    for wrong in ({"row_length": 3}, {"row_length": -1}):
        with pytest.raises(VocabularyError, match="rows of"):
            replace(toy_extension(num_tokens=4), **wrong, row_ends=1)
    for wrong in ({"row_length": 2}, {"row_ends": 1}, {"row_length": 2, "row_ends": -1}):
        with pytest.raises(VocabularyError, match="both above 0, or both 0"):
            replace(toy_extension(num_tokens=4), **wrong)
    nested = toy_extension(num_tokens=4, min_tokens=2, nested=True)
    with pytest.raises(VocabularyError, match="rows of 2 positions in pictures of 2 to 4"):
        replace(nested, row_length=2, row_ends=1)
    right = replace(toy_extension(), row_length=2, row_ends=1).bind(FIRST)
    for wrong in ({"row_end_token_id": None}, {"row_end_token_id": FIRST + 3}):
        with pytest.raises(VocabularyError, match="row_end_token_id"):
            replace(right, **wrong)


def test_a_vocabulary_that_was_saved_before_there_were_row_ends_is_read():
    values = ONE.to_dict()
    for new in ("row_length", "row_ends", "row_end_string", "row_end_token_id"):
        del values[new]
    assert ImageVocabulary.from_dict(values) == ONE


def test_new_token_ids_are_everything_between_text_and_padding():
    assert ONE.new_token_ids == list(range(FIRST, ONE.vocab_size))
    assert (ONE.vocab_size, ONE.rows) == (1018, 1024)
    assert THREE.new_token_ids == list(range(FIRST, 1050)) and THREE.rows == 1088
    assert list(ONE.code_token_ids) == ONE.to_token_ids(list(range(16)))


def test_strings_follow_the_ids():
    assert ONE.strings()[:3] == ["<|image_start|>", "<|image_end|>", "<|image_00000|>"]
    assert THREE.strings()[2 + 16] == "<|image_1_00000|>"
    assert len(set(THREE.strings())) == len(THREE.new_token_ids)


def test_vocabularies_that_cannot_be_are_refused():
    values = ONE.to_dict()
    for wrong in (
        {"offsets": [1001]},
        {"rows": 1000},
        {"start_token_id": 1005},
        {"offsets": [1, 2]},
    ):
        with pytest.raises(VocabularyError):
            ImageVocabulary.from_dict({**values, **wrong})
    with pytest.raises(VocabularyError, match="expected the fields"):
        ImageVocabulary.from_dict({**values, "extra": 1})
    with pytest.raises(VocabularyError, match="1 <= min_tokens"):
        VocabularyExtension(codebook_size=4, num_tokens=2, min_tokens=3, fingerprint="")


def test_json_and_disk_round_trips(tmp_path):
    for vocabulary in (ONE, THREE):
        assert ImageVocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary
    extension = toy_extension(num_codebooks=2)
    extension.save(tmp_path)
    assert VocabularyExtension.load(tmp_path) == extension
    (tmp_path / "vocabulary_extension.json").write_text("{not json")
    with pytest.raises(CheckpointError, match="is no JSON"):
        VocabularyExtension.load(tmp_path)
    with pytest.raises(CheckpointError, match="unimodal export-vocabulary"):
        VocabularyExtension.load(tmp_path / "nowhere")


# --- text tokenizers ------------------------------------------------------------------------------


def test_text_keeps_its_ids_and_reads_back_alike(extended):
    base, tokenizer, from_disk, _, _ = extended
    for text in [*corpus(), *TRICKY]:
        expected = base(text)["input_ids"]
        assert tokenizer(text)["input_ids"] == expected, text
        assert from_disk(text)["input_ids"] == expected, text
        assert from_disk.decode(expected) == base.decode(expected)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text_keeps_its_ids(text):
    for base, tokenizer in _pairs():
        assert tokenizer(text)["input_ids"] == base(text)["input_ids"]


_PAIRS = []


def _pairs():
    if not _PAIRS:
        for style, mode in STYLES_AND_MODES:
            base = TEXT_TOKENIZERS[style]()
            _PAIRS.append((base, extend_tokenizer(base, toy_extension(), mode)[0]))
    return _PAIRS


def test_old_words_keep_their_ids_and_new_ones_follow(extended):
    base, tokenizer, from_disk, vocabulary, _ = extended
    for one in (tokenizer, from_disk):
        words = one.get_vocab()
        assert base.get_vocab().items() <= words.items()
        assert len(one) == len(words) == vocabulary.vocab_size
        assert vocabulary.start_token_id == len(base)
        assert one.convert_tokens_to_ids(vocabulary.strings()) == vocabulary.new_token_ids
        assert (one.eos_token_id, one.pad_token_id) == (base.eos_token_id, base.pad_token_id)
        assert one.chat_template == base.chat_template


def test_the_given_tokenizer_is_not_changed(extended):
    base = extended[0]
    assert "<|image_start|>" not in base.get_vocab()


def test_image_ids_decode_to_their_spelling(extended):
    _, _, from_disk, vocabulary, _ = extended
    text = from_disk.decode(vocabulary.span([0, 1, 2, 15]))
    spelt = "<|image_00000|><|image_00001|><|image_00002|><|image_00015|>"
    assert text == f"<|image_start|>{spelt}<|image_end|>"


def test_the_markers_are_read_from_text_in_both_modes(extended):
    _, _, from_disk, vocabulary, _ = extended
    ids = from_disk("a <|image_start|><|image_end|> b", add_special_tokens=False)["input_ids"]
    at = ids.index(vocabulary.start_token_id)
    assert ids[at + 1] == vocabulary.end_token_id


def test_in_added_mode_a_spelling_becomes_its_id_and_in_base_mode_it_stays_text(extended):
    base, _, from_disk, vocabulary, mode = extended
    text = "a <|image_00003|> b"
    ids = from_disk(text)["input_ids"]
    if mode == "added":
        assert vocabulary.offsets[0] + 3 in ids
    else:
        assert not any(vocabulary.is_code(ids))
        assert ids == base(text)["input_ids"]


PIECES = st.sampled_from(
    [
        *("<|im_start|>", "<|im_end|>", "<|image_00003|>", "<|image_start|>", "<|image_end|>"),
        *("</s>", "<s>", "<|eot_id|>", "<|begin_of_text|>", "<|", "<", "|>", "im_end", "image_"),
        *("00003", "\u200b", " ", "red", "\n", "s>", "/"),
    ]
)


def test_the_index_of_control_strings_is_found_without_comparing_them():
    class Set(frozenset):
        def __eq__(self, other):
            raise AssertionError("compared with another set of many thousand strings")

        __hash__ = frozenset.__hash__

    strings = [f"<|image_{code}|>" for code in range(1000)]
    one, two = Set(strings), Set(strings)
    for controls in (one, two, one):
        assert neutralise("a <|image_7|>", controls) == "a <\u200b|image_7|>"


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_neutralised_text_never_becomes_a_control_token(text):
    for _, tokenizer in _pairs():
        strings = control_strings(tokenizer, toy_extension())
        quiet = neutralise(text, strings)
        ids = tokenizer(quiet, add_special_tokens=False)["input_ids"]
        assert not strings & set(tokenizer.convert_ids_to_tokens(ids)), quiet
        assert quiet.replace("\u200b", "") == text.replace("\u200b", "")


def test_several_codebooks_in_a_text_tokenizer(extended):
    base, _, _, _, mode = extended
    tokenizer, vocabulary = extend_tokenizer(base, toy_extension(num_codebooks=2), mode)
    assert tokenizer.convert_ids_to_tokens(vocabulary.span([[0, 1]] * 4))[1:3] == [
        "<|image_0_00000|>",
        "<|image_1_00001|>",
    ]


def test_an_extended_tokenizer_is_not_extended_again(extended):
    with pytest.raises(VocabularyError, match="already has 18 of the image words"):
        extend_tokenizer(extended[1], toy_extension(), extended[4])


def test_tokenizers_that_do_not_fit_are_refused():
    with pytest.raises(VocabularyError, match="expected one of added, base"):
        extend_tokenizer(qwen_tokenizer(), toy_extension(), "special")
    unigram = Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    with pytest.raises(VocabularyError, match=r'a Unigram model; .*Use "added"'):
        extend_tokenizer(PreTrainedTokenizerFast(tokenizer_object=unigram), toy_extension(), "base")
    from transformers import ByT5Tokenizer

    with pytest.raises(VocabularyError, match="no `tokenizers` backend"):
        extend_tokenizer(ByT5Tokenizer(), toy_extension())


def test_ids_with_holes_need_base_mode():
    holes = Tokenizer(BPE(vocab={"a": 0, "b": 1, "c": 9}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=holes)
    top = max(tokenizer.get_vocab().values())
    assert len(tokenizer) <= top
    with pytest.raises(VocabularyError, match="ids have holes"):
        extend_tokenizer(tokenizer, toy_extension())
    extended, vocabulary = extend_tokenizer(tokenizer, toy_extension(), "base")
    assert vocabulary.start_token_id == top + 1
    assert extended.convert_tokens_to_ids("c") == 9


def test_base_mode_refuses_a_tokenizer_whose_text_reaches_whole_words():
    """``ignore_merges`` without a pre-tokenizer: a text that is a word of the vocabulary is it."""
    alphabet = {chr(i): i for i in range(32, 127)}
    backend = Tokenizer(BPE(vocab=alphabet, merges=[], ignore_merges=True))
    with pytest.raises(VocabularyError, match="although the word has no merges"):
        extend_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), toy_extension(), "base")


def test_base_mode_loads_16k_codes_far_faster_than_added_mode(tmp_path):
    seconds = {}
    for mode in ("added", "base"):
        tokenizer, _ = extend_tokenizer(qwen_tokenizer(), toy_extension(16_384), mode)
        tokenizer.save_pretrained(tmp_path / mode)
        began = time.process_time()
        AutoTokenizer.from_pretrained(tmp_path / mode)
        seconds[mode] = time.process_time() - began
    assert seconds["base"] < seconds["added"] / 3, seconds


# --- neutralise -----------------------------------------------------------------------------------


def test_neutralise_breaks_every_occurrence_after_its_first_character():
    strings = ["<|im_end|>", "<|image_00001|>"]
    assert neutralise("a<|im_end|>b", strings) == "a<\u200b|im_end|>b"
    assert neutralise("<|im_end|>" * 2, strings) == "<\u200b|im_end|>" * 2
    assert neutralise("<|image_00002|>", strings) == "<|image_00002|>"
    assert neutralise("plain", strings) == neutralise("plain", []) == "plain"


def test_neutralise_breaks_overlapping_occurrences():
    assert neutralise("aaa", ["aa"]) == "a\u200ba\u200ba"
    assert neutralise("abab", ["aba", "bab"]) == "a\u200bb\u200bab"


def test_a_control_string_of_one_character_is_replaced():
    assert neutralise("a§b", ["§"]) == "a\ufffdb"


def test_a_long_text_of_brackets_against_64k_words_is_fast():
    strings = frozenset(toy_extension(65_536).strings())
    text = "<|image_" * 12_500 + "<|image_00001|>"
    began = time.process_time()
    assert neutralise(text, strings).endswith("<\u200b|image_00001|>")
    assert time.process_time() - began < 3
