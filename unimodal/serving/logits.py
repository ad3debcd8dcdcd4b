"""The logits processor inside vLLM's engine: legal ids for every row, and the draw of image codes.

vLLM 0.32 has two model runners with two logits-processor interfaces, and each refuses a class of
the other. :class:`ImageLogitsProcessor` is both. The runner of CPUs (and of GPUs with
``VLLM_USE_V2_MODEL_RUNNER=0``) calls ``update_state`` and ``apply(logits)``, the newer GPU runner
calls ``add_request`` and ``apply(logits, context)``; both end in the same few lines.

A request says what it is in ``SamplingParams.extra_args["unimodal"]``, a :class:`Segment` as a
dictionary. HTTP clients cannot set it: ``vllm_xargs`` takes numbers and strings only. A request
without one is text: it can write no image id and no padded id, whatever endpoint it came by. One
exception: a text request that stops at ``<|image_start|>`` may write that id, up to the position in
``extra_args["unimodal_start_before"]``; serving/replies.py then goes on with an image segment.

Image codes are drawn here, by the functions that the transformers backend draws with, and the id
gets a logit that no model writes, so that vLLM's own (greedy) sampler takes it. So a seed gives the
same picture in both backends, as far as their logits agree. The rest of an image row is left alone:
a step looks at the columns of the legal ids only, whatever the size of the text vocabulary.

Guidance. The conditional and the unconditional prompt are two requests with the same pair id. Where
both stand at the same code in the same step, their logits are mixed over the image ids and one id
is drawn for both. A row that stands alone is made to stop with ``<|image_start|>``, which no span
can hold; serving/segments.py then resumes both requests behind the last code that they agree on.
So every code that both kept came from a mixed pair.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.vocabulary import ImageVocabulary
from unimodal.generation.grammar import ImageSpanGrammar, SpanState
from unimodal.generation.guidance import mix_logits
from unimodal.generation.logits_processor import clean, draw, legal_ids
from unimodal.serving.vllm_private import (
    BatchUpdate,
    LogitsContext,
    LogitsProcessorV1,
    LogitsProcessorV2,
    LogitsProcRequestState,
    MoveDirectionality,
)

EXTRA_ARGS_KEY = "unimodal"
START_BEFORE_KEY = "unimodal_start_before"
"""A text request may write ``<|image_start|>`` as its id number p (from 0) where p is below this
entry of its extra arguments, if the id is one of its ``stop_token_ids``."""
CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
CERTAIN = 1e30
"""The logit of an id that has been drawn; finite, since vLLM may take a softmax of the row."""
_ROOM = 1 << 30  # an image segment always has room: the front end checked the context length

Ranges = tuple[tuple[int, int], ...]
Warp = tuple[float, int, float | None]
"""Temperature, top-k, and guidance where there is a pair."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One image, or the rest of one.

    The request's prompt ends in ``<|image_start|>`` and the ids of the codes that are done.
    """

    min_codes: int
    max_codes: int
    """Both counted as ``ImageTokenizer.num_tokens`` counts."""
    temperature: float
    """0 takes the likeliest code."""
    top_k: int
    """0 for no limit."""
    seed: int
    done: int = 0
    """Code ids of this image that the prompt already holds."""
    guidance: float = 1.0
    """Used where ``pair`` is given."""
    pair: str | None = None
    """The same string for both requests of a guided drawing, and for no third."""
    role: str = CONDITIONAL
    """Which of the pair this is: "conditional" or "unconditional"."""

    def __post_init__(self) -> None:
        numbers = (self.min_codes, self.max_codes, self.top_k, self.seed, self.done)
        right = (
            all(type(number) is int and 0 <= number < 2**63 for number in numbers)
            and 1 <= self.min_codes <= self.max_codes
            and all(_is_finite(number) for number in (self.temperature, self.guidance))
            and (self.pair is None or isinstance(self.pair, str))
            and self.role in (CONDITIONAL, UNCONDITIONAL)
        )
        if not right:
            raise ConfigurationError(f"{asdict(self)} is no image segment")

    def to_extra_args(self) -> dict[str, Any]:
        """Return the dictionary for ``SamplingParams.extra_args``."""
        return {EXTRA_ARGS_KEY: asdict(self)}

    @classmethod
    def from_extra_args(cls, extra_args: dict[str, Any] | None) -> "Segment | None":
        """The inverse of :meth:`to_extra_args`; None where the request is text.

        Raises:
            ConfigurationError: the entry is there, but is not what :meth:`to_extra_args` writes.
        """
        values = (extra_args or {}).get(EXTRA_ARGS_KEY)
        if values is None:
            return None
        try:
            return cls(**values)
        except (TypeError, ConfigurationError) as error:
            raise ConfigurationError(
                f"{EXTRA_ARGS_KEY!r} in the extra arguments is {values!r:.200}, expected an image "
                "segment; ask for images by /v1/chat/completions or /v1/images/generations"
            ) from error


def _is_finite(number: Any) -> bool:
    return type(number) in (int, float) and 0 <= number < float("inf")


def load_vocabulary(model: str, revision: str | None = None) -> ImageVocabulary:
    """Read the image vocabulary of a merged model, a folder or a hub id, and nothing else.

    Raises:
        ConfigurationError: there is no processor_config.json with an image vocabulary.
    """
    local = Path(model, "processor_config.json")
    path = str(local) if local.is_file() else None
    if path is None and not Path(model).is_dir():
        path = cached_file(
            model, local.name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    values = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    if not values.get("image_vocabulary"):
        raise ConfigurationError(
            f"{model} has no image vocabulary in a processor_config.json, expected a folder made "
            "by `unimodal merge`"
        )
    return ImageVocabulary.from_dict(values["image_vocabulary"])


class _Drawing:
    """An image segment in the engine's batch."""

    __slots__ = ("_ranges", "_uniforms", "done", "outputs", "pair", "role", "warp")

    def __init__(self, segment: Segment, ranges: Sequence[Ranges], outputs: Sequence[int]) -> None:
        self.done = segment.done
        self.pair = segment.pair
        self.role = segment.role
        guidance = None if segment.pair is None else segment.guidance
        self.warp: Warp = (segment.temperature, segment.top_k, guidance)
        self.outputs = outputs
        """The request's growing list of output ids (V1; V2 counts by sequence lengths)."""
        self._ranges = ranges
        # As unimodal.generation.sampling draws: number 0 belongs to <|image_start|>, code p takes
        # number p + 1. p is counted from the image's start, so a restart changes no draw.
        generator = torch.Generator().manual_seed(segment.seed)
        count = len(ranges) + 1
        self._uniforms = torch.rand(count, dtype=torch.float64, generator=generator).tolist()

    # With asynchronous scheduling a finished request can be in one more batch: hence the min.

    def uniform(self, position: int) -> float:
        """The random number in [0, 1) that draws the code behind ``position`` code ids."""
        return self._uniforms[min(position + 1, len(self._uniforms) - 1)]

    def ranges(self, position: int) -> Ranges:
        """The ids that are legal behind ``position`` code ids."""
        return self._ranges[min(position, len(self._ranges) - 1)]


@dataclass(frozen=True)
class _Opening:
    """A text request in the engine's batch that may go as far as ``<|image_start|>``."""

    before: int
    """As :data:`START_BEFORE_KEY`."""
    outputs: Sequence[int]
    """As those of a drawing."""


Row = tuple[int, _Drawing, int]
"""A row of this step's batch that draws: its index, its drawing, and the number of code ids that
the image has so far, those in the prompt included."""


class ImageLogitsProcessor(LogitsProcessorV2, LogitsProcessorV1):
    """vLLM logits processor of both interfaces; see the module's docstring.

    Args:
        vllm_config: vLLM's configuration; gives the model folder.
        device_or_states: the device (V1 runner) or the request states (V2 runner).
        is_pin_memory: V1 only, not used.

    Raises:
        ConfigurationError: not a merged model, or speculative decoding is on (its rows are not
            requests, so neither spans nor pairs could be followed).
    """

    def __init__(
        self,
        vllm_config: Any,
        device_or_states: "torch.device | LogitsProcRequestState",
        is_pin_memory: bool = False,
    ) -> None:
        if getattr(vllm_config, "speculative_config", None) is not None:
            raise ConfigurationError(
                "speculative decoding is on, expected it off: leave out --speculative-config"
            )
        config = vllm_config.model_config
        self.vocabulary = load_vocabulary(config.model, getattr(config, "revision", None))
        self._text = (
            ImageSpanGrammar(self.vocabulary, mode="text").allowed(SpanState(), _ROOM).ranges
        )
        self._text_or_start = ImageSpanGrammar(self.vocabulary).allowed(SpanState(), _ROOM).ranges
        self._drawings: dict[int, _Drawing | _Opening] = {}
        """By batch row (V1) or by request slot (V2)."""
        self._states = None if isinstance(device_or_states, torch.device) else device_or_states

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request whose extra arguments are not ours (vLLM answers 400)."""
        extra_args = sampling_params.extra_args
        Segment.from_extra_args(extra_args)
        before = (extra_args or {}).get(START_BEFORE_KEY)
        if before is not None and type(before) is not int:
            raise ConfigurationError(
                f"{START_BEFORE_KEY!r} in the extra arguments is {before!r:.80}, expected an "
                "integer; ask for images by /v1/chat/completions or /v1/images/generations"
            )

    # --- the interface of the V1 runner -----------------------------------------------------------

    def is_argmax_invariant(self) -> bool:
        """False: the likeliest id may be an illegal one."""
        return False

    def update_state(self, batch_update: "BatchUpdate | None") -> None:
        """Follow the rows: removed, then added, then moved, as vLLM prescribes."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._drawings.pop(index, None)
        for index, params, _prompt_ids, output_ids in batch_update.added:
            self._put(index, self._drawing(params, output_ids))
        for source, target, direction in batch_update.moved:
            moved, replaced = self._drawings.pop(source, None), self._drawings.pop(target, None)
            self._put(target, moved)
            self._put(source, replaced if direction == MoveDirectionality.SWAP else None)

    # --- the interface of the V2 runner -----------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a request into a slot, over whatever was there. Always True: text is masked too."""
        self._put(req_idx, self._drawing(sampling_params, ()))
        return True

    # --- both -------------------------------------------------------------------------------------

    def apply(self, logits: Tensor, ctx: "LogitsContext | None" = None) -> Tensor:
        """Mask text rows and draw the codes of image rows, in place.

        Args:
            logits: float32 (rows, V), one row per request.
            ctx: V2 only.
        """
        rows = self._rows_v1() if ctx is None else self._rows_v2(ctx)
        drawn = [self._draw(logits, *group) for group in _group(rows)]
        if len(rows) < logits.shape[0]:
            drawing = {row[0] for row in rows}
            text = [index for index in range(logits.shape[0]) if index not in drawing]
            self._keep_text(logits, text, ctx)
        for indices, token_ids in drawn:
            logits[torch.tensor(indices, device=logits.device), token_ids] = CERTAIN
        return logits

    def _keep_text(self, logits: Tensor, text: list[int], ctx: "LogitsContext | None") -> None:
        """Leave the rows ``text`` their text ids, and ``<|image_start|>`` where it is open."""
        openings = self._openings_v1() if ctx is None else self._openings_v2(ctx)
        _keep_only(logits, text, self._text_or_start if openings else self._text)
        if openings and (closed := [index for index in text if index not in openings]):
            logits[closed, self.vocabulary.start_token_id] = float("-inf")

    def _draw(
        self, logits: Tensor, ranges: Ranges | None, warp: Warp, members: list[tuple[Row, Row]]
    ) -> tuple[list[int], Tensor]:
        """Draw one id for each member; return row indices and the ids to write there."""
        firsts = [first[0] for first, _ in members]
        if ranges is None:  # out of step: stop
            return firsts, torch.tensor(self.vocabulary.start_token_id, device=logits.device)
        temperature, top_k, guidance = warp
        columns = clean(_columns(logits, firsts, ranges))
        seconds = []
        if guidance is not None:
            seconds = [second[0] for _, second in members]
            other = clean(_columns(logits, seconds, ranges))
            columns = mix_logits(columns, other, guidance)
        uniforms_B = torch.empty(0)
        if temperature:
            uniforms = [drawing.uniform(position) for (_, drawing, position), _ in members]
            uniforms_B = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
        picked = draw(columns, uniforms_B, temperature, top_k)
        token_ids = legal_ids(ranges, logits.device)[picked]
        return firsts + seconds, token_ids.repeat(2) if seconds else token_ids

    def _put(self, index: int, drawing: "_Drawing | _Opening | None") -> None:
        if drawing is None:
            self._drawings.pop(index, None)
        else:
            self._drawings[index] = drawing

    def _drawing(self, params: Any, outputs: Sequence[int]) -> _Drawing | _Opening | None:
        segment = Segment.from_extra_args(params.extra_args)
        if segment is None:
            return self._opening(params, outputs)
        # /inference/v1/generate takes extra arguments as they come; no length may stop the engine.
        least, most = self.vocabulary.min_tokens, self.vocabulary.num_tokens
        max_codes = min(max(segment.max_codes, least), most)
        min_codes = min(max(segment.min_codes, least), max_codes)
        return _Drawing(segment, _span_ranges(self.vocabulary, min_codes, max_codes), outputs)

    def _opening(self, params: Any, outputs: Sequence[int]) -> _Opening | None:
        before = (params.extra_args or {}).get(START_BEFORE_KEY)
        # Where it does not stop the request, text or another start could follow it.
        stops = self.vocabulary.start_token_id in (params.stop_token_ids or ())
        return _Opening(before, outputs) if type(before) is int and stops else None

    def _openings_v1(self) -> set[int]:
        """The rows that may write ``<|image_start|>`` in this step."""
        return {
            index
            for index, row in self._drawings.items()
            if isinstance(row, _Opening) and len(row.outputs) < row.before
        }

    def _openings_v2(self, ctx: "LogitsContext") -> set[int]:
        assert self._states is not None
        openings = set()
        for index, slot in enumerate(ctx.idx_mapping_np.tolist()):
            row = self._drawings.get(slot)
            if isinstance(row, _Opening):
                prompt_length = int(self._states.prompt_len.np[slot])
                if int(ctx.seq_lens_upper_bound_np[index]) - prompt_length < row.before:
                    openings.add(index)
        return openings

    def _rows_v1(self) -> list[Row]:
        return [
            (index, drawing, drawing.done + len(drawing.outputs))
            for index, drawing in self._drawings.items()
            if isinstance(drawing, _Drawing)
        ]

    def _rows_v2(self, ctx: "LogitsContext") -> list[Row]:
        assert self._states is not None
        prompt_lengths = self._states.prompt_len.np
        rows = []
        for index, slot in enumerate(ctx.idx_mapping_np.tolist()):
            drawing = self._drawings.get(slot)
            if isinstance(drawing, _Drawing):
                written = int(ctx.seq_lens_upper_bound_np[index]) - int(prompt_lengths[slot])
                # Negative while a long prompt is still being read; what is drawn is thrown away.
                rows.append((index, drawing, drawing.done + written if written >= 0 else -1))
        return rows


Group = tuple[Ranges | None, Warp, list[tuple[Row, Row]]]


def _group(rows: Sequence[Row]) -> list[Group]:
    """Put together what is drawn in the same way: single rows (twice the same) and whole pairs.

    Rows that have to stop, since they stand without their partner, come with None for the ranges.
    """
    members: list[tuple[Row, Row]] = []
    alone: list[tuple[Row, Row]] = []
    waiting: dict[str, Row] = {}
    for row in rows:
        _index, drawing, position = row
        if position < 0:
            alone.append((row, row))
        elif drawing.pair is None:
            members.append((row, row))
        elif (other := waiting.pop(drawing.pair, None)) is None:
            waiting[drawing.pair] = row
        elif other[2] == position and other[1].role != drawing.role:
            members.append((row, other) if drawing.role == CONDITIONAL else (other, row))
        else:
            alone += [(row, row), (other, other)]
    alone += [(row, row) for row in waiting.values()]
    groups: dict[tuple[Ranges, Warp], list[tuple[Row, Row]]] = {}
    for member in members:
        _index, drawing, position = member[0]
        groups.setdefault((drawing.ranges(position), drawing.warp), []).append(member)
    stop: list[Group] = [(None, (0.0, 0, None), alone)] if alone else []
    return [(*key, group) for key, group in groups.items()] + stop


@lru_cache(maxsize=256)
def _span_ranges(vocabulary: ImageVocabulary, min_codes: int, max_codes: int) -> list[Ranges]:
    """Return the legal ids behind each number of code ids, from none to as many as there may be."""
    grammar = ImageSpanGrammar(vocabulary, min_codes, max_codes, mode="image")
    positions = range(grammar.max_span_ids - 1)
    return [grammar.allowed(SpanState(position, 1), _ROOM).ranges for position in positions]


def _columns(logits: Tensor, indices: Sequence[int], ranges: Ranges) -> Tensor:
    """Copy the columns of ``ranges`` out of the rows ``indices``; the rest of them is not read."""
    if list(indices) == list(range(logits.shape[0])):
        parts = [logits[:, first:stop] for first, stop in ranges]
    else:
        rows = torch.tensor(indices, device=logits.device)
        parts = [logits[:, first:stop].index_select(0, rows) for first, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _keep_only(logits: Tensor, indices: Sequence[int], ranges: Ranges) -> None:
    """Set every id outside ``ranges`` to -inf, in the rows ``indices``, in place."""
    whole = len(indices) == logits.shape[0]
    rows = None if whole else torch.tensor(indices, device=logits.device)
    first = 0
    for start, stop in (*ranges, (logits.shape[1], logits.shape[1])):
        if first < start:
            hole = logits[:, first:start]
            if rows is None:
                hole.fill_(float("-inf"))
            else:
                hole.index_fill_(0, rows, float("-inf"))
        first = stop
