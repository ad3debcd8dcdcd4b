"""The best of several drawings, by the model's own judgement.

A model that reads better than it draws can judge what it drew. Of the candidates x_1 ... x_n of
a prompt c, the one is kept that maximises

    log p(c | x) / |c| + log p(x | c) / |x|

The first term is how likely the model, asked to describe the picture, answers with the prompt: it
falls where something is missing or of another colour. The second is how likely it draws this
picture for the prompt, without guidance: it falls where a shape is broken, which readers overlook.
Both are means, over the words of the prompt and over the codes of the picture: a sum would let the
many codes outvote the few words, and the likeliest of all pictures is an empty one. What frames the
codes, ends of row among it, is sure and does not count.

Source: A. Ramesh et al., "Zero-Shot Text-to-Image Generation" (2021), section 2.6, ranks samples
with a contrastive model of its own (CLIP). Here the judge is the unified model itself, so nothing
else is loaded. What each term does alone is in docs/learning.md.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tokenizer_hf.errors import ConfigurationError
from unimodal.generation.rows import last_logits, left_pad

MAX_CANDIDATES = 64
_STRIDE = 1_000_000_007
"""Between the seeds of candidates; torch's CPU generator looks at their last 32 bits only."""


class Reading(NamedTuple):
    """A conversation that tells how likely its last answer is."""

    ids: list[int]
    length: int
    """So many ids at the end are the answer."""
    counted: int
    """The mean is over so many of them."""


def check_candidates(candidates: int) -> int:
    """Return a number of candidates, or raise ConfigurationError."""
    if not 1 <= candidates <= MAX_CANDIDATES:
        raise ConfigurationError(
            f"candidates is {candidates}; expected 1 (each drawing as it comes) to {MAX_CANDIDATES}"
        )
    return candidates


def candidate_seeds(seed: int, candidates: int) -> list[int]:
    """The seeds of a drawing's candidates. The first has the drawing's own."""
    return [(seed + index * _STRIDE) % 2**63 for index in range(candidates)]


def best_of(terms: Sequence[tuple[float, float]]) -> int:
    """Return which candidate is kept, by the two terms of each: the first of the best."""
    scores = [described + drawn for described, drawn in terms]
    return scores.index(max(scores))


def readings(processor: Any, prompt: str, span: Sequence[int]) -> tuple[Reading, Reading]:
    """The two conversations that judge a drawing: it is described with the prompt, and the prompt
    is answered with it.

    Args:
        processor: of the model that is the judge.
        span: ids of the drawing, ``<|image_start|>`` to ``<|image_end|>``.
    """
    picture = {"type": "image", "codes": processor.vocabulary.to_codes(list(span)[1:-1])}
    described = [*processor.caption_messages(picture), {"role": "assistant", "content": prompt}]
    drawn = [*processor.draw_messages(prompt), {"role": "assistant", "content": [picture]}]
    ids, length = _answered(processor.render(described))
    controls = processor.vocabulary.control_token_ids
    codes = sum(token_id not in controls for token_id in span)
    return Reading(ids, length, length), Reading(*_answered(processor.render(drawn)), codes)


def _answered(rendered: Any) -> tuple[list[int], int]:
    [*_, last] = rendered.learnt
    return rendered.input_ids[: last.stop], last.stop - last.start


def mean_log_likelihoods(
    model: Any, conversations: Sequence[Reading], batch_size: int
) -> list[float]:
    """Return log p(answer | what stands before it) of each conversation, in nats an id that
    counts.

    Args:
        model: a decoder-only Hugging Face causal LM.
        batch_size: conversations that are read at once; results do not depend on it.
    """
    order = sorted(range(len(conversations)), key=lambda one: conversations[one].length)
    found = [0.0] * len(order)  # answers of a length together: logits are computed for the longest
    for members in _batches(order, batch_size):
        values = _log_likelihoods(model, [conversations[one] for one in members])
        for one, value in zip(members, values, strict=True):
            found[one] = value / conversations[one].counted
    return found


def _batches(items: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _log_likelihoods(model: Any, conversations: Sequence[Reading]) -> list[float]:
    most = max(one.length for one in conversations)
    ids, positions = left_pad([one.ids for one in conversations], model.device)
    with torch.inference_mode():
        output = model(
            input_ids=ids,
            attention_mask=(positions >= 0).long(),
            position_ids=positions.clamp(min=0),
            use_cache=False,
            **last_logits(model, most + 1),
        )
        logits = output.logits[:, -most - 1 : -1].float()
        said = logits.log_softmax(-1).gather(-1, ids[:, -most:, None])[..., 0]
    lengths = torch.tensor([one.length for one in conversations], device=ids.device)
    in_answer = torch.arange(most, device=ids.device) >= most - lengths[:, None]
    return said.masked_fill(~in_answer, 0).sum(-1).tolist()
