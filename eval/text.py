"""What tuning did to the text: perplexity before and after, and how far apart the models are."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eval.scores import Score, ratio
from tokenizer_hf.errors import MismatchError


def score_text(
    base: Any,
    tuned: Any,
    sequences: Sequence[Sequence[int]],
    num_text_ids: int,
    *,
    batch_size: int = 16,
    pad_token_id: int = 0,
) -> dict[str, Score]:
    """Compare two causal LMs on held-out text.

    Args:
        base: the text LLM as it was before the merge.
        tuned: the merged and trained model; ids below `num_text_ids` mean the same in both.
        sequences: token ids of text-only sequences, held out from both trainings; of at least 2
            tokens each (shorter ones are passed over).
        num_text_ids: ids in [0, num_text_ids) are text; the tuned model's image ids lie above.
        batch_size: sequences in one forward; both models see the same batch.
        pad_token_id: fills up the shorter rows, masked.

    Returns:
        perplexity_base: over the text ids.
        perplexity_tuned: over the tuned model's whole vocabulary: probability that leaks to image
            ids counts against it.
        kl: KL(base || tuned) in nats per token, both renormalised over the text ids.
        image_mass: mean probability that the tuned model gives to ids that are no text.

        n counts sequences; the intervals are bootstraps over sequences.

    Raises:
        MismatchError: a model has fewer rows than there are text ids, or a sequence holds an id
            that is no text.
    """
    for name, model in (("base", base), ("tuned", tuned)):
        rows = model.get_input_embeddings().weight.shape[0]
        if rows < num_text_ids:
            raise MismatchError(
                f"the {name} model has {rows} embedding rows; expected at least {num_text_ids}, "
                "one per text id: give the text LLM that was merged"
            )
    columns: list[list[float]] = [[], [], [], [], []]
    for batch in _batches(sequences, batch_size, num_text_ids):
        for column, values in zip(
            columns, _measure(base, tuned, batch, num_text_ids, pad_token_id), strict=True
        ):
            column += values.tolist()
    loss_base, loss_tuned, kl, image_mass, tokens = columns
    return {
        "perplexity_base": _exponential(ratio(loss_base, tokens)),
        "perplexity_tuned": _exponential(ratio(loss_tuned, tokens)),
        "kl": ratio(kl, tokens),
        "image_mass": ratio(image_mass, tokens),
    }


def _batches(
    sequences: Sequence[Sequence[int]], batch_size: int, num_text_ids: int
) -> Iterator[list[Sequence[int]]]:
    kept = [ids for ids in sequences if len(ids) > 1]
    foreign = [token_id for ids in kept for token_id in ids if not 0 <= token_id < num_text_ids]
    if foreign:
        raise MismatchError(
            f"token id {foreign[0]} in a text sequence; expected ids below {num_text_ids}: "
            "tokenize with the text tokenizer of the base"
        )
    kept.sort(key=len)
    for first in range(0, len(kept), batch_size):
        yield kept[first : first + batch_size]


@torch.inference_mode()
def _measure(
    base: Any, tuned: Any, batch: list[Sequence[int]], num_text_ids: int, pad_token_id: int
) -> tuple[Tensor, ...]:
    """Sums per sequence: loss of base, loss of tuned, KL, image mass; and its number of tokens."""
    longest = max(map(len, batch))
    ids_BT = torch.full((len(batch), longest), pad_token_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(batch):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = 1
    logits = [
        model(input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device))
        .logits[:, :-1]
        .float()
        .cpu()
        for model in (base, tuned)
    ]
    target, learnt = ids_BT[:, 1:], mask_BT[:, 1:]
    base_log = functional.log_softmax(logits[0][..., :num_text_ids], -1)
    whole_log = functional.log_softmax(logits[1], -1)
    text_log = whole_log[..., :num_text_ids]
    tuned_log = text_log - text_log.logsumexp(-1, keepdim=True)
    kl = (base_log.exp() * (base_log - tuned_log)).sum(-1).clamp(min=0)
    loss_base = -base_log.gather(-1, target[..., None])[..., 0]
    loss_tuned = -whole_log.gather(-1, target[..., None])[..., 0]
    image_mass = whole_log[..., num_text_ids:].exp().sum(-1)
    sums = [(value * learnt).sum(-1) for value in (loss_base, loss_tuned, kl, image_mass)]
    return (*sums, learnt.sum(-1))


def _exponential(score: Score) -> Score:
    values = {
        key: None if score[key] is None else float(torch.tensor(score[key]).exp())  # type: ignore[literal-required]
        for key in ("score", "low", "high")
    }
    return Score(score=values["score"], n=score["n"], low=values["low"], high=values["high"])
