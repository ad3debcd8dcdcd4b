"""The image-span grammar: which ids may come next. One state machine for transformers and vLLM.

A reply is text with image spans in it: ``<|image_start|>``, code ids, ``<|image_end|>``, then text
again; where the vocabulary has ends of rows, they stand between the rows of codes. The machine
knows ids only; it imports neither torch nor transformers nor vLLM. Its two moves are
:meth:`ImageSpanGrammar.allowed` (what may come next) and :meth:`ImageSpanGrammar.advance` (what
came). As long as only allowed ids are appended, no malformed image can be written.

Lengths are counted in codes as ``ImageTokenizer.num_tokens`` counts them (positions). With G
codebooks one position is G ids, codebook 0 first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from tokenizer_hf.errors import ConfigurationError

if TYPE_CHECKING:
    from tokenizer_hf.vocabulary import ImageVocabulary

Mode = Literal["auto", "image", "text"]
_ROW_END = -1


@dataclass(frozen=True, slots=True)
class SpanState:
    """Where a row stands."""

    position: int = -1
    """Ids since ``<|image_start|>``, row ends too; -1 in text."""

    num_images: int = 0
    """Spans begun since the reply began (a span that the prompt left open counts)."""

    @property
    def inside(self) -> bool:
        """True between ``<|image_start|>`` and ``<|image_end|>``."""
        return self.position >= 0


@dataclass(frozen=True)
class Allowed:
    """The ids that may come next.

    There are only a handful per grammar and each is made once, so rows that are allowed the same
    hold the same object.
    """

    ranges: tuple[tuple[int, int], ...]
    """Every legal id, as sorted, disjoint, half-open ranges. Never empty."""

    text: bool = False
    """``ranges`` holds the text ids."""

    start: bool = False
    """``ranges`` holds ``<|image_start|>``."""

    end: bool = False
    """``ranges`` holds ``<|image_end|>``."""

    codes: bool = False
    """``ranges`` holds the code ids of one codebook."""

    row_end: bool = False
    """``ranges`` holds the end-of-row id."""

    @property
    def image(self) -> bool:
        """True inside a span: image temperature, image top-k and guidance apply."""
        return self.codes or self.end or self.row_end

    @cached_property
    def forced(self) -> int | None:
        """The only legal id, or None where there is a choice."""
        (first, stop), *more = self.ranges
        return first if stop == first + 1 and not more else None


@dataclass(frozen=True)
class FoundSpan:
    """An image span, or the remains of one, in a sequence of ids."""

    start: int
    stop: int
    """Half-open, with the start and end ids where there are any."""

    problem: str | None = None
    """What is wrong with it; None for a well-formed span."""


@dataclass(frozen=True)
class ImageSpanGrammar:
    """Legal sequences of text and image spans over one image vocabulary.

    Args:
        vocabulary: gives the start and end ids, one id range per codebook and the ids in use.
        min_codes: fewest codes in a span; None for the vocabulary's ``min_tokens``.
        max_codes: most codes in a span; None for the vocabulary's ``num_tokens``.
        mode: "auto", the model may start images; "image", it must begin with exactly one image
            and writes text after it; "text", no image at all.
        max_images: most images in a reply; None for no limit. Mode "image" means 1.

    Raises:
        ConfigurationError: lengths that the image tokenizer cannot decode, or an unknown mode.
    """

    vocabulary: "ImageVocabulary"
    min_codes: int | None = None
    max_codes: int | None = None
    mode: Mode = "auto"
    max_images: int | None = None

    def __post_init__(self) -> None:
        vocabulary = self.vocabulary
        most = vocabulary.num_tokens
        least = vocabulary.min_tokens if vocabulary.nested else most
        if self.max_codes is None:
            object.__setattr__(self, "max_codes", most)
        if self.min_codes is None:
            object.__setattr__(self, "min_codes", min(least, self.max_codes or 0))
        if self.mode not in get_args(Mode):
            raise ConfigurationError(
                f"unknown mode {self.mode!r}: expected one of {', '.join(get_args(Mode))}"
            )
        assert self.min_codes is not None and self.max_codes is not None
        if not (max(least, 1) <= self.min_codes <= self.max_codes <= most):
            legal = f"{least} to {most}" if vocabulary.nested else f"exactly {most}"
            raise ConfigurationError(
                f"spans of {self.min_codes} to {self.max_codes} codes were asked for, but this "
                f"image tokenizer decodes {legal}; choose a budget within that"
            )
        if self.max_images is not None and self.max_images < 0:
            raise ConfigurationError(f"max_images is {self.max_images}, expected 0 or more")

    @property
    def min_span_ids(self) -> int:
        """Ids in the shortest legal span, start and end included."""
        return self.vocabulary.span_length(self.min_codes)

    @property
    def max_span_ids(self) -> int:
        """Ids in the longest legal span, start and end included."""
        return self.vocabulary.span_length(self.max_codes)

    # --- the two moves ----------------------------------------------------------------------------

    def allowed(self, state: SpanState, remaining: int) -> Allowed:
        """Say which ids may come next.

        Args:
            state: where the row stands.
            remaining: how many ids may still be written, the next one included. A span that would
                not fit is not started; inside one, ``<|image_end|>`` is forced while it still fits.

        Returns:
            Allowed, never empty. A span that a prompt left open and that no longer fits is gone on
            with all the same: its caller has to give it room.
        """
        position = state.position
        if position < 0:
            fits = remaining >= self.min_span_ids
            if self.mode == "image" and state.num_images == 0 and fits:
                return self._start
            may_start = fits and self.mode == "auto" and state.num_images < self._limit
            return self._text_or_start if may_start else self._text
        if position >= self._most:
            return self._end
        codebook = self._slots[position]
        if codebook == _ROW_END:
            return self._row_end
        if codebook or position < self._least:
            return self._codes[codebook]
        return self._end if remaining <= self._group else self._code_or_end

    def advance(self, state: SpanState, token_id: int) -> SpanState:
        """Take one id and return the state after it.

        Never raises: an id that has no business in a span (the padding after a finished row, say)
        ends it. :meth:`find_spans` is what tells a well-formed span from a malformed one.
        """
        if token_id == self.vocabulary.start_token_id:
            return SpanState(0, state.num_images + 1)
        if state.position < 0:
            return state
        first, stop = self._slot_range(state.position)
        inside = first <= token_id < stop
        return SpanState(state.position + 1 if inside else -1, state.num_images)

    def initial(self, prompt_ids: Sequence[int] = ()) -> SpanState:
        """Return the state behind a prompt: text, or inside the span that the prompt left open."""
        start = self.vocabulary.start_token_id
        for index in range(len(prompt_ids) - 1, -1, -1):
            if prompt_ids[index] == start:
                state = SpanState()
                for token_id in prompt_ids[index:]:
                    state = self.advance(state, token_id)
                return state if state.inside else SpanState()
        return SpanState()

    # --- reading ids back -------------------------------------------------------------------------

    def check_span(self, ids: Sequence[int]) -> str | None:
        """Return what is wrong with one span (start and end ids included), or None."""
        vocabulary = self.vocabulary
        if not ids or ids[0] != vocabulary.start_token_id:
            return "image ids without a start"
        if ids[-1] != vocabulary.end_token_id:
            return "no end"
        inner = ids[1:-1]
        for position, token_id in enumerate(inner):
            first, stop = self._slot_range(position)
            if not first <= token_id < stop:
                return f"id {token_id} at position {position}, expected {first} to {stop - 1}"
        odd = len(inner) % self._group and not vocabulary.row_length
        if odd or not self._least <= len(inner) <= self._most:
            what = "code and row-end ids" if vocabulary.row_length else "code ids"
            return f"{len(inner)} {what}, expected {self._least} to {self._most}"
        return None

    def find_spans(self, ids: Sequence[int]) -> list[FoundSpan]:
        """Find every image span, well-formed or not, in a sequence of ids.

        A maximal run of image ids is cut before each start and behind each end; each piece is one
        span. So a stray code, a missing end and a text id inside a span all come out as malformed.
        """
        vocabulary = self.vocabulary
        start, end = vocabulary.start_token_id, vocabulary.end_token_id
        spans: list[FoundSpan] = []
        begin: int | None = None

        def close(stop: int) -> None:
            nonlocal begin
            if begin is not None:
                spans.append(FoundSpan(begin, stop, self.check_span(ids[begin:stop])))
            begin = None

        for index, token_id in enumerate(ids):
            image = token_id in self._controls or any(
                first <= token_id < stop for first, stop in self._ranges
            )
            if token_id == start or not image:
                close(index)
            if image and begin is None:
                begin = index
            if token_id == end:
                close(index + 1)
        close(len(ids))
        return spans

    # --- what is worked out once ------------------------------------------------------------------

    @cached_property
    def _ranges(self) -> tuple[tuple[int, int], ...]:
        return self.vocabulary.ranges

    @cached_property
    def _group(self) -> int:
        return len(self._ranges)

    @cached_property
    def _controls(self) -> tuple[int, ...]:
        return tuple(self.vocabulary.control_token_ids)

    @cached_property
    def _slots(self) -> tuple[int, ...]:
        """What belongs at each position of the longest span: a codebook, or the end of a row."""
        assert self.max_codes is not None
        length, slots = self.vocabulary.row_length, []
        for position in range(self.max_codes):
            if length and position and position % length == 0:
                slots.extend([_ROW_END] * self.vocabulary.row_ends)
            slots.extend(range(self._group))
        return tuple(slots)

    def _slot_range(self, position: int) -> tuple[int, int]:
        slot = self._slots[position % len(self._slots)]
        return self._row_end.ranges[0] if slot == _ROW_END else self._ranges[slot]

    @cached_property
    def _least(self) -> int:
        return self.min_span_ids - 2

    @cached_property
    def _most(self) -> int:
        return self.max_span_ids - 2

    @cached_property
    def _limit(self) -> float:
        return float("inf") if self.max_images is None else self.max_images

    @cached_property
    def _text(self) -> Allowed:
        return Allowed(self._text_ranges(with_start=False), text=True)

    @cached_property
    def _text_or_start(self) -> Allowed:
        return Allowed(self._text_ranges(with_start=True), text=True, start=True)

    @cached_property
    def _start(self) -> Allowed:
        start = self.vocabulary.start_token_id
        return Allowed(((start, start + 1),), start=True)

    @cached_property
    def _end(self) -> Allowed:
        end = self.vocabulary.end_token_id
        return Allowed(((end, end + 1),), end=True)

    @cached_property
    def _row_end(self) -> Allowed:
        row_end = self.vocabulary.row_end_token_id
        assert row_end is not None
        return Allowed(((row_end, row_end + 1),), row_end=True)

    @cached_property
    def _codes(self) -> tuple[Allowed, ...]:
        return tuple(Allowed((pair,), codes=True) for pair in self._ranges)

    @cached_property
    def _code_or_end(self) -> Allowed:
        ranges = sorted((self._ranges[0], self._end.ranges[0]))
        return Allowed(tuple(ranges), codes=True, end=True)

    def _text_ranges(self, with_start: bool) -> tuple[tuple[int, int], ...]:
        """Return the complement of the image ids in [0, vocab_size)."""
        start = self.vocabulary.start_token_id
        controls = [i for i in self._controls if i != start or not with_start]
        holes = [*self._ranges, *((i, i + 1) for i in controls)]
        ranges, first = [], 0
        for hole_first, hole_stop in sorted(holes):
            if first < hole_first:
                ranges.append((first, hole_first))
            first = hole_stop
        if first < self.vocabulary.vocab_size:
            ranges.append((first, self.vocabulary.vocab_size))
        return tuple(ranges)
