"""SentencePiece models: image words appended, and a small text tokenizer trained."""

import json
import time

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.toy import corpus, llama2_tokenizer, sentencepiece_model, toy_extension
from tokenizer_hf.errors import CheckpointError, ConfigurationError, DataError, VocabularyError
from tokenizer_hf.sentencepiece_vocabulary import (
    extend_sentencepiece,
    extend_sentencepiece_like,
    read_texts,
    train_sentencepiece,
)
from tokenizer_hf.vocabulary import extend_tokenizer

SPELT = "draw <|image_00003|> <|image_start|> red"


def load(path):
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(transformers tokenizer, sentencepiece processor, folder) trained on the toy corpus."""
    folder = train_sentencepiece(corpus(), tmp_path_factory.mktemp("text") / "tokenizer", 460)
    return AutoTokenizer.from_pretrained(folder), load(folder / "tokenizer.model"), folder


# --- appended pieces ------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_type", ["control", "user_defined"])
def test_appended_words_leave_the_text_alone(model, tmp_path, piece_type):
    out = tmp_path / "extended.model"
    vocabulary = extend_sentencepiece(model, toy_extension(), out, piece_type)
    old, new = load(model), load(out)
    assert model.read_bytes() == sentencepiece_model()
    assert vocabulary.start_token_id == len(old) and vocabulary.vocab_size == len(new)
    pieces = [new.id_to_piece(i) for i in range(len(new))]
    assert pieces[: len(old)] == [old.id_to_piece(i) for i in range(len(old))]
    assert pieces[len(old) :] == vocabulary.strings()
    for text in [*corpus(), "naïve 日本 🙂\n"]:
        assert new.encode(text) == old.encode(text)


def test_control_pieces_cannot_be_spelt_and_user_defined_ones_can(model, tmp_path):
    vocabulary = extend_sentencepiece(model, toy_extension(), tmp_path / "control.model")
    control = load(tmp_path / "control.model")
    assert control.encode(SPELT) == load(model).encode(SPELT)
    assert control.decode(control.encode(SPELT)) == SPELT
    extend_sentencepiece(model, toy_extension(), tmp_path / "user.model", "user_defined")
    user = load(tmp_path / "user.model")
    assert vocabulary.offsets[0] + 3 in user.encode(SPELT)
    assert user.decode(user.encode(SPELT)) == SPELT


def test_64k_words_load_in_well_under_a_second(model, tmp_path):
    extend_sentencepiece(model, toy_extension(65_536), tmp_path / "large.model")
    began = time.process_time()
    assert len(load(tmp_path / "large.model")) == len(load(model)) + 65_538
    assert time.process_time() - began < 1


def test_a_model_beside_a_tokenizer_json_gets_the_same_ids(model, tmp_path):
    tokenizer = llama2_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    extended, vocabulary = extend_tokenizer(tokenizer, toy_extension(), "base")
    out = tmp_path / "like.model"
    assert extend_sentencepiece_like(model, tokenizer, vocabulary, out)
    both = load(out)
    words = extended.convert_ids_to_tokens(list(range(vocabulary.vocab_size)))
    assert [both.id_to_piece(i) for i in range(len(both))] == words


def test_a_model_of_another_tokenizer_is_left_out(model, tmp_path, trained):
    tokenizer = trained[0]
    _, vocabulary = extend_tokenizer(tokenizer, toy_extension())
    assert not extend_sentencepiece_like(model, tokenizer, vocabulary, tmp_path / "out.model")
    assert not (tmp_path / "out.model").exists()


def test_files_that_are_no_model_are_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="there is no SentencePiece model"):
        extend_sentencepiece(tmp_path / "nowhere", toy_extension(), tmp_path / "out")
    for content in (b"", b"this is no protobuf at all"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(CheckpointError, match="SentencePiece"):
            extend_sentencepiece(tmp_path / "bad.model", toy_extension(), tmp_path / "out")
    extend_sentencepiece(model, toy_extension(), tmp_path / "once.model")
    with pytest.raises(VocabularyError, match="already has 18 of the new words"):
        extend_sentencepiece(tmp_path / "once.model", toy_extension(), tmp_path / "out")
    with pytest.raises(VocabularyError, match="control or user_defined"):
        extend_sentencepiece(model, toy_extension(), tmp_path / "out", "unused")
    assert not (tmp_path / "out").exists()


# --- a small text tokenizer -----------------------------------------------------------------------


def test_frequent_words_are_one_piece(trained):
    sentence = "A small red circle is left of a blue star"
    assert trained[0].tokenize(sentence) == sentence.replace(" ", " ▁").split()


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.text(max_size=40),
        st.lists(st.sampled_from(["red", " ", "\n", "circle", "9", "é", "A"])).map("".join),
    ).filter(lambda text: "▁" not in text)
)
def test_every_text_comes_back_exactly(trained, text):
    tokenizer = trained[0]
    ids = tokenizer(text)["input_ids"]
    if not set(ids) & set(tokenizer.all_special_ids):
        assert tokenizer.decode(ids) == text


def test_the_model_file_and_the_transformers_folder_agree(trained):
    tokenizer, processor, _ = trained
    assert tokenizer.convert_ids_to_tokens(list(range(len(processor)))) == [
        processor.id_to_piece(i) for i in range(len(processor))
    ]
    for text in [*corpus(), "  redcircle\tblue!\n 日本 🙂", "aaaaaaa ststars squaresquare"]:
        assert tokenizer(text)["input_ids"] == processor.encode(text)


def test_specials_and_chat_template(trained):
    tokenizer = trained[0]
    specials = ["<unk>", "<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == specials
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (1, 2, None)
    chat = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "ring"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    turns = "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\nring<|im_end|>\n"
    assert text == turns
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"
    assert text.startswith(prompt)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i in (2, 3)] == [3, 2, 3, 2]


@pytest.mark.parametrize("mode", ["added", "base"])
def test_it_can_be_extended(trained, mode, tmp_path):
    tokenizer = trained[0]
    extended, vocabulary = extend_tokenizer(tokenizer, toy_extension(), mode)
    extended.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in corpus():
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.convert_tokens_to_ids(vocabulary.strings()) == vocabulary.new_token_ids


def test_impossible_sizes_and_missing_texts_are_explained(tmp_path):
    with pytest.raises(ConfigurationError, match="does not suit these 400 texts: Vocabulary size"):
        train_sentencepiece(corpus(), tmp_path / "out", 50_000)
    with pytest.raises(ConfigurationError, match="does not suit"):
        train_sentencepiece(corpus(), tmp_path / "out", 262)
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(["", "  "], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_texts_are_read_from_lines_and_json(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo é\n", encoding="utf-8")
    rows = [{"text": "three"}, {"messages": [{"role": "user", "content": "four"}]}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert list(read_texts(files)) == ["one", "two é", "three", "user", "four"]
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"c\.jsonl line 2"):
        list(read_texts([tmp_path / "c.jsonl"]))
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff")
    for name in ("d.txt", "missing.txt"):
        with pytest.raises(DataError, match=f"{name} cannot be read as text"):
            list(read_texts([tmp_path / name]))
