"""The contrastive term of an image tokenizer's training: codes that tell a picture's caption.

Letters: B pictures and captions, L codes, D codebook_dim, W width of the shared space.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_WORDS = 2**15
WIDTH = 128
FIRST_TEMPERATURE, LEAST_TEMPERATURE = 0.07, 0.01


def words_of(caption: str) -> list[str]:
    """Return the lower-case words of a caption, cut at white space and punctuation."""
    return re.findall(r"\w+", caption.lower())


def collect_words(captions: Iterable[str]) -> list[str]:
    """Return the `MAX_WORDS` most frequent words of the captions, the most frequent first."""
    counts = Counter(word for caption in captions for word in words_of(caption))
    return [word for word, _ in counts.most_common(MAX_WORDS)]


class CaptionAlignment(nn.Module):
    """Code vectors (B, L, D) and their captions -> how badly one tells the other (InfoNCE).

    A picture is the projected mean of its code vectors; a caption is the projected mean of its
    words' embeddings. Both are scaled to unit length; their products over a learnt temperature are
    the logits of "which caption of the batch is this picture's" and of "which picture is this
    caption's". It lives as long as the training: a saved tokenizer has nothing of it.

    Args:
        words: that have an embedding; other words are passed over.
        codebook_dim: D.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
        (CLIP, 2021), §2.3 and figure 3 (symmetric loss), §2.5 (temperature: 0.07 at first, at least
        0.01). On quantized vectors, beside the reconstruction losses: Ma et al., "UniTok"
        (2025). Ours differs: the mean is taken over the code vectors themselves, before any
        layer of the decoder, so that it is the codes that carry the meaning; the caption encoder
        is a bag of words, learnt in the run, and no transformer; captions of the same words are no
        negatives of each other (small worlds repeat their captions).
    """

    def __init__(self, words: Sequence[str], codebook_dim: int) -> None:
        super().__init__()
        self.index = {word: index for index, word in enumerate(words)}
        self.word_embeddings = nn.EmbeddingBag(len(words), WIDTH, mode="mean")
        self.project_words = nn.Linear(WIDTH, WIDTH)
        self.project_codes = nn.Linear(codebook_dim, WIDTH)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(FIRST_TEMPERATURE)))

    def ids_of(self, caption: str) -> tuple[int, ...]:
        """Return the sorted indices of a caption's words; none: the caption takes no part."""
        return tuple(sorted(self.index[word] for word in words_of(caption) if word in self.index))

    def forward(self, vectors_BLD: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the loss.

        Args:
            vectors_BLD: float32 code vectors; gradients go through them to the encoder.
            captions: B texts; pictures whose caption has no known word (such as "") are left out.

        Returns:
            Scalar float32: the mean cross-entropy of both directions, in nats; 0 where fewer than
            two pictures are left.
        """
        rows, ids = self._known(captions)
        if len(rows) < 2:
            return vectors_BLD.new_zeros(())
        with torch.no_grad():
            self.log_temperature.clamp_(min=math.log(LEAST_TEMPERATURE))
        logits = self._logits(vectors_BLD[rows], ids)
        own = torch.arange(len(rows), device=logits.device)
        by_picture = functional.cross_entropy(logits, own)
        return (by_picture + functional.cross_entropy(logits.T, own)) / 2

    @torch.no_grad()
    def retrieve(self, vectors_BLD: Tensor, captions: Sequence[str]) -> tuple[int, float, int]:
        """Count the pictures whose own caption fits them best among the captions of the batch.

        Args:
            vectors_BLD: float32 code vectors.
            captions: as in :meth:`forward`.

        Returns:
            How many pictures found their caption, how many would by chance, and how many looked.
        """
        rows, ids = self._known(captions)
        if not rows:
            return 0, 0.0, 0
        logits = self._logits(vectors_BLD[rows], ids)
        own = torch.arange(len(rows), device=logits.device)
        return int((logits.argmax(-1) == own).sum()), len(rows) / len(set(ids)), len(rows)

    def _known(self, captions: Sequence[str]) -> tuple[list[int], list[tuple[int, ...]]]:
        """The rows whose caption has a known word, and the ids of those captions."""
        found = [(row, ids) for row, text in enumerate(captions) if (ids := self.ids_of(text))]
        return [row for row, _ in found], [ids for _, ids in found]

    def _logits(self, vectors_BLD: Tensor, ids: list[tuple[int, ...]]) -> Tensor:
        """(B, B) float32, pictures down, captions across; -inf: another caption of equal words."""
        device = vectors_BLD.device
        with torch.autocast(device.type, enabled=False):
            pictures = self.project_codes(vectors_BLD.float().mean(1))
            captions = self.project_words(self._mean_words(ids, device))
            fit = functional.normalize(pictures, dim=-1) @ functional.normalize(captions, dim=-1).T
            logits = fit / self.log_temperature.exp()
        numbers = {one: number for number, one in enumerate(dict.fromkeys(ids))}
        text = torch.tensor([numbers[one] for one in ids], device=device)
        same = text.unsqueeze(0) == text.unsqueeze(1)
        return logits.masked_fill(same.fill_diagonal_(False), -torch.inf)

    def _mean_words(self, ids: list[tuple[int, ...]], device: torch.device) -> Tensor:
        flat = torch.tensor([index for one in ids for index in one], device=device)
        starts = torch.tensor([0, *map(len, ids[:-1])], device=device).cumsum(0)
        return self.word_embeddings(flat, starts)
