"""Image codes <-> language-model token ids, and text tokenizers that know them.

This is the only file of the project that adds or subtracts an id offset. The arithmetic is
``token_id = offsets[codebook] + code``; the strings ``<|image_00042|>`` exist for people and for
endpoints, never for the hot path.

Two dataclasses:

- :class:`VocabularyExtension` says which new words an image tokenizer needs. It knows no language
  model, is saved beside the image tokenizer, and can be given to any text tokenizer.
- :class:`ImageVocabulary` is an extension bound to the ids of one text tokenizer.

Legend: B batch, L codes of a picture, G codebooks, K codebook size.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from tokenizer_hf.errors import CheckpointError, CodeError, VocabularyError
from tokenizer_hf.files import atomic_write

VOCABULARY_FILE = "vocabulary_extension.json"
VOCAB_MODES = ("added", "base")
BREAKER = "\u200b"  # ZERO WIDTH SPACE: invisible, and no tokenizer's control string holds it


@dataclass(frozen=True, kw_only=True)
class VocabularyExtension:
    """The words that an image tokenizer adds to a text vocabulary.

    The new ids, in order: start of image, end of image, end of row where there is one, codes of
    codebook 0, of codebook 1, ...
    """

    codebook_size: int
    """K, the number of codes of each codebook."""
    num_codebooks: int = 1
    """G, codes at each position; flattened, position by position, over G disjoint id ranges."""
    num_tokens: int
    """Most positions of one picture."""
    min_tokens: int
    """Fewest positions of one picture; ``num_tokens`` where the tokenizer is not nested."""
    nested: bool = False
    """True where any prefix of at least ``min_tokens`` positions decodes."""
    fingerprint: str
    """``ImageTokenizer.fingerprint()`` of the tokenizer whose codes these are."""
    start_string: str = "<|image_start|>"
    end_string: str = "<|image_end|>"
    row_length: int = 0
    """Positions of a row, where rows have ends; else 0."""
    row_ends: int = 0
    """How often the end-of-row word stands between two rows; 0 for never."""
    row_end_string: str = "<|image_row_end|>"
    code_format: str = ""
    """How a code is spelled. Default ``<|image_{code:05d}|>``, and with several codebooks
    ``<|image_{codebook}_{code:05d}|>``."""

    def __post_init__(self) -> None:
        if not self.code_format:
            single = "<|image_{code:05d}|>"
            several = "<|image_{codebook}_{code:05d}|>"
            object.__setattr__(self, "code_format", single if self.num_codebooks == 1 else several)
        if self.codebook_size < 1 or self.num_codebooks < 1:
            raise VocabularyError(
                f"{self.num_codebooks} codebooks of {self.codebook_size} codes; expected at least "
                "1 of each"
            )
        if not 1 <= self.min_tokens <= self.num_tokens:
            raise VocabularyError(
                f"min_tokens={self.min_tokens}, num_tokens={self.num_tokens}; "
                "expected 1 <= min_tokens <= num_tokens"
            )
        whole_rows = self.row_length >= 0 and self.num_tokens % max(1, self.row_length) == 0
        if not whole_rows or (self.row_length and self.min_tokens != self.num_tokens):
            raise VocabularyError(
                f"rows of {self.row_length} positions in pictures of {self.min_tokens} to "
                f"{self.num_tokens}; expected a divisor of one fixed number, or 0 for no row ends"
            )
        if self.row_ends < 0 or (self.row_ends == 0) != (self.row_length == 0):
            raise VocabularyError(
                f"row_ends is {self.row_ends} and row_length {self.row_length}; "
                "expected both above 0, or both 0"
            )

    @classmethod
    def from_image_tokenizer(cls, model: Any, row_ends: int = 0) -> "VocabularyExtension":
        """The extension of an :class:`~tokenizer_hf.modeling_image_tokenizer.ImageTokenizer`.

        Args:
            model: the image tokenizer.
            row_ends: how many end-of-row words stand between the rows of its grid of codes. A
                language model counts positions along the sequence, where a row is a place and a
                column only a place modulo the width; behind an end of row, a column is a distance.
                How many: see ``unimodal.row_ends.fit_row_ends``.

        Raises:
            VocabularyError: ``row_ends`` of codes that stand on no grid.

        Source of the end of row: X. Wang et al., "Emu3: Next-Token Prediction is All You Need"
        (2024), [EOL] in the format of its pre-training data. Ours stands between rows only, not
        behind the last, and may come several times.
        """
        config = model.config
        if row_ends and config.grid is None:
            raise VocabularyError(
                f"row ends were asked for, but codes of the layout {config.token_layout!r} have no "
                'rows; expected an image tokenizer of the layout "2d"'
            )
        return cls(
            codebook_size=config.codebook_size,
            num_codebooks=config.num_codebooks,
            num_tokens=config.num_tokens,
            min_tokens=config.min_tokens,
            nested=config.is_nested,
            row_length=config.grid[1] if row_ends else 0,
            row_ends=row_ends,
            fingerprint=model.fingerprint(),
        )

    @property
    def num_codes(self) -> int:
        """G * K, the number of code words over all codebooks."""
        return self.num_codebooks * self.codebook_size

    @property
    def num_controls(self) -> int:
        """New words that are no codes: start, end and, where there is one, end of row."""
        return 3 if self.row_length else 2

    def span_length(self, positions: int | None = None) -> int:
        """Ids of a picture of so many positions (default: the most), start and end included."""
        positions = self.num_tokens if positions is None else positions
        gaps = max(0, positions - 1) // self.row_length if self.row_length else 0
        return positions * self.num_codebooks + gaps * self.row_ends + 2

    def code_strings(self) -> list[str]:
        """The spelling of every code, in id order."""
        return [
            self.code_format.format(codebook=codebook, code=code)
            for codebook in range(self.num_codebooks)
            for code in range(self.codebook_size)
        ]

    def strings(self) -> list[str]:
        """The spelling of every new word, in id order."""
        return [*self.control_words(), *self.code_strings()]

    def control_words(self) -> list[str]:
        """The spelling of every new word that is no code, in id order."""
        words = [self.start_string, self.end_string, self.row_end_string]
        return words[: self.num_controls]

    def bind(self, first_id: int, pad_to: int = 64) -> "ImageVocabulary":
        """Give the new words the ids from ``first_id`` on.

        Args:
            first_id: the first id that the text vocabulary leaves free.
            pad_to: embedding rows are rounded up to a multiple of this.
        """
        if first_id < 1:
            raise VocabularyError(
                f"the first image id is {first_id}; expected an id after the text ids"
            )
        first_code = first_id + self.num_controls
        vocab_size = first_code + self.num_codes
        own = {field.name: getattr(self, field.name) for field in fields(VocabularyExtension)}
        return ImageVocabulary(
            **own,
            start_token_id=first_id,
            end_token_id=first_id + 1,
            row_end_token_id=first_id + 2 if self.row_length else None,
            offsets=tuple(first_code + g * self.codebook_size for g in range(self.num_codebooks)),
            vocab_size=vocab_size,
            rows=-(-vocab_size // pad_to) * pad_to,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``from_dict`` is the inverse."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``.

        Raises:
            VocabularyError: a field is missing or unknown.
        """
        if not isinstance(values, dict):
            raise VocabularyError(
                f"a {type(values).__name__}; expected the fields of {cls.__name__}"
            )
        own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**own)
        except TypeError as error:
            expected = ", ".join(field.name for field in fields(cls))
            raise VocabularyError(
                f"not a {cls.__name__}: {error}; expected the fields {expected}"
            ) from error

    def save(self, folder: str | Path) -> Path:
        """Write ``vocabulary_extension.json`` into ``folder``; return its path."""
        path = Path(folder) / VOCABULARY_FILE
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read ``vocabulary_extension.json`` from ``folder``.

        Raises:
            CheckpointError: the file is missing or is no JSON.
            VocabularyError: its fields are not those of an extension.
        """
        path = Path(folder) / VOCABULARY_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{path} does not exist; write it with `unimodal export-vocabulary {folder}`"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(
                f"{path} is no JSON ({error}); export the vocabulary again"
            ) from error
        return cls.from_dict(values)


@dataclass(frozen=True, kw_only=True)
class ImageVocabulary(VocabularyExtension):
    """An extension bound to the ids of one text tokenizer: codes <-> token ids by arithmetic."""

    start_token_id: int
    end_token_id: int
    offsets: tuple[int, ...]
    """The id of code 0 of each codebook; the codebooks' ranges follow each other without a gap."""
    vocab_size: int
    """Ids in use, text and image: every id is below it. Ids from here to ``rows`` are padding."""
    rows: int
    """Rows of the embedding matrix: ``vocab_size`` padded."""
    row_end_token_id: int | None = None
    """Where ``row_length`` is 0, None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = tuple(
            self.offsets[0] + g * self.codebook_size for g in range(self.num_codebooks)
        )
        if self.offsets != expected:
            raise VocabularyError(f"offsets {self.offsets}; expected one per codebook: {expected}")
        if not self.code_token_ids.stop <= self.vocab_size <= self.rows:
            raise VocabularyError(
                f"the last code has id {self.code_token_ids.stop - 1}, "
                f"{self.vocab_size} ids are in use and the embedding has {self.rows} rows; "
                "expected ids < vocab_size <= rows"
            )
        if (self.row_end_token_id is None) != (self.row_length == 0):
            raise VocabularyError(
                f"row_end_token_id is {self.row_end_token_id} and row_length {self.row_length}; "
                "expected both or neither"
            )
        for name in ("start_token_id", "end_token_id", "row_end_token_id"):
            if getattr(self, name) in self.code_token_ids:
                raise VocabularyError(f"{name} {getattr(self, name)} is also the id of a code")

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The half-open id range of each codebook."""
        return tuple((offset, offset + self.codebook_size) for offset in self.offsets)

    @property
    def code_token_ids(self) -> range:
        """The ids of all codes."""
        return range(self.offsets[0], self.offsets[0] + self.num_codes)

    @property
    def new_token_ids(self) -> list[int]:
        """Every id that the extension added, ascending; the rows that training learns."""
        return sorted({*self.control_token_ids, *self.code_token_ids})

    @property
    def control_token_ids(self) -> list[int]:
        """Start, end and, where there is one, end of row."""
        row_end = [] if self.row_end_token_id is None else [self.row_end_token_id]
        return [self.start_token_id, self.end_token_id, *row_end]

    def to_token_ids(self, codes: Any) -> Any:
        """Map codes to token ids.

        Args:
            codes: integers in ``[0, codebook_size)``; a torch tensor, numpy array or (nested) list
                of shape ``(..., L)``, or ``(..., L, G)`` where there are several codebooks.

        Returns:
            int64 ids of shape ``(..., L)`` or ``(..., L * G)`` (position by position), in the same
            kind of container.

        Raises:
            VocabularyError: a code lies outside the codebook or is no integer; the last axis is
                not G.
        """
        array = _integers(codes, "codes")
        G = self.num_codebooks
        if G > 1 and (array.ndim < 2 or array.shape[-1] != G):
            raise VocabularyError(
                f"codes of shape {tuple(array.shape)}; "
                f"expected (..., length, {G}) for {G} codebooks"
            )
        _require_between(
            array, 0, self.codebook_size, "code", "use the tokenizer that made the codes"
        )
        if G == 1:
            return _like(array + self.offsets[0], codes)
        ids = array + _row(self.offsets, array)
        return _like(ids.reshape(*array.shape[:-2], array.shape[-2] * G), codes)

    def to_codes(self, token_ids: Any) -> Any:
        """Map token ids back to codes: the inverse of :meth:`to_token_ids`.

        Ends of rows are left out, wherever they stand; :meth:`span` says where they belong.

        Args:
            token_ids: integers ``(..., L)`` or, with several codebooks, ``(..., L * G)``; no start
                or end ids. A torch tensor, numpy array or (nested) list.

        Returns:
            int64 codes ``(..., L)`` or ``(..., L, G)`` in the same kind of container.

        Raises:
            VocabularyError: an id is not a code of the codebook that belongs at its position, or
                the length is no multiple of G.
        """
        array = self._without_row_ends(_integers(token_ids, "token ids"))
        G = self.num_codebooks
        if G == 1:
            first, stop = self.ranges[0]
            _require_between(array, first, stop, "token id", "only ids of image codes have a code")
            return _like(array - first, token_ids)
        if array.ndim < 1 or array.shape[-1] % G:
            raise VocabularyError(
                f"{array.shape[-1] if array.ndim else 1} image ids; expected a multiple of the "
                f"{G} codebooks"
            )
        array = array.reshape(*array.shape[:-1], array.shape[-1] // G, G)
        codes = array - _row(self.offsets, array)
        bad = (codes < 0) | (codes >= self.codebook_size)
        if bool(bad.any()):
            raise VocabularyError(
                f"token id {int(array[bad][0])} is not a code of the codebook of its position; "
                f"expected ids that cycle through the ranges {self.ranges}"
            )
        return _like(codes, token_ids)

    def _without_row_ends(self, array: Any) -> Any:
        if self.row_end_token_id is None:
            return array
        row_end = array == self.row_end_token_id
        if not bool(row_end.any()):
            return array
        counts = row_end.sum(-1)
        if bool((counts != counts.max()).any()):
            raise VocabularyError("pictures with different numbers of row ends; expected the same")
        return array[~row_end].reshape(*array.shape[:-1], array.shape[-1] - int(counts.max()))

    def is_code(self, token_ids: Any) -> Any:
        """Which ids stand for codes: booleans of the same shape and kind of container."""
        array = _integers(token_ids, "token ids")
        first, stop = self.code_token_ids.start, self.code_token_ids.stop
        return _like((array >= first) & (array < stop), token_ids)

    def span(self, codes: Any) -> list[int]:
        """The ids of one picture: start id, codes, row by row where rows have ends, end id.

        Args:
            codes: ``(L,)`` or ``(L, G)``, ``min_tokens <= L <= num_tokens``.

        Raises:
            CodeError: the number of positions is not one that the tokenizer decodes.
            VocabularyError: as :meth:`to_token_ids`.
        """
        length = len(codes)
        if not self.min_tokens <= length <= self.num_tokens:
            expected = f"{self.num_tokens}"
            if self.min_tokens != self.num_tokens:
                expected = f"{self.min_tokens} to {self.num_tokens}"
            raise CodeError(f"a picture of {length} codes; expected {expected}")
        ids = self.to_token_ids(codes)
        ids = ids if isinstance(ids, list) else ids.tolist()
        if self.row_end_token_id is not None:
            width = self.row_length * self.num_codebooks
            ends = [self.row_end_token_id] * self.row_ends
            rows = [[*ends, *ids[i : i + width]] for i in range(0, len(ids), width)]
            ids = [token_id for row in rows for token_id in row][self.row_ends :]
        return [self.start_token_id, *ids, self.end_token_id]


# --- containers -----------------------------------------------------------------------------------


def _integers(values: Any, what: str) -> Any:
    """``values`` as an int64 torch tensor (if it was one) or numpy array."""
    if type(values).__module__.partition(".")[0] == "torch":
        if values.is_floating_point() or values.is_complex() or str(values.dtype) == "torch.bool":
            raise VocabularyError(f"{what} of type {values.dtype}; expected integers")
        return values.long()
    array = np.asarray(values)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise VocabularyError(f"{what} of type {array.dtype}; expected integers")
    return array.astype(np.int64)


def _row(values: tuple[int, ...], like: Any) -> Any:
    return np.asarray(values, np.int64) if isinstance(like, np.ndarray) else like.new_tensor(values)


def _like(array: Any, original: Any) -> Any:
    """``array`` in the kind of container that the caller gave."""
    if isinstance(array, np.ndarray | np.generic) and not isinstance(
        original, np.ndarray | np.generic
    ):
        return array.tolist()
    return array


def _require_between(array: Any, first: int, stop: int, what: str, remedy: str) -> None:
    if 0 in array.shape:
        return
    low, high = int(array.min()), int(array.max())
    if low < first or high >= stop:
        raise VocabularyError(
            f"{what} {low if low < first else high}; expected {first} to {stop - 1}: {remedy}"
        )


# --- text tokenizers ------------------------------------------------------------------------------


def extend_tokenizer(
    tokenizer: Any, extension: VocabularyExtension, mode: str = "added"
) -> tuple[Any, ImageVocabulary]:
    """A copy of a fast text tokenizer that also knows the image words.

    Ids and texts that the tokenizer knew before are unchanged.

    Args:
        tokenizer: a transformers tokenizer with a ``tokenizers`` backend; it is not changed.
        extension: the new words.
        mode: ``"added"`` makes every word an added special token: its spelling in a text becomes
            its id (so :func:`neutralise` what a user writes), and loading takes about 0.1 ms a
            word. ``"base"`` writes the codes into the BPE vocabulary without merges: no text can
            reach them, and 64k codes load as fast as none. Start, end and end of row are added
            special tokens in both.

    Returns:
        The extended tokenizer and the vocabulary bound to its ids.

    Raises:
        VocabularyError: a slow tokenizer; words that it already has; ``"base"`` on a tokenizer that
            is no BPE, or whose pre-tokenizer lets a text reach the new words.

    Source: the research measurements of shared evaluation_and_ecosystem.md, B2.
    """
    if mode not in VOCAB_MODES:
        raise VocabularyError(f"vocabulary mode {mode!r}; expected one of {', '.join(VOCAB_MODES)}")
    if not getattr(tokenizer, "is_fast", False):
        raise VocabularyError(
            f"{type(tokenizer).__name__} has no `tokenizers` backend; convert it to a "
            "tokenizer.json first"
        )
    old = tokenizer.get_vocab()
    taken = [string for string in extension.strings() if string in old]
    if taken:
        raise VocabularyError(
            f"the text tokenizer already has {len(taken)} of the image words, {taken[0]!r} first; "
            "extend the text tokenizer of a language model that was not extended before"
        )
    first_id = max(old.values()) + 1
    vocabulary = extension.bind(first_id)
    extended = copy.deepcopy(tokenizer)
    if mode == "added":
        _add_words(extended, vocabulary)
    else:
        _write_words_into_bpe(extended, vocabulary)
    strings = vocabulary.strings()
    ids = extended.convert_tokens_to_ids(strings)
    if ids != list(range(first_id, vocabulary.vocab_size)):
        raise VocabularyError(
            f"the tokenizer gave {strings[0]!r} the id {ids[0]}; expected {first_id}, the first "
            'free one. Its ids have holes: use the vocabulary mode "base"'
        )
    if mode == "base":
        _require_unreachable(extended, vocabulary)
    return extended, vocabulary


def _add_words(tokenizer: Any, vocabulary: ImageVocabulary) -> None:
    from tokenizers import AddedToken

    words = [AddedToken(s, special=True, normalized=False) for s in vocabulary.strings()]
    tokenizer.add_tokens(words, special_tokens=True)


def _write_words_into_bpe(tokenizer: Any, vocabulary: ImageVocabulary) -> None:
    """Write the codes into ``model.vocab`` of the serialised backend; the others are added too.

    Loading numbers added tokens from the size of ``model.vocab``, unless ``model.vocab`` holds
    them; so that their ids stay, the tokens that were added before are written into it as well.
    """
    from tokenizers import Tokenizer

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise VocabularyError(
            f'the text tokenizer is a {spec["model"]["type"]} model; the vocabulary mode "base" '
            'needs BPE. Use "added"'
        )
    words = spec["model"]["vocab"]
    for token in spec["added_tokens"]:
        words.setdefault(token["content"], token["id"])
    words.update(zip(vocabulary.strings(), vocabulary.new_token_ids, strict=True))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    controls = zip(vocabulary.control_words(), vocabulary.control_token_ids, strict=True)
    for string, token_id in controls:
        spec["added_tokens"].append({"id": token_id, "content": string, "special": True, **flags})
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer._tokenizer.encode_special_tokens = tokenizer.split_special_tokens


def _require_unreachable(tokenizer: Any, vocabulary: ImageVocabulary) -> None:
    """A few hundred spellings, alone and inside a sentence, must not become image ids."""
    strings = vocabulary.code_strings()
    strings = strings[:: max(1, len(strings) // 256)]
    texts = [*strings, " ".join(strings), "".join(strings)]
    for text, encoding in zip(texts, tokenizer.backend_tokenizer.encode_batch(texts), strict=True):
        if np.any(vocabulary.is_code(np.asarray(encoding.ids, np.int64))):
            raise VocabularyError(
                f"this tokenizer turns the plain text {text[:40]!r} into an image id although the "
                'word has no merges; use the vocabulary mode "added"'
            )


# --- texts that spell control words ---------------------------------------------------------------


def control_strings(tokenizer: Any, extension: VocabularyExtension) -> frozenset[str]:
    """Every string that may not come from a user: the special tokens and the image words."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(special | set(tokenizer.all_special_tokens) | set(extension.strings()))


def neutralise(text: str, strings: Iterable[str], breaker: str = BREAKER) -> str:
    """Break every occurrence of a control string, so that it is read as plain text.

    A ZERO WIDTH SPACE (U+200B) is put after the first character of each occurrence, overlapping
    ones
    included: people see the same text, a tokenizer does not see its special token. A control string
    of one character cannot be broken and is replaced by U+FFFD.

    Args:
        text: what a user wrote.
        strings: the control strings, for example :func:`control_strings`. A frozenset is cheapest:
            its index is built once.
        breaker: put in place of U+200B.

    Returns:
        The text; the same object where it holds no control string.
    """
    strings = strings if isinstance(strings, frozenset) else frozenset(strings)
    wanted, lengths, start = _index(_Same(strings))
    if start is None:
        return text
    pieces: list[str] = []
    done = 0
    for match in start.finditer(text):
        at = match.start()
        if any(text[at : at + length] in wanted for length in lengths):
            single = text[at] in wanted
            pieces += (text[done:at], "\ufffd") if single else (text[done : at + 1], breaker)
            done = at + 1
    return "".join([*pieces, text[done:]]) if pieces else text


def harmless(text: str, tokenizer: Any, extension: VocabularyExtension) -> str:
    """Break control strings as :func:`neutralise` does, also those that the tokenizer folds.

    Some tokenizers normalise a text before they read it: full-width letters become ASCII, a
    character that has no width goes away, capitals become small. What comes out may then spell a
    control string that was not there, or lose the break that was put into one. So where the
    tokenizer's normaliser changes a text, the ids that it gives are looked at.

    Args:
        text: what a user wrote.
        tokenizer: a fast tokenizer.
        extension: the image words.

    Returns:
        A text whose ids hold no control id; the same object where nothing had to be done.

    Raises:
        VocabularyError: no way was found to break the text up. It is refused then.
    """
    strings, ids = _controls_of(tokenizer, extension)
    text = neutralise(text, strings)
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or normalizer.normalize_str(text) == text:
        return text
    if ids.isdisjoint(_ids_of(text, tokenizer)):
        return text
    folded = normalizer.normalize_str(text)
    for breaker in (BREAKER, " ", "\ufffd"):
        broken = neutralise(folded, strings, breaker)
        if ids.isdisjoint(_ids_of(broken, tokenizer)):
            return broken
    raise VocabularyError(
        f"the text {text[:60]!r} spells control tokens in a way that cannot be broken up; expected "
        "plain text: leave such characters out"
    )


def harmless_values(value: Any, clean: Callable[[str], str]) -> Any:
    """Return a JSON value whose strings, keys included, went through ``clean``."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list | tuple):
        return [harmless_values(item, clean) for item in value]
    if isinstance(value, dict):
        return {
            clean(key) if isinstance(key, str) else key: harmless_values(item, clean)
            for key, item in value.items()
        }
    return value


@lru_cache(maxsize=8)
def _controls_of(
    tokenizer: Any, extension: VocabularyExtension
) -> tuple[frozenset[str], frozenset[int]]:
    """The control strings, and the ids that no text of a user may have; "unknown" is no control."""
    strings = control_strings(tokenizer, extension)
    ids = set(tokenizer.convert_tokens_to_ids(sorted(strings))) - {tokenizer.unk_token_id, None}
    return strings, frozenset(ids)


def _ids_of(text: str, tokenizer: Any) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


class _Same:
    """A set as a key by its identity: comparing two large equal sets would take a millisecond."""

    __slots__ = ("strings",)

    def __init__(self, strings: frozenset[str]) -> None:
        self.strings = strings

    def __hash__(self) -> int:
        return id(self.strings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.strings is other.strings


@lru_cache(maxsize=16)
def _index(key: _Same) -> tuple[frozenset[str], list[int], re.Pattern[str] | None]:
    """The strings, their lengths, and a pattern of the characters that they start with."""
    wanted = key.strings - {""}
    if not wanted:
        return wanted, [], None
    firsts = "".join(sorted({re.escape(string[0]) for string in wanted}))
    return wanted, sorted({len(string) for string in wanted}), re.compile(f"[{firsts}]")
