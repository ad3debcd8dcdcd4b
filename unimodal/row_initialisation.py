"""Where the embedding rows of the image words start.

New rows that look like text rows disturb a language model least: they have the mean and covariance
of the text rows (``mean_cov``). ``codebook`` also puts similar codes close to each other, and
``meaning`` puts a code close to the words of the captions that it occurs with. The same method is
applied to the input embeddings and to the output head, each with its own statistics.

Legend: V text rows, N new rows, K codes over all codebooks, D width of the model, C of the code
vectors.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer_hf.errors import ConfigurationError, DataError, MismatchError
from tokenizer_hf.vocabulary import ImageVocabulary

ROW_INITS = ("mean_cov", "codebook", "normal", "meaning")
CODEBOOK_SHARE = 0.5  # weight of the codebook part beside the meaning part
_MOST_ROWS = 32_768  # text rows that the covariance is estimated from, or 8 D if that is more
_MOST_PAIRS = 200_000  # captioned pictures that the evidence is counted over


class TextRows:
    """Mean, covariance factor and scale of the text rows of one embedding matrix."""

    def __init__(self, rows_VD: Tensor, generator: torch.Generator) -> None:
        V, D = rows_VD.shape
        most = max(_MOST_ROWS, 8 * D)
        if most < V:
            rows_VD = rows_VD[torch.randperm(V, generator=generator)[:most]]
        sample = rows_VD.float()
        self.mean = sample.mean(0)
        centred = sample - self.mean
        self.std = float(sample.std())
        self.spread = float(centred.norm(dim=1).mean())
        covariance = centred.T @ centred / max(1, len(sample) - 1)
        ridge = max(1e-6 * float(covariance.diagonal().mean()), 1e-12)
        # Fewer rows than dimensions leave it singular; the ridge makes it factorable.
        factor, failed = torch.linalg.cholesky_ex(covariance + ridge * torch.eye(D))
        self.factor = torch.diag(covariance.diagonal().clamp_min(0).sqrt()) if failed else factor

    def coloured(self, noise_ND: Tensor) -> Tensor:
        """Deviations with the covariance of the text rows, from white ones."""
        return noise_ND @ self.factor.T


def new_rows(
    text_rows_VD: Tensor,
    vocabulary: ImageVocabulary,
    method: str = "mean_cov",
    *,
    code_vectors: Tensor | None = None,
    evidence: Any | None = None,
    seed: int = 0,
) -> Tensor:
    """Rows for the control ids and the codes, in id order, and for the padding after them.

    Args:
        text_rows_VD: the rows of all text ids; any float dtype.
        vocabulary: which ids are new; ``vocabulary.rows`` counts all rows.
        method: ``"mean_cov"``: N(mean, covariance of the text rows); ``"normal"``: N(0, their
            standard deviation); ``"codebook"``: the code vectors, randomly projected and coloured
            with that covariance; ``"meaning"``: the caption words of each code (``evidence``) plus
            half of the codebook part. Control ids are always ``mean_cov`` (or ``normal``).
        code_vectors: (codebook_size, C), for ``"codebook"`` and ``"meaning"``.
        evidence: (K, V) sparse weights from :func:`caption_evidence`, for ``"meaning"``.
        seed: of every random number.

    Returns:
        (rows - V, D) float32. Padding rows are the mean of the text rows, so that their logits are
        never large.

    Raises:
        ConfigurationError: an unknown method, or one without what it needs.

    Source: mean and covariance: J. Hewitt, "Initializing New Word Embeddings for Pretrained
        Language Models" (2021); as written there, without the down-scaling of transformers'
        ``mean_resizing``. The rest is ours.
    """
    if method not in ROW_INITS:
        raise ConfigurationError(f"row_init is {method!r}; expected one of {', '.join(ROW_INITS)}")
    if method in ("codebook", "meaning") and code_vectors is None:
        raise ConfigurationError(
            f"row_init {method!r} needs the code vectors of the image tokenizer"
        )
    if method == "meaning" and evidence is None:
        raise ConfigurationError(
            'row_init "meaning" needs captioned pictures: give `pairs`, a code cache'
        )
    generator = torch.Generator().manual_seed(seed)
    text = TextRows(text_rows_VD, generator)
    V, D = text_rows_VD.shape
    N = vocabulary.num_controls + vocabulary.num_codes
    codes = slice(vocabulary.num_controls, N)
    noise = torch.randn(N, D, generator=generator)
    rows = text.mean.expand(vocabulary.rows - V, D).clone()
    if method == "normal":
        rows[:N] = noise * text.std
        return rows
    rows[:N] += text.coloured(noise)
    if code_vectors is None or method == "mean_cov":
        return rows
    from_codebook = text.coloured(_projected(code_vectors, vocabulary.num_codebooks, D, generator))
    if method == "codebook":
        rows[codes] = text.mean + from_codebook
        return rows
    from_words, known = _meaning(evidence, text_rows_VD, text.mean)
    scale = text.spread / from_codebook.norm(dim=1).mean().clamp_min(1e-12)
    deviation = from_words * text.spread + CODEBOOK_SHARE * scale * from_codebook
    rows[codes] = torch.where(known[:, None], text.mean + deviation, rows[codes])
    return rows


def _projected(
    code_vectors: Tensor, num_codebooks: int, D: int, generator: torch.Generator
) -> Tensor:
    """Code vectors, standardised and randomly projected to D dimensions of about unit variance."""
    centred = code_vectors.float() - code_vectors.float().mean(0)
    centred = centred / centred.std().clamp_min(1e-12)
    C = centred.shape[1]
    return torch.cat(
        [centred @ torch.randn(C, D, generator=generator) / C**0.5 for _ in range(num_codebooks)]
    )


def _meaning(evidence: Any, text_rows_VD: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Unit directions from the mean to each code's words, and which codes have any."""
    words = np.unique(evidence.indices)
    deviations = (text_rows_VD[torch.from_numpy(words).long()].float() - mean).numpy()
    directions = torch.from_numpy(np.asarray(evidence[:, words] @ deviations, dtype=np.float32))
    known = torch.from_numpy(np.diff(evidence.indptr) > 0)
    return torch.nn.functional.normalize(directions, dim=1), known


def caption_evidence(
    pairs: str | Path, tokenizer: Any, vocabulary: ImageVocabulary, factors: np.ndarray
) -> Any:
    """How strongly each code speaks for each text token, over captioned pictures.

    The weight is positive pointwise mutual information between "the picture has the code" and "one
    of its captions has the token", damped by counts / (counts + 1), so that one chance meeting
    weighs little. Words that stand in every caption have no information and drop out. Where a code
    is made of factors, each factor is counted by itself and a code speaks with the sum of their
    voices, so codes that no picture has get their words too.

    Args:
        pairs: a code cache folder: Parquet shards with columns ``codes`` and ``captions``, and
            ``cache_manifest.json`` with the image tokenizer's fingerprint.
        tokenizer: the text tokenizer, extended or not.
        vocabulary: the image vocabulary.
        factors: (codebook_size, number of factors) of
            :meth:`ImageTokenizerConfig.code_factors`.

    Returns:
        scipy CSR float32 (K, V), V = the ids before the image vocabulary.

    Raises:
        DataError: no such folder, no Parquet file, or no row with codes and captions.
        MismatchError: the cache was made by another image tokenizer.

    Source: PPMI with the discount of P. Pantel and D. Lin, "Document clustering with committees"
        (2002), section 3; without their factor for the rarer of the two.
    """
    from scipy.sparse import csr_array

    pictures = _read_pairs(Path(pairs), vocabulary)
    codes, captions = zip(*pictures, strict=True)
    text_ids = tokenizer([c for several in captions for c in several], add_special_tokens=False)
    tokens = iter(text_ids["input_ids"])
    V = vocabulary.start_token_id
    per_picture = [[i for _ in several for i in next(tokens) if i < V] for several in captions]
    parts = _factor_columns(factors, vocabulary.num_codebooks)
    has_code = _incidence([parts[one] for one in codes], int(parts.max()) + 1, csr_array)
    has_token = _incidence(per_picture, V, csr_array)
    together = (has_code.T @ has_token).tocoo()
    row, column = together.coords
    count = together.data.astype(np.float64)
    expected = has_code.sum(0)[row].astype(np.float64) * has_token.sum(0)[column] / len(pictures)
    weight = np.maximum(np.log(count / expected), 0) * count / (count + 1)
    evidence = csr_array((weight.astype(np.float32), (row, column)), shape=together.shape)
    evidence.eliminate_zeros()
    return csr_array(_incidence(parts, evidence.shape[0], csr_array) @ evidence)


def _factor_columns(factors: np.ndarray, num_codebooks: int) -> np.ndarray:
    """Factors of the codes of all codebooks, (K, number of factors); no two codebooks share one."""
    width = int(factors.max()) + 1
    return np.concatenate([factors + book * width for book in range(num_codebooks)])


def _read_pairs(folder: Path, vocabulary: ImageVocabulary) -> list[tuple[Any, list[str]]]:
    import pyarrow.parquet as parquet

    manifest = folder / "cache_manifest.json"
    if not manifest.is_file():
        raise DataError(
            f"{folder} is no code cache: it has no {manifest.name}; build it with `encode`"
        )
    made_by = json.loads(manifest.read_text(encoding="utf-8")).get("fingerprint")
    if made_by != vocabulary.fingerprint:
        raise MismatchError(
            f"the codes in {folder} were made by the image tokenizer {str(made_by)[:12]}, this "
            f"one is {vocabulary.fingerprint[:12]}; encode the pictures again with this one"
        )
    G, K = vocabulary.num_codebooks, vocabulary.codebook_size
    book = np.arange(G) * K
    pictures = []
    for file in sorted(folder.glob("**/*.parquet")):
        table = parquet.read_table(file, columns=["codes", "captions"]).to_pydict()
        for codes, captions in zip(table["codes"], table["captions"], strict=True):
            if codes and captions:
                columns = np.asarray(codes, np.int64).reshape(-1, G) + book
                pictures.append((columns.reshape(-1), captions))
        if len(pictures) >= _MOST_PAIRS:
            break
    if not pictures:
        raise DataError(f"{folder} has no picture with codes and captions; row_init needs some")
    return pictures


def _incidence(members: Any, width: int, csr: Any) -> Any:
    """(sets, width) 0/1: which members occur in each set."""
    unique = [np.unique(np.asarray(ids, np.int64)) for ids in members]
    ends = np.concatenate([[0], np.cumsum([len(ids) for ids in unique])])
    columns = np.concatenate(unique)
    return csr((np.ones(len(columns), np.int64), columns, ends), shape=(len(unique), width))
