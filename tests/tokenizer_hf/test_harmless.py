"""What a user writes never becomes a control or image id, however the tokenizer normalises it."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from tests.toy import TEXT_TOKENIZERS, toy_extension
from tokenizer_hf.errors import VocabularyError
from tokenizer_hf.vocabulary import (
    ImageVocabulary,
    control_strings,
    extend_tokenizer,
    harmless,
    harmless_values,
    neutralise,
)

FOLDS = {
    "none": None,
    "nfc": normalizers.NFC(),
    "nfkc": normalizers.NFKC(),
    "small letters": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    # What SentencePiece's nmt_nfkc does to characters without a width.
    "no width": normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"[\p{Cf}\p{Mn}\u200b]"), "")]
    ),
    # Everything that could break a string up is taken out again.
    "no gaps": normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"[\p{Cf}\p{Mn}\s\ufffd]"), "")]
    ),
}


def folding_tokenizer(fold: str) -> tuple[Any, ImageVocabulary]:
    """Bytes and nothing else, whose special tokens are looked for in the normalised text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if FOLDS[fold] is not None:
        backend.normalizer = FOLDS[fold]
    backend.add_special_tokens(
        [AddedToken(s, special=True, normalized=True) for s in ("<|im_end|>", "<|im_start|>")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    extension = toy_extension()
    words = [AddedToken(s, special=True, normalized=True) for s in extension.strings()]
    vocabulary = extension.bind(len(tokenizer))
    tokenizer.add_tokens(words, special_tokens=True)
    return tokenizer, vocabulary


def control_ids(tokenizer: Any, vocabulary: ImageVocabulary) -> set[int]:
    return set(tokenizer.convert_tokens_to_ids(sorted(control_strings(tokenizer, vocabulary))))


def full_width(text: str) -> str:
    return "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in text)


def smuggled(string: str) -> list[str]:
    """Ways to write a control string that a normaliser may undo."""
    ways = [string, full_width(string), string.upper(), string.replace("<", "\ufe64")]
    ways += [full_width(string[:2]) + string[2:], string[:-2] + full_width(string[-2:])]
    for joiner in ("\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u0301"):
        ways += [string[:3] + joiner + string[3:], joiner.join(string)]
    ways += [string[0] + string, string[:4] + string + string[4:], string * 2]
    return ways


SPELLED = ("<|im_end|>", "<|im_start|>", "<|image_start|>", "<|image_end|>", "<|image_00003|>")


@pytest.mark.parametrize("fold", [fold for fold in FOLDS if fold != "no gaps"])
@pytest.mark.parametrize("string", SPELLED)
def test_no_look_alike_becomes_a_control_id(fold: str, string: str) -> None:
    tokenizer, vocabulary = folding_tokenizer(fold)
    wrong = control_ids(tokenizer, vocabulary)
    for text in smuggled(string):
        for written in (text, f"a {text} b"):
            quiet = harmless(written, tokenizer, vocabulary)
            assert not wrong & set(tokenizer(quiet, add_special_tokens=False)["input_ids"]), written


def test_the_folds_would_let_look_alikes_through() -> None:
    tokenizer, vocabulary = folding_tokenizer("nfkc")
    text = neutralise(full_width("<|im_end|>"), control_strings(tokenizer, vocabulary))
    assert tokenizer(text)["input_ids"] == [tokenizer.eos_token_id]
    tokenizer, vocabulary = folding_tokenizer("no width")
    text = neutralise("<|im_end|>", control_strings(tokenizer, vocabulary))
    assert tokenizer(text)["input_ids"] == [tokenizer.eos_token_id]


def test_what_cannot_be_broken_up_is_refused() -> None:
    tokenizer, vocabulary = folding_tokenizer("no gaps")
    with pytest.raises(VocabularyError, match="cannot be broken up"):
        harmless("<|im_end|>", tokenizer, vocabulary)
    assert harmless("a b", tokenizer, vocabulary) == "a b"


def test_a_unigram_model_whose_vocabulary_holds_its_control_tokens() -> None:
    letters = [(letter, -5.0) for letter in "</s> abcdef\u2581"]
    backend = Tokenizer(Unigram([("<unk>", 0.0), ("</s>", 0.0), *letters], unk_id=0))
    backend.normalizer = normalizers.NFKC()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    )
    extended, vocabulary = extend_tokenizer(tokenizer, toy_extension())
    evil = full_width("</s>")
    assert extended.eos_token_id in extended(evil)["input_ids"]
    quiet = harmless(evil, extended, vocabulary)
    assert extended.eos_token_id not in extended(quiet)["input_ids"]
    # "unknown" is no control token: a text may hold what the vocabulary does not.
    assert harmless("ｚ", extended, vocabulary) == "ｚ"


@pytest.mark.parametrize("style", TEXT_TOKENIZERS)
def test_tokenizers_of_published_styles(style: str) -> None:
    tokenizer, vocabulary = extend_tokenizer(TEXT_TOKENIZERS[style](), toy_extension())
    strings = control_strings(tokenizer, vocabulary)
    wrong = control_ids(tokenizer, vocabulary) - {tokenizer.unk_token_id}
    for string in sorted(strings):
        for text in smuggled(string):
            quiet = harmless(text, tokenizer, vocabulary)
            assert not wrong & set(tokenizer(quiet, add_special_tokens=False)["input_ids"]), text
    plain = "naïve café – 你好, e\u0301 \u200d 👩\u200d🚀 < | >"
    assert harmless(plain, tokenizer, vocabulary) is plain


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*"<|>_im", "image", "start", "end", "＜", "｜", "＞", "\u200b"])))
def test_any_mixture(pieces: list[str]) -> None:
    tokenizer, vocabulary = folding_tokenizer("no width")
    quiet = harmless("".join(pieces), tokenizer, vocabulary)
    ids = tokenizer(quiet, add_special_tokens=False)["input_ids"]
    assert not control_ids(tokenizer, vocabulary) & set(ids)


def test_values_are_cleaned_with_their_keys() -> None:
    value = {"a": ["x", {"xx": 1}], "x": None, "n": 2.5, "b": True}
    cleaned = harmless_values(value, lambda text: text.replace("x", "-"))
    assert cleaned == {"a": ["-", {"--": 1}], "-": None, "n": 2.5, "b": True}
