"""SentencePiece: give a ``.model`` the image words, and train a small text tokenizer.

A ``.model`` file is a protobuf; new words are pieces appended after the last one. As CONTROL pieces
they have ids but no text can ever spell them; 64k of them load in hundredths of a second.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from tokenizer_hf.errors import CheckpointError, ConfigurationError, DataError, VocabularyError
from tokenizer_hf.files import atomic_folder, atomic_write
from tokenizer_hf.vocabulary import ImageVocabulary, VocabularyExtension

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type
PIECE_TYPES = {"control": CONTROL, "user_defined": USER_DEFINED}
UNK, PAD, START_OF_TURN, END_OF_TURN = "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def extend_sentencepiece(
    model_path: str | Path,
    extension: VocabularyExtension,
    out_path: str | Path,
    piece_type: Literal["control", "user_defined"] = "control",
) -> ImageVocabulary:
    """Append the image words to a SentencePiece model.

    Args:
        model_path: the ``.model`` file; it is not changed.
        extension: the new words.
        out_path: the ``.model`` file to write.
        piece_type: ``"control"``: no text becomes an image id. ``"user_defined"``: the spelling of
            a word in a text becomes its id, so :func:`neutralise` what a user writes.

    Returns:
        The vocabulary bound to the new pieces' ids.

    Raises:
        CheckpointError: no SentencePiece model at ``model_path``.
        VocabularyError: it has image words already.

    Source: the research measurements of shared evaluation_and_ecosystem.md, B2b.
    """
    if piece_type not in PIECE_TYPES:
        raise VocabularyError(f"piece_type {piece_type!r}; expected {' or '.join(PIECE_TYPES)}")
    proto = _read(Path(model_path))
    vocabulary: ImageVocabulary = extension.bind(len(proto.pieces))
    _append(proto, vocabulary.strings(), PIECE_TYPES[piece_type])
    _write(proto, Path(out_path))
    return vocabulary


def extend_sentencepiece_like(
    model_path: str | Path, tokenizer: Any, vocabulary: ImageVocabulary, out_path: str | Path
) -> bool:
    """Append image words to the ``.model`` that lies beside a ``tokenizer.json``, with equal ids.

    Tokens that only the ``tokenizer.json`` has come first, as CONTROL pieces.

    Args:
        tokenizer: the text tokenizer before it was extended.
        vocabulary: bound to that tokenizer's ids.

    Returns:
        False, and nothing is written, where the two files do not give the same pieces the same ids.
    """
    proto = _read(Path(model_path))
    pieces = [piece.piece for piece in proto.pieces]
    first = vocabulary.start_token_id
    words = tokenizer.convert_ids_to_tokens(list(range(first)))
    if len(pieces) > first or words[: len(pieces)] != pieces or None in words:
        return False
    _append(proto, [*words[len(pieces) :], *vocabulary.strings()], CONTROL)
    _write(proto, Path(out_path))
    return True


def train_sentencepiece(
    texts: Iterable[str], out_folder: str | Path, vocab_size: int = 1024, max_piece_length: int = 24
) -> Path:
    """Train a small text tokenizer; write it as a folder that transformers loads without our code.

    A SentencePiece BPE with byte fallback: frequent words become one piece with the blank before
    them, anything else falls into shorter pieces and at last into bytes, so that every text comes
    back exactly (but U+2581 "▁", with which SentencePiece writes the blank, comes back as a blank).
    It has a ChatML chat template; ``<|im_end|>`` ends a turn, ``<|endoftext|>`` pads.

    Args:
        texts: sentences; each is a unit, no piece crosses into the next.
        out_folder: gets ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja`` and
            ``tokenizer.model`` with the same ids.
        vocab_size: all ids, 4 special and 256 bytes included.
        max_piece_length: longest piece, characters.

    Returns:
        ``out_folder``.

    Raises:
        DataError: no text.
        ConfigurationError: a size that the texts cannot fill, or smaller than their alphabet.
    """
    import io

    import sentencepiece

    sentences = [text for text in texts if text.strip()]
    if not sentences:
        raise DataError("no text to train a tokenizer on; expected at least one sentence")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            max_sentencepiece_length=max_piece_length,
            max_sentence_length=max(len(text.encode()) for text in sentences) + 1,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=0,
            unk_piece=UNK,
            pad_id=1,
            pad_piece=PAD,
            eos_id=2,
            eos_piece=END_OF_TURN,
            bos_id=-1,
            control_symbols=[START_OF_TURN],
            minloglevel=2,
            num_threads=1,
        )
    except RuntimeError as error:
        raise ConfigurationError(
            f"vocab_size {vocab_size} does not suit these {len(sentences)} texts: "
            f"{str(error).rpartition('] ')[2]}"
        ) from error
    proto = _parse(model.getvalue())
    out_folder = Path(out_folder)
    with atomic_folder(out_folder) as folder:
        _to_transformers(proto).save_pretrained(folder)
        (folder / "tokenizer.model").write_bytes(model.getvalue())
    return out_folder


def read_texts(files: Iterable[str | Path]) -> Iterator[str]:
    """The texts of ``.txt`` files (one a line) and ``.jsonl`` files (``text``, or ``messages``).

    The roles of messages count as texts, since every chat template spells them.

    Raises:
        DataError: a file that is missing or no UTF-8, or a line without text; with file and line.
    """
    for file in map(Path, files):
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as text: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if file.suffix != ".jsonl":
                yield line
                continue
            try:
                row = json.loads(line)
                chat = () if "text" in row else row["messages"]
                given = [text for m in chat for text in (m["role"], m["content"])] or [row["text"]]
                if not all(isinstance(text, str) for text in given):
                    raise TypeError("content is no string")
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{file} line {number}: {error!r}; expected JSON with a text or messages"
                ) from error
            yield from given


def _to_transformers(proto: Any) -> Any:
    """The same tokenizer with a ``tokenizers`` backend."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    words = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    backend = Tokenizer(
        BPE(
            vocab=words,
            merges=_merges(proto),
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(
        [
            AddedToken(piece.piece, special=True, normalized=False)
            for piece in proto.pieces
            if piece.type in (CONTROL, UNKNOWN)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK,
        pad_token=PAD,
        eos_token=END_OF_TURN,
        extra_special_tokens=[START_OF_TURN],
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score of the third first."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    joins = [
        (-score, cut, (word[:cut], word[cut:]))
        for word, score in scores.items()
        for cut in range(1, len(word))
        if word[:cut] in scores and word[cut:] in scores
    ]
    return [pair for _, _, pair in sorted(joins)]


def _append(proto: Any, strings: list[str], kind: int) -> None:
    known = {piece.piece for piece in proto.pieces}
    if taken := [string for string in strings if string in known]:
        raise VocabularyError(
            f"the SentencePiece model already has {len(taken)} of the new words, {taken[0]!r} "
            "first; extend the model of a tokenizer that was not extended before"
        )
    for string in strings:
        proto.pieces.add(piece=string, score=0.0, type=kind)
    proto.trainer_spec.vocab_size = len(proto.pieces)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"there is no SentencePiece model {path}; expected a .model file")
    try:
        proto = _parse(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError derives from Exception alone
        raise CheckpointError(
            f"{path} is no SentencePiece model ({error}); expected its protobuf .model file"
        ) from error
    if not proto.pieces:
        raise CheckpointError(f"{path} has no pieces; expected a SentencePiece .model file")
    return proto


def _parse(serialized: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(serialized)
    return proto


def _write(proto: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())
