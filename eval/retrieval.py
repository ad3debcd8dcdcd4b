"""Which of 20 captions fits a picture? Scores for captioned pictures that no parser can read.

A judge says of each caption how much more the picture speaks for it than pictures do on the whole,
log p(caption | picture) - log p(caption): the pointwise mutual information. Two judges are here,
named as what they are: the model's own likelihood, and a small classifier trained on real pictures.
Neither knows what people see. Both are measured on real held-out pictures too: their ceiling.
"""

import copy
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from eval.scores import Score, mean, share
from tokenizer_hf.errors import DataError
from unimodal.messages import Message
from unimodal.pipeline import Unimodal

logger = logging.getLogger(__name__)

CANDIDATES = 20
NUM_REFERENCES = 32
"""Real pictures over which the model's own likelihood of a caption is averaged."""
MOST_TRAINING_PICTURES = 10_000
"""Of the classifier."""

_ROWS = 64  # captions of one picture in one forward
_SIDE = 32  # pixels of what the classifier sees
_LEAST_PICTURES = 5  # training pictures whose captions hold a word, for it to be learnt
_STEPS, _BATCH, _LEARNING_RATE, _WEIGHT_DECAY = 400, 64, 3e-3, 0.05

Judge = Callable[[Image.Image, Sequence[str]], Tensor]
"""A picture and C captions -> float (C,), higher where a caption fits better."""


@dataclass(frozen=True)
class Trial:
    """The captions that one picture is asked about."""

    captions: tuple[str, ...]
    """In random order; exactly one is the picture's."""
    true: int
    """Its position."""


def make_trials(
    captions: Sequence[Sequence[str]], seed: int, most: int = CANDIDATES
) -> list[Trial]:
    """Put the first caption of every picture among those of other pictures.

    Args:
        captions: of each held-out picture; at least one each.
        seed: draws the distractors and shuffles.
        most: captions in a trial. Every trial has fewer where the pictures are too few.

    Returns:
        a trial for each picture, all with as many candidates. The distractors are first captions
        too, differ from each other, and none is among the captions of the picture, but for case
        and white space.

    Raises:
        DataError: a picture that no other caption can be held against.
    """
    firsts = {_plain(own[0]): own[0] for own in captions}
    others = []
    for own in captions:
        mine = set(map(_plain, own))
        others.append([text for plain, text in firsts.items() if plain not in mine])
    number = min([most - 1, *map(len, others)])
    if number < 1:
        raise DataError(
            f"{len(captions)} held-out pictures with {len(firsts)} different captions; expected "
            "for each picture at least one caption that is not its own"
        )
    rng = random.Random(f"{seed}-retrieval")
    trials = []
    for own, foreign in zip(captions, others, strict=True):
        found = [own[0], *rng.sample(foreign, number)]
        rng.shuffle(found)
        trials.append(Trial(tuple(found), found.index(own[0])))
    return trials


def score_retrieval(
    judge: Judge, pictures: Sequence[Image.Image], trials: Sequence[Trial]
) -> dict[str, Score]:
    """Ask a judge which caption fits.

    Captions that a judge cannot tell apart come in the random order of their trial, so a judge that
    knows nothing is right by chance, and no caption is left out.

    Args:
        pictures: drawings of the trials' true captions, or the real pictures.

    Returns:
        first: share of pictures whose true caption comes first; chance is 1 / candidates.
        reciprocal_rank: mean of 1 / rank of the true caption, in (0, 1]; chance is the mean of 1,
            1/2, ..., 1 / candidates: 0.18 of 20.
    """
    ranks = []
    for picture, trial in zip(pictures, trials, strict=True):
        values = judge(picture, trial.captions)
        order = torch.argsort(values, descending=True, stable=True).tolist()
        ranks.append(1 + order.index(trial.true))
    return {
        "first": share([rank == 1 for rank in ranks]),
        "reciprocal_rank": mean([1 / rank for rank in ranks]),
    }


# --- the model's own likelihood -------------------------------------------------------------------


class CaptionLikelihood:
    """log p(caption | picture) under the captioning direction of a model.

    The sum over the ids of the caption and the end of the turn, in nats. A caption stands where the
    model would write it, behind its own caption instruction.
    """

    def __init__(self, model: Unimodal) -> None:
        self.model = model
        self._answers: dict[str, list[int]] = {}

    @torch.inference_mode()
    def __call__(self, picture: Image.Image, captions: Sequence[str]) -> Tensor:
        """Return float32 (C,), on the CPU. The picture is read once for all captions."""
        processor, model = self.model.processor, self.model.model
        [codes] = processor.encode_images([picture]).tolist()
        asked = processor.caption_messages({"type": "image", "codes": codes})
        prompt = processor.render(asked, add_generation_prompt=True).input_ids
        answers = [self._answer(asked, len(prompt), caption) for caption in captions]
        read = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=True)
        sums = []
        for first in range(0, len(answers), _ROWS):
            rows = [torch.tensor(ids) for ids in answers[first : first + _ROWS]]
            # Filled up at the right, where a causal model does not look back at it.
            ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
            known_BT = (ids_BT >= 0).to(model.device)
            ids_BT = ids_BT.clamp(min=0).to(model.device)
            cache = copy.deepcopy(read.past_key_values)
            cache.batch_repeat_interleave(len(rows))
            said = model(input_ids=ids_BT, past_key_values=cache, use_cache=True).logits
            start = read.logits[:, -1:].expand(len(rows), -1, -1)
            log_BTV = torch.cat([start, said[:, :-1]], 1).float().log_softmax(-1)
            log_BT = log_BTV.gather(-1, ids_BT[..., None])[..., 0]
            sums.append((log_BT * known_BT).sum(-1).cpu())
        return torch.cat(sums)

    def _answer(self, asked: Sequence[Message], start: int, caption: str) -> list[int]:
        """The ids of a caption and of the end of the turn; no picture changes them."""
        if caption not in self._answers:
            rendered = self.model.processor.render(
                [*asked, {"role": "assistant", "content": caption}]
            )
            assert rendered.learnt[-1].start == start  # what `messages.render` promises
            self._answers[caption] = rendered.input_ids[start : rendered.learnt[-1].stop]
        return self._answers[caption]


def own_likelihood(
    log_likelihood: Judge,
    captions: Iterable[str],
    pictures: Sequence[Image.Image],
    seed: int,
) -> Judge:
    """Judge by log p(caption | picture) - log p(caption), both of the model itself.

    A plain sum would favour short and common captions whatever the picture, and a mean over tokens
    long ones whose later tokens follow from the first. The difference is fair to both: what a
    caption costs by itself drops out. p(caption) is the mean of p(caption | picture) over
    `NUM_REFERENCES` real pictures, and not p(caption | no picture): the model has never been asked
    for a caption of nothing. All captions have the same references, so the true one has no
    advantage where its own picture is among them.

    Args:
        log_likelihood: log p(caption | picture), such as a `CaptionLikelihood`.
        captions: all that will be asked about.
        pictures: the real ones, from which the references are drawn.
        seed: draws them.
    """
    texts = list(dict.fromkeys(captions))
    rng = random.Random(f"{seed}-references")
    references = rng.sample(list(pictures), min(NUM_REFERENCES, len(pictures)))
    log_RC = torch.stack([log_likelihood(picture, texts) for picture in references])
    alone = dict(zip(texts, log_RC.logsumexp(0) - math.log(len(references)), strict=True))

    def judge(picture: Image.Image, captions: Sequence[str]) -> Tensor:
        return log_likelihood(picture, captions) - torch.stack([alone[text] for text in captions])

    return judge


# --- a small classifier ---------------------------------------------------------------------------


class WordClassifier:
    """Pixels -> words: a small convolutional network that says which words a caption would hold.

    Args:
        network: float32 (B, 3, 32, 32) in [-1, 1] -> (B, words): by how much the log-odds of each
            word differ from those that it has over all training pictures.
        words: lower case; what the network knows.
    """

    def __init__(self, network: nn.Module, words: Sequence[str]) -> None:
        self.network = network.eval()
        self.words = {word: index for index, word in enumerate(words)}

    def known(self, caption: str) -> list[str]:
        """The different words of a caption that the classifier knows."""
        return [word for word in dict.fromkeys(words_of(caption)) if word in self.words]

    @torch.inference_mode()
    def __call__(self, picture: Image.Image, captions: Sequence[str]) -> Tensor:
        """Judge by the summed log-odds of a caption's known words, less what they always have.

        If words came independently, that would be log p(words | picture) - log p(words), but for a
        constant of the picture. A caption without a known word gets 0: nothing speaks for or
        against it.

        Returns:
            float32 (C,).
        """
        [evidence] = self.network(_pixels([picture]))
        return torch.stack(
            [
                evidence[[self.words[word] for word in self.known(caption)]].sum()
                for caption in captions
            ]
        )


def words_of(caption: str) -> list[str]:
    """The words of a caption, lower case: runs of letters and digits."""
    return re.findall(r"[^\W_]+", caption.lower())


def train_word_classifier(
    pictures: Iterable[tuple[Image.Image, Sequence[str]]], seed: int
) -> WordClassifier:
    """Train a classifier from nothing, in seconds on one core.

    Args:
        pictures: training pictures with all of their captions; `MOST_TRAINING_PICTURES` are read.
            A word is learnt if it comes in the captions of at least 5, and not of all.
        seed: of the weights and of the order of the pictures.

    Raises:
        DataError: there is no such word.
    """
    images, found = [], []
    for picture, captions in islice(pictures, MOST_TRAINING_PICTURES):
        images.append(_thumbnail(picture))
        found.append({word for caption in captions for word in words_of(caption)})
    counts = Counter(word for words in found for word in words)
    words = sorted(w for w, count in counts.items() if _LEAST_PICTURES <= count < len(images))
    if not words:
        raise DataError(
            f"no word comes in the captions of {_LEAST_PICTURES} of {len(images)} training "
            "pictures, and not of all; the classifier needs more pictures, or captions that "
            "share words"
        )
    pixels_NCHW = _pixels(images)
    column = {word: index for index, word in enumerate(words)}
    there_NW = torch.zeros(len(images), len(words))
    for row, own in enumerate(found):
        there_NW[row, [column[word] for word in own if word in column]] = 1
    usual_W = torch.logit(there_NW.mean(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(len(words))
        optimizer = torch.optim.AdamW(
            network.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        for _ in range(_STEPS):
            batch = torch.randint(len(images), (_BATCH,))
            logits = network(pixels_NCHW[batch]) + usual_W
            loss = functional.binary_cross_entropy_with_logits(
                logits, there_NW[batch], reduction="sum"
            )
            optimizer.zero_grad()
            (loss / _BATCH).backward()
            optimizer.step()
            schedule.step()
    return WordClassifier(network, words)


def _network(num_words: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after)]
        layers += [nn.ReLU()]
    last = nn.Linear(64 * (_SIDE // 8) ** 2, num_words)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), last)


def _thumbnail(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)


def _pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """float32 (B, 3, 32, 32) in [-1, 1]."""
    values = np.stack([np.asarray(_thumbnail(picture)) for picture in pictures])
    return torch.from_numpy(values).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- both -----------------------------------------------------------------------------------------


def score_by_both(
    model: Unimodal,
    pictures: Sequence[tuple[Image.Image, Sequence[str]]],
    drawings: Sequence[Image.Image],
    training_pictures: Iterable[tuple[Image.Image, Sequence[str]]] | None,
    seed: int,
) -> dict[str, Any]:
    """Score drawings, and real pictures as the ceiling, by both judges.

    What cannot be measured is left out, and a warning says why.

    Args:
        pictures: held-out pictures with their captions, at least one each.
        drawings: what the model drew from the first captions of the first of these pictures.
        training_pictures: what the classifier learns from. None: no classifier.
        seed: of the candidates, the references and the classifier.

    Returns:
        the section `retrieval` of the report (docs/report_schema.md); empty where the captions
        are too few.
    """
    try:
        trials = make_trials([captions for _, captions in pictures], seed)
    except DataError as error:
        logger.warning("retrieval is not measured: %s", error)
        return {}
    real = [picture for picture, _ in pictures]

    def scores(judge: Judge) -> dict[str, Any]:
        return {
            "drawings": score_retrieval(judge, drawings, trials[: len(drawings)]),
            "pictures": score_retrieval(judge, real, trials),
        }

    asked = [caption for trial in trials for caption in trial.captions]
    section: dict[str, Any] = {
        "candidates": _count(len(trials[0].captions), len(trials)),
        "own_likelihood": scores(own_likelihood(CaptionLikelihood(model), asked, real, seed)),
    }
    try:
        if training_pictures is None:
            raise DataError("no training pictures came; give --train-pictures")
        classifier = train_word_classifier(training_pictures, seed)
    except DataError as error:
        logger.warning("retrieval by a classifier is not measured: %s", error)
        return section
    known = share([bool(classifier.known(captions[0])) for _, captions in pictures])
    words = _count(len(classifier.words), len(pictures))
    section["classifier"] = {**scores(classifier), "known": known, "words": words}
    return section


def _count(value: int, n: int) -> Score:
    return Score(score=value, n=n, low=None, high=None)


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())
