"""The decoding loop: prompts in, ids out, batched, guided where asked, never a malformed image.

One forward a step for all rows (and their unconditional twins), the grammar's legal columns, one
uniform number per row and step. A row's ids depend on its prompt, its seed and the settings, not on
the rows beside it.
"""

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenizer_hf.errors import ConfigurationError, MessageError
from unimodal.generation.grammar import Allowed, ImageSpanGrammar, Mode
from unimodal.generation.guidance import mix_logits
from unimodal.generation.logits_processor import (
    check_warp,
    draw,
    group_rows,
    legal_columns,
    legal_ids,
)
from unimodal.generation.rows import RowBatch

OnToken = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How ids are drawn. Text and image spans have their own temperature and top-k."""

    text_temperature: float = 0.0
    """0 is greedy."""

    text_top_k: int | None = None
    """Keep this many of the likeliest text ids; None or 0 keeps all."""

    image_temperature: float = 1.0
    """0 is greedy."""

    image_top_k: int | None = None
    """Keep this many of the likeliest code ids; None or 0 keeps all."""

    guidance: float = 1.0
    """1 is off and costs nothing; above 1 an image follows its prompt more closely."""

    budget: int | None = None
    """Most codes in an image, where the image tokenizer is nested; None for all."""

    seed: int | None = None
    """Row i draws with seed + i. None takes a new seed each time."""

    max_new_tokens: int | None = None
    """Most ids in a reply. None: one image in mode "image", 512 otherwise."""

    def __post_init__(self) -> None:
        check_warp("text", self.text_temperature, self.text_top_k)
        check_warp("image", self.image_temperature, self.image_top_k)
        if not 0 <= self.guidance < float("inf"):
            raise ConfigurationError(
                f"guidance is {self.guidance}, expected 0 or more (1 is off, 2 to 5 is usual)"
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigurationError(f"max_new_tokens is {self.max_new_tokens}, expected 1 or more")


def generate(
    model: Any,
    processor: Any,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings | None = None,
    *,
    mode: Mode = "auto",
    max_images: int | None = None,
    negative_prompts: Sequence[Sequence[int]] | None = None,
    seeds: Sequence[int] | None = None,
    stop_token_ids: Collection[int] | None = None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Go on from prompts, all in one batch.

    Args:
        model: a decoder-only Hugging Face causal LM, with or without a PEFT adapter.
        processor: gives ``vocabulary`` and ``tokenizer``.
        prompts: token ids, one list per row, not padded, at least one id each. A prompt may end
            inside an image span, which is then finished.
        settings: None for the defaults.
        mode: "auto", the model may draw; "image", it must draw exactly one image first and stops
            behind it; "text", it cannot draw.
        max_images: most images in a reply, in mode "auto".
        negative_prompts: the unconditional prompt of each row (a drawing prompt with empty or
            unwanted text); needed where guidance is on and images may be drawn.
        seeds: one per row; None counts up from ``settings.seed``.
        stop_token_ids: a row ends behind the first of these; None for the model's and the
            tokenizer's end-of-text ids and, in mode "image", ``<|image_end|>``.
        on_token: called with (row, token_id) as each id is drawn.

    Returns:
        The new ids of each row, without the prompt; the last one is a stop id unless the row ran to
        ``max_new_tokens`` or to the end of the model's context.

    Raises:
        ConfigurationError: settings that do not fit together.
        MessageError: a prompt that is empty, or that leaves too little of the model's context.
    """
    settings = settings or SamplingSettings()
    vocabulary = processor.vocabulary
    grammar = ImageSpanGrammar(
        vocabulary, max_codes=settings.budget, mode=mode, max_images=max_images
    )
    if stop_token_ids is None:
        stop_token_ids = default_stop_ids(model, processor.tokenizer)
        if mode == "image":
            stop_token_ids |= {vocabulary.end_token_id}
    max_new_tokens = settings.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = grammar.max_span_ids if mode == "image" else 512
    return sample_tokens(
        model,
        grammar,
        prompts,
        settings,
        max_new_tokens=max_new_tokens,
        negative_prompts=negative_prompts,
        seeds=seeds,
        stop_token_ids=stop_token_ids,
        on_token=on_token,
    )


def default_stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the end-of-text ids that the generation config and the tokenizer name."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    stop = set(found) if isinstance(found, list) else {found}
    stop.add(getattr(tokenizer, "eos_token_id", None))
    return {token_id for token_id in stop if token_id is not None}


def sample_tokens(
    model: Any,
    grammar: ImageSpanGrammar,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    max_new_tokens: int,
    negative_prompts: Sequence[Sequence[int]] | None = None,
    seeds: Sequence[int] | None = None,
    stop_token_ids: Collection[int] = (),
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Run the loop under a given grammar; see :func:`generate` for the rest.

    Two savings: ids that the grammar forces for every row (``<|image_start|>`` of a drawing, the
    ``<|image_end|>`` of a fixed-length span) wait for the next forward instead of costing one, and
    finished rows leave the batch once they are half of it.
    """
    if not prompts:
        return []
    guided = settings.guidance != 1 and grammar.mode != "text"
    negatives = _check_negatives(prompts, negative_prompts) if guided else []
    budgets = _budgets(model, grammar, prompts, negatives, max_new_tokens)
    uniforms = _uniforms(settings.seed, seeds, len(prompts), max(budgets)).to(model.device)
    states = [grammar.initial(prompt) for prompt in prompts]
    replies: list[list[int]] = [[] for _ in prompts]
    stop_ids = frozenset(stop_token_ids)
    was_training = model.training
    model.eval()  # dropout would draw on another stream; in training mode the KV cache may be off
    try:
        with torch.inference_mode():
            batch = RowBatch(model, [*prompts, *negatives], max(budgets))
            slots = list(range(len(prompts)))  # the row that each place of the batch holds
            live = set(slots)
            for step in range(max(budgets)):
                places = [place for place, row in enumerate(slots) if row in live]
                allowed = [
                    grammar.allowed(states[slots[place]], budgets[slots[place]] - step)
                    for place in places
                ]
                tokens = [item.forced for item in allowed if item.forced is not None]
                if len(tokens) < len(allowed):
                    logits = batch.logits()
                    halves = (logits[: len(slots)], logits[len(slots) :] if guided else None)
                    column = uniforms[slots, step]
                    tokens = _choose(halves, places, allowed, column, settings)
                written = torch.zeros(len(slots), dtype=torch.int64)
                for place, token_id in zip(places, tokens, strict=True):
                    row = slots[place]
                    written[place] = token_id
                    replies[row].append(token_id)
                    states[row] = grammar.advance(states[row], token_id)
                    if on_token is not None:
                        on_token(row, token_id)
                    if token_id in stop_ids or step + 1 == budgets[row]:
                        live.discard(row)
                if not live:
                    break
                written = written.to(model.device)
                batch.append(torch.cat([written, written]) if guided else written)
                if 2 * len(live) <= len(slots):
                    stay = [place for place, row in enumerate(slots) if row in live]
                    twins = [len(slots) + place for place in stay] if guided else []
                    batch.keep([*stay, *twins])
                    slots = [slots[place] for place in stay]
    finally:
        model.train(was_training)
    return replies


def _choose(
    halves: tuple[Tensor, Tensor | None],
    places: list[int],
    allowed: list[Allowed],
    uniforms_B: Tensor,
    settings: SamplingSettings,
) -> list[int]:
    """Draw one id for each place; rows that are allowed the same ids are drawn together."""
    conditional_BV, unconditional_BV = halves
    device = conditional_BV.device
    chosen = torch.empty(len(places), dtype=torch.int64, device=device)
    for item, members in group_rows(allowed):
        index = torch.tensor(members, device=device)
        if item.forced is not None:
            chosen[index] = item.forced
            continue
        rows = torch.tensor([places[member] for member in members], device=device)
        whole = len(rows) == len(conditional_BV)
        columns_BK = legal_columns(conditional_BV if whole else conditional_BV[rows], item.ranges)
        if item.image and unconditional_BV is not None:
            twin_BV = unconditional_BV if whole else unconditional_BV[rows]
            twin_BK = legal_columns(twin_BV, item.ranges)
            columns_BK = mix_logits(columns_BK.float(), twin_BK.float(), settings.guidance)
        kind = (
            (settings.image_temperature, settings.image_top_k)
            if item.image
            else (settings.text_temperature, settings.text_top_k)
        )
        picked = draw(columns_BK, uniforms_B[rows], *kind)
        chosen[index] = legal_ids(item.ranges, device)[picked]
    return chosen.tolist()


def _check_negatives(
    prompts: Sequence[Sequence[int]], negative_prompts: Sequence[Sequence[int]] | None
) -> Sequence[Sequence[int]]:
    if negative_prompts is None:
        raise ConfigurationError(
            "guidance is on but no negative prompts came; give one per row (a drawing prompt with "
            "empty text will do), or set guidance=1"
        )
    if len(negative_prompts) != len(prompts):
        raise ConfigurationError(
            f"{len(negative_prompts)} negative prompts came for {len(prompts)} prompts; "
            "give exactly one per prompt"
        )
    return negative_prompts


def _budgets(
    model: Any,
    grammar: ImageSpanGrammar,
    prompts: Sequence[Sequence[int]],
    negatives: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[int]:
    """Return how many ids each row may write: ``max_new_tokens``, or what the context leaves."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    budgets = []
    for row, prompt in enumerate(prompts):
        longest = max(len(prompt), len(negatives[row]) if negatives else 0)
        if not prompt or (negatives and not negatives[row]):
            raise MessageError(f"prompt {row} has no ids, expected at least one")
        budget = max_new_tokens if context is None else min(max_new_tokens, context - longest)
        needed = grammar.min_span_ids if grammar.mode == "image" else 1
        state = grammar.initial(prompt)
        if state.inside:
            needed = max(grammar.min_span_ids - 1 - state.position, 1)
        if budget < needed:
            if budget < max_new_tokens:
                raise MessageError(
                    f"prompt {row} has {longest} ids and needs room for {needed} more, but the "
                    f"model reads at most {context}; shorten the prompt"
                )
            raise ConfigurationError(
                f"max_new_tokens is {max_new_tokens}, but an image takes {needed} here; raise it"
            )
        budgets.append(budget)
    return budgets


def _uniforms(
    seed: int | None, seeds: Sequence[int] | None, num_rows: int, num_steps: int
) -> Tensor:
    """Return float64 (rows, steps) in [0, 1), each row from its own generator.

    A row's numbers are the same for any number of steps, so a longer limit changes nothing.
    """
    if seeds is None:
        first = secrets.randbits(48) if seed is None else seed
        seeds = range(first, first + num_rows)
    if len(seeds) != num_rows:
        raise ConfigurationError(f"{len(seeds)} seeds came for {num_rows} rows; give one per row")
    rows = [
        torch.rand(num_steps, dtype=torch.float64, generator=torch.Generator().manual_seed(row))
        for row in seeds
    ]
    return torch.stack(rows)
