"""Trains an image tokenizer: pictures in, a folder that ``from_pretrained`` loads out.

::

    output_dir/
      config.json  model.safetensors  preprocessor_config.json  vocabulary_extension.json
      metrics.json                    psnr, codes_used, ... of held-out pictures
      recipe.yaml                     the recipe, to be run again
      training/checkpoint.pt          the last state; a run that was stopped goes on from it
      training/pictures/step-*.png    held-out pictures over their reconstructions
      training/tensorboard/           losses and use of the codebook

A step depends on its number alone (its pictures, its learning rate, its random numbers), so a run
that was stopped and goes on equals one that was not.
"""

import copy
import json
import logging
import math
import os
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
from tokenizer_hf.errors import CheckpointError, ConfigurationError, DataError
from tokenizer_hf.files import atomic_write
from tokenizer_hf.image_processing_image_tokenizer import (
    ImageTokenizerImageProcessor,
    to_pixel_values,
    to_uint8,
)
from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
from training.caption_alignment import CaptionAlignment, collect_words, words_of
from training.data.sources import Row, open_source
from training.estimate import device_peak, image_tokenizer_estimate, reached
from training.precision import bf16_is_faster
from training.recipes import differences, recipe_to_dict, save_recipe

logger = logging.getLogger(__name__)

MEMORY_LIMIT_BYTES = 2**30
GRID_PICTURES = 8
START_PICTURES = 2048
FREE_FIELDS = (  # may differ when a run goes on; of the pictures, a checksum is compared instead
    "data",
    "held_out_data",
    "output_dir",
    "device",
    "log_every",
    "pictures_every",
    "checkpoint_every",
)


@dataclass(kw_only=True)
class TokenizerRecipe:
    """``unimodal train-tokenizer``: what to train on, what to train, and how."""

    data: list[str]
    """Pictures: imagefolders, plain folders, Parquet files or folders of them, hub ids."""
    output_dir: str
    num_pictures: int | None = None
    """Learn from so many pictures only, taken from the beginning of ``data``; without
    ``held_out_data``, those that are held out come on top. They are all read beforehand (48 KiB
    each at 128 pixels; beyond 1 GiB into a temporary file)."""
    held_out_data: list[str] = field(default_factory=list)
    """Pictures to measure on, of the split "validation" where there are splits. Empty: ``held_out``
    pictures are taken out of ``data``."""
    held_out: int = 256
    """Pictures to measure on, at most."""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Passed on to ImageTokenizerConfig."""
    image_processor: dict[str, Any] = field(default_factory=dict)
    """Passed on to ImageTokenizerImageProcessor; its size is the tokenizer's."""
    start: Literal["random", "principal_components"] = "random"
    """How the weights begin; "principal_components": see
    :meth:`ImageTokenizer.start_from_principal_components`, for ``patch_local`` tokenizers."""
    max_steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 1e-3
    """Highest, after warm-up; from there it falls to 0 along a cosine."""
    warmup_steps: int = 50
    weight_decay: float = 0.01
    """Of matrices and convolutions. Biases, norms, positions and the codebook never decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    loss_weights: dict[str, float] = field(default_factory=dict)
    """Factor on each named loss of the forward pass (l1, l2, commitment, codebook); 1 where none is
    given. And on ``contrastive``, 0 where none is given: code vectors are pulled towards the
    picture's caption and away from the other captions of the batch, see
    :class:`training.caption_alignment.CaptionAlignment`; the data need captions then."""
    ema_decay: float = 0.999
    """The saved weights are a running mean of the trained ones that keeps this share at each step
    (less at the start). 0: the trained weights themselves."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Autocast format of the forward pass; weights, quantizer and losses are float32 always.
    "auto": what is faster on this machine, measured; a resumed run keeps what it had."""
    seed: int = 0
    device: str | None = None
    """None: CUDA where there is one, else the CPU."""
    log_every: int = 20
    pictures_every: int = 500
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        if self.num_pictures is not None and self.num_pictures < 1:
            raise ConfigurationError(f"num_pictures is {self.num_pictures}; expected at least 1")
        for name in ("max_steps", "batch_size", "held_out", "log_every", "pictures_every",
                     "checkpoint_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.data:
            raise ConfigurationError("data is empty; expected at least one folder or file")
        if not 0 <= self.ema_decay < 1:
            raise ConfigurationError(f"ema_decay is {self.ema_decay}; expected at least 0, below 1")
        known = ("l1", "l2", "commitment", "codebook", "contrastive")
        for name in self.loss_weights:
            if name not in known:
                raise ConfigurationError(
                    f"loss_weights has {name!r}; expected some of {', '.join(known)}"
                )
        if self.contrastive_weight < 0:
            raise ConfigurationError(
                f"loss_weights.contrastive is {self.contrastive_weight}; expected at least 0"
            )
        if self.contrastive_weight and self.batch_size < 2:
            raise ConfigurationError(
                "loss_weights.contrastive compares the captions of a batch; batch_size is "
                f"{self.batch_size}, expected at least 2"
            )

    @property
    def contrastive_weight(self) -> float:
        """Factor on the contrastive term; 0: there is none, and captions are not read."""
        return self.loss_weights.get("contrastive", 0.0)

    def count_pictures(self) -> int:
        """Return how many pictures it learns from."""
        there = sum(len(open_source(name, need_text=False)) for name in self.data)
        if not self.held_out_data:
            there -= self.held_out
        return there if self.num_pictures is None else min(there, self.num_pictures)


def train_image_tokenizer(recipe: TokenizerRecipe) -> Path:
    """Train an image tokenizer, or go on with a training that was stopped.

    Args:
        recipe: see :class:`TokenizerRecipe`.

    Returns:
        ``output_dir``, which :meth:`ImageTokenizer.from_pretrained` loads.

    Raises:
        ConfigurationError: ``output_dir`` holds a run of another recipe or of other data, or the
            contrastive term is asked of an encoder without weights.
        DataError: no usable picture, or no captions for the contrastive term.
        CheckpointError: the last checkpoint cannot be read.
    """
    folder = Path(recipe.output_dir)
    config = _build(ImageTokenizerConfig, "tokenizer", recipe.tokenizer)
    size = {"size": config.image_size}
    processor = _build(
        ImageTokenizerImageProcessor, "image_processor", {**size, **recipe.image_processor}
    )
    if processor.size != config.image_size:
        raise ConfigurationError(
            f"image_processor.size is {processor.size}, tokenizer.image_size {config.image_size}; "
            "leave size out"
        )
    if recipe.contrastive_weight and config.encoder_type == "palette":
        raise ConfigurationError(
            f"loss_weights.contrastive is {recipe.contrastive_weight}, but a palette encoder has "
            "no weights that captions could train; use a conv or vit encoder, or set it to 0"
        )
    (folder / "training").mkdir(parents=True, exist_ok=True)
    data = _read_data(recipe, processor)
    run = _Run(recipe, config, data)
    run.model.image_processor = run.averaged.image_processor = processor
    run.resume()
    save_recipe(recipe, folder / "recipe.yaml")
    file = folder / "metrics.json"
    earlier: dict[str, Any] = {}
    if run.step >= recipe.max_steps and file.is_file():  # finished before: its time was taken then
        earlier = json.loads(file.read_text(encoding="utf-8"))
    started = time.monotonic()
    speed = run.train()
    seconds = round(time.monotonic() - started, 1)
    metrics: dict[str, Any] = {
        **run.measure(),
        "steps": recipe.max_steps,
        "pictures": len(data.rows),
        "fingerprint": run.averaged.fingerprint(),
    }
    metrics = {**earlier, **metrics} if earlier else {**metrics, "seconds": seconds, **speed}
    run.averaged.save_pretrained(folder)
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class _Data:
    """What a training learns from and is measured on."""

    pictures: np.ndarray
    """uint8 (N, size, size, 3)."""
    rows: np.ndarray
    """int64: those of ``pictures`` to learn from."""
    held_out: np.ndarray
    """uint8 (M, size, size, 3)."""
    captions: list[list[str]]
    """Of each of ``pictures``, its captions; empty without a contrastive term."""
    held_out_captions: list[list[str]]


class _Run:
    """The state of a training, and its loop."""

    def __init__(self, recipe: TokenizerRecipe, config: ImageTokenizerConfig, data: _Data) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.output_dir) / "training"
        self.data = data
        self.pictures = data.pictures
        self.rows = data.rows
        self.held_out = data.held_out
        self.device = torch.device(
            recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        self.precision: str = recipe.precision
        if self.precision == "auto":
            self.precision = "bfloat16" if bf16_is_faster(self.device) else "float32"
        torch.manual_seed(recipe.seed)
        self.model = ImageTokenizer(config)
        if recipe.start == "principal_components":
            count = len(self.rows)
            first = self.rows[picture_indices(count, min(count, START_PICTURES), recipe.seed, 0)]
            self.model.start_from_principal_components(to_pixel_values(self.pictures[first]))
        self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[arg-type]
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        # By the names in the checkpoint: what learns, and the running means of its weights.
        self.learners: dict[str, nn.Module] = {"model": self.model}
        self.averages: dict[str, nn.Module] = {"averaged": self.averaged}
        self.alignment: CaptionAlignment | None = None
        self.averaged_alignment: CaptionAlignment | None = None
        if recipe.contrastive_weight:
            words = collect_words(text for row in self.rows for text in data.captions[row])
            self.alignment = CaptionAlignment(words, config.codebook_dim).to(self.device)
            self.averaged_alignment = copy.deepcopy(self.alignment).eval().requires_grad_(False)
            self.learners["alignment"] = self.alignment
            self.averages["averaged_alignment"] = self.averaged_alignment
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.learners.values(), recipe.weight_decay),
            lr=recipe.learning_rate,
            betas=recipe.betas,
            fused=True,
        )
        self.step = 0

    def train(self) -> dict[str, Any]:
        """Take the steps that are left; return how fast they were (`training.estimate.reached`).

        Logging, sheets and checkpoints are not counted, nor is the first step of the process.
        """
        from torch.utils.tensorboard import SummaryWriter

        recipe = self.recipe
        if self.step >= recipe.max_steps:
            return {}
        first, seconds, since = self.step + 1, 0.0, 0.0
        counts = torch.zeros(self.model.config.codebook_size, device=self.device)
        with (
            SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step) as board,
            tqdm(
                total=recipe.max_steps, initial=self.step, desc="image tokenizer", disable=None
            ) as bar,
        ):
            while self.step < recipe.max_steps:
                losses, codes = self._train_step()
                self.step += 1
                if self.step > first:
                    seconds += time.perf_counter() - since
                bar.update()
                counts += torch.bincount(codes.flatten(), minlength=len(counts))
                last = self.step == recipe.max_steps
                if self.step % recipe.log_every == 0 or last:
                    values = {name: float(loss.detach()) for name, loss in losses.items()}
                    bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
                    self._log(board, values, counts)
                    counts.zero_()
                if self.step % recipe.pictures_every == 0 or last:
                    self._save_pictures()
                if self.step % recipe.checkpoint_every == 0 or last:
                    self.save()
                since = time.perf_counter()
        if self.step == first:
            return {}
        bf16 = self.precision == "bfloat16"
        cost = image_tokenizer_estimate(recipe, len(self.rows)).flops_per_step
        peak = device_peak(self.device.type, bf16)
        return reached(cost * (self.step - first), seconds, peak)

    def measure(self) -> dict[str, float | int]:
        """Measure the averaged model on the held-out pictures.

        ``psnr``: dB, of the mean squared error over all pictures, on 8-bit values. ``codes_used``:
        how many different codes they use. ``perplexity``: exp of the entropy of the codes' use.
        With a contrastive term, ``caption_retrieval``: share of the captioned pictures whose own
        (first) caption fits them best among those of their batch, and ``caption_retrieval_chance``:
        the share that guessing would give.
        """
        counts = np.zeros(self.averaged.config.codebook_size, dtype=np.int64)
        squared_error = 0.0
        retrieved = np.zeros(3)
        for start in range(0, len(self.held_out), self.recipe.batch_size):
            batch = self.held_out[start : start + self.recipe.batch_size]
            codes = self.averaged.encode(to_pixel_values(batch).to(self.device))
            painted = to_uint8(self.averaged.decode(codes))
            squared_error += np.square(painted.astype(np.float64) - batch).sum()
            counts += np.bincount(codes.flatten().cpu().numpy(), minlength=len(counts))
            if self.averaged_alignment is not None:
                vectors = self.averaged.quantizer.lookup(codes)
                captions = self.data.held_out_captions[start : start + len(batch)]
                first = [texts[0] if texts else "" for texts in captions]
                retrieved += self.averaged_alignment.retrieve(vectors, first)
        error = max(squared_error / self.held_out.size, 1e-10)
        metrics: dict[str, float | int] = {
            "psnr": round(10 * math.log10(255**2 / error), 3),
            "codes_used": int((counts > 0).sum()),
            "codebook_size": len(counts),
            "perplexity": round(_perplexity(counts), 2),
            "held_out_pictures": len(self.held_out),
        }
        if self.averaged_alignment is not None:
            found, by_chance, looked = retrieved
            metrics["caption_retrieval"] = round(found / max(looked, 1), 4)
            metrics["caption_retrieval_chance"] = round(by_chance / max(looked, 1), 4)
            metrics["held_out_captions"] = int(looked)
        return metrics

    def save(self) -> None:
        """Write ``checkpoint.pt`` atomically."""
        state = {
            "step": self.step,
            **{name: part.state_dict() for name, part in self.learners.items()},
            **{name: part.state_dict() for name, part in self.averages.items()},
            "optimizer": self.optimizer.state_dict(),
            "identity": self._identity(),
        }
        with atomic_write(self.folder / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def resume(self) -> None:
        """Go on from ``checkpoint.pt``, if there is one."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # torch raises errors of many types on damaged files
            raise CheckpointError(f"{str(path)!r} is damaged; remove it to start over") from error
        if self.recipe.precision == "auto":
            self.precision = state["identity"]["precision"]
        changed = differences(self._identity(), state["identity"])
        if changed:
            raise ConfigurationError(
                f"{str(self.folder.parent)!r} holds the run of another recipe: "
                f"{'; '.join(changed)}; give another output_dir, or remove {str(path)!r}"
            )
        for name, part in (*self.learners.items(), *self.averages.items()):
            part.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        logger.info("going on from step %d", self.step)

    def _identity(self) -> dict[str, Any]:
        """What must not change when a run goes on."""
        recipe = recipe_to_dict(self.recipe)
        checksum = zlib.crc32(np.ascontiguousarray(self.pictures).data)
        identity = {
            **{name: value for name, value in recipe.items() if name not in FREE_FIELDS},
            "precision": self.precision,
            "pictures": f"{len(self.pictures)} with checksum {checksum:08x}",
        }
        if self.alignment is not None:
            checksum = zlib.crc32(json.dumps(self.data.captions).encode())
            identity["captions"] = f"checksum {checksum:08x}"
        return identity

    def _train_step(self) -> tuple[dict[str, Tensor], Tensor]:
        recipe, model = self.recipe, self.model
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)
        chosen = picture_indices(len(self.rows), recipe.batch_size, recipe.seed, self.step)
        pixels = torch.from_numpy(self.pictures[self.rows[chosen]]).to(self.device)
        pixel_values = pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)  # is channels_last
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, self.step)
        model.train()
        with self._autocast():
            out = model(pixel_values)
        losses = dict(out.losses)
        if self.alignment is not None:
            captions = self._captions_of(self.rows[chosen])
            losses["contrastive"] = self.alignment(out.code_vectors, captions)
        weights = recipe.loss_weights
        terms = [weights.get(name, 1.0) * loss for name, loss in losses.items()]
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.stack(terms).sum()
        if loss.requires_grad:  # palette bodies with running means learn without a gradient
            loss.backward()
        trained = [p for part in self.learners.values() for p in part.parameters()]
        nn.utils.clip_grad_norm_(trained, recipe.gradient_clip)
        self.optimizer.step()
        self._average()
        return losses, out.codes

    def _captions_of(self, rows: np.ndarray) -> list[str]:
        """One caption of each picture, drawn anew in each step; "" where it has none."""
        random = np.random.default_rng([self.recipe.seed, self.step, 1])
        captions = [self.data.captions[row] for row in rows]
        return [texts[random.integers(len(texts))] if texts else "" for texts in captions]

    def _autocast(self) -> AbstractContextManager:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @torch.no_grad()
    def _average(self) -> None:
        """Let the averaged weights follow. Codes are copied: the mean of moved codes is no code."""
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        if not self.recipe.ema_decay:
            decay = 0.0
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        for average, part in zip(self.averages.values(), self.learners.values(), strict=True):
            for (name, mean), value in zip(
                average.named_parameters(), part.parameters(), strict=True
            ):
                if name.startswith("quantizer."):
                    mean.copy_(value)
                else:
                    ours.append(mean)
                    theirs.append(value)
            for kept, current in zip(average.buffers(), part.buffers(), strict=True):
                kept.copy_(current)
        if ours:
            torch._foreach_lerp_(ours, theirs, 1 - decay)

    def _log(self, board: Any, losses: dict[str, float], counts: Tensor) -> None:
        for name, value in losses.items():
            board.add_scalar(f"loss/{name}", value, self.step)
        board.add_scalar("learning_rate", learning_rate(self.recipe, self.step), self.step)
        board.add_scalar("codebook/used", int((counts > 0).sum()), self.step)
        board.add_scalar("codebook/perplexity", _perplexity(counts.cpu().numpy()), self.step)

    def _save_pictures(self) -> None:
        originals = self.held_out[:GRID_PICTURES]
        codes = self.averaged.encode(to_pixel_values(originals).to(self.device))
        painted = to_uint8(self.averaged.decode(codes))
        rows = [np.concatenate(list(row), axis=1) for row in (originals, painted)]
        sheet = Image.fromarray(np.concatenate(rows))
        with atomic_write(self.folder / "pictures" / f"step-{self.step:06d}.png") as temporary:
            sheet.save(temporary, "PNG")


def learning_rate(recipe: TokenizerRecipe, step: int) -> float:
    """The learning rate of a step (from 0): linear warm-up, then a cosine that ends at 0."""
    warm = min(1.0, (step + 1) / max(recipe.warmup_steps, 1))
    return recipe.learning_rate * warm * (1 + math.cos(math.pi * step / recipe.max_steps)) / 2


def picture_indices(num_pictures: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The pictures of a step: consecutive pieces of one shuffled pass after the other."""
    wanted = np.arange(step * batch_size, (step + 1) * batch_size)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(wanted // num_pictures):
        order = np.random.default_rng([seed, int(epoch)]).permutation(num_pictures)
        here = wanted // num_pictures == epoch
        indices[here] = order[wanted[here] % num_pictures]
    return indices


def read_pictures(
    sources: list[str], processor: ImageTokenizerImageProcessor, limit: int | None = None
) -> np.ndarray:
    """Read pictures at the processor's size, uint8 (N, size, size, 3).

    They are kept in memory up to 1 GiB, beyond that in a temporary file that vanishes with the
    process. Broken ones are reported, counted and skipped.

    Raises:
        DataError: not one usable picture.
    """
    return _read(sources, processor, limit, with_captions=False)[0]


def _read(
    sources: list[str],
    processor: ImageTokenizerImageProcessor,
    limit: int | None,
    with_captions: bool,
    split: str = "train",
) -> tuple[np.ndarray, list[list[str]]]:
    """Pictures as :func:`read_pictures`, and of each its captions that have a word.

    ``split``: of hub data sets, and of folders that have a sub-folder of that name.
    """
    opened = [open_source(name, split=split, need_text=False) for name in sources]
    most = sum(map(len, opened))
    most = most if limit is None else min(most, limit)
    pictures = _room_for((most, processor.size, processor.size, 3))
    captions: list[list[str]] = []
    count = 0
    for row, image in tqdm(_images(opened), total=most, desc="reading pictures", disable=None):
        pictures[count] = np.asarray(processor.fit(image))
        if with_captions:
            captions.append([text for text in row.captions if words_of(text)])
        count += 1
        if count == most:
            break
    if count == 0:
        raise DataError(f"{', '.join(sources)} hold no picture; expected at least one")
    return pictures[:count], captions


def _check_captions(sources: list[str], captions: list[list[str]], least: int) -> None:
    """A contrastive term needs captions; pictures without any learn by reconstruction alone."""
    without = sum(not texts for texts in captions)
    if len(captions) - without < least:
        raise DataError(
            f"of the {len(captions)} pictures of {', '.join(sources)}, "
            f"{len(captions) - without} have a caption, and loss_weights.contrastive needs "
            f"{least} at least; give Parquet with captions or a folder with metadata.jsonl "
            "(docs/data_formats.md), or set it to 0"
        )
    if without:
        logger.warning(
            "%s: %d of %d pictures have no caption and take no part in the contrastive term",
            ", ".join(sources), without, len(captions),
        )  # fmt: skip


def _images(sources: list[Any]) -> Iterator[tuple[Row, Image.Image]]:
    for source in sources:
        for row in source:
            if row.image is not None:
                yield row, row.image


def _room_for(shape: tuple[int, ...]) -> np.ndarray:
    if math.prod(shape) <= MEMORY_LIMIT_BYTES:
        return np.empty(shape, dtype=np.uint8)
    handle, name = tempfile.mkstemp(prefix="unimodal-pictures-")
    os.close(handle)
    room = np.memmap(name, dtype=np.uint8, mode="w+", shape=shape)
    os.unlink(name)
    return room


def _read_data(recipe: TokenizerRecipe, processor: ImageTokenizerImageProcessor) -> _Data:
    aligns = recipe.contrastive_weight > 0
    limit = recipe.num_pictures
    if limit is not None and not recipe.held_out_data:
        limit += recipe.held_out
    pictures, captions = _read(recipe.data, processor, limit, aligns)
    learnt = np.arange(len(pictures))
    if recipe.held_out_data:
        held_out, theirs = _read(
            recipe.held_out_data, processor, recipe.held_out, aligns, split="validation"
        )
    else:
        if len(pictures) <= recipe.held_out:
            raise DataError(
                f"{', '.join(recipe.data)} hold {len(pictures)} pictures, of which "
                f"{recipe.held_out} would be held out; give more, or lower held_out"
            )
        order = np.random.default_rng(recipe.seed).permutation(len(pictures))
        measured, learnt = np.sort(order[: recipe.held_out]), np.sort(order[recipe.held_out :])
        held_out, theirs = pictures[measured], [captions[row] for row in measured if aligns]
    if aligns:
        _check_captions(recipe.data, [captions[row] for row in learnt], least=2)
        _check_captions(recipe.held_out_data or recipe.data, theirs, least=1)
    return _Data(pictures, learnt, held_out, captions, theirs)


def _parameter_groups(parts: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    decays: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    named = [pair for part in parts for pair in part.named_parameters()]
    for name, parameter in named:
        if parameter.requires_grad:
            is_matrix = name.endswith(".weight") and parameter.ndim >= 2
            (decays if is_matrix else others).append(parameter)
    groups = [
        {"params": decays, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    learnt = [group for group in groups if group["params"]]
    return learnt or [{"params": [p for _, p in named]}]  # an optimizer wants at least one


def _perplexity(counts: np.ndarray) -> float:
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(share * np.log(share)).sum()))


def _build(kind: Any, name: str, settings: dict[str, Any]) -> Any:
    """Make a configuration from a recipe's group; unknown names are mistakes, not extras."""
    if kind is ImageTokenizerConfig:
        known = set(ImageTokenizerConfig.__annotations__)
    else:
        known = {"size", "resize_mode", "resample", "pad_colour", "max_pixels"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigurationError(
            f"{name} has no field {unknown[0]!r}; known: {', '.join(sorted(known))}"
        )
    try:
        return kind(**settings)
    except TypeError as error:
        raise ConfigurationError(f"{name} has a value of the wrong type: {error}") from error
