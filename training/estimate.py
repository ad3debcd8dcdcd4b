"""What a training costs: operations, memory and time before it starts, its share of the peak after.

Operations are counted as in PaLM's "model FLOPs utilisation" (Chowdhery et al. 2022, appendix B):
what the mathematics of a step needs, forward and backward, a multiplication and an addition being
two; not what an implementation repeats (recomputed activations) or adds (padding). Differences from
it: weights that are not trained have no weight gradient, so a LoRA step costs about two thirds of a
full one; the head counts at labelled positions only, as we compute it nowhere else; the optimizer,
norms and other elementwise work count nothing.

Memory is traced, not modelled: one micro-batch runs forward and backward on fake tensors, which
have shapes and no data, while the bytes of everything alive are added up.
"""

import contextlib
import re
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tokenizer_hf.errors import ConfigurationError
from training.optimizer import make_optimizer
from training.recipes import OptimizerRecipe

PUBLISHED_PEAKS = {
    r"\bH200\b": (989e12, "NVIDIA H200 datasheet, bfloat16 dense"),
    r"\bH100 PCIe\b": (756e12, "NVIDIA H100 datasheet, PCIe, bfloat16 dense"),
    r"\bH100\b": (989e12, "NVIDIA H100 datasheet, SXM, bfloat16 dense"),
    r"\bA100\b": (312e12, "NVIDIA A100 datasheet, bfloat16 dense"),
    r"\bL4\b": (121e12, "NVIDIA L4 datasheet, bfloat16 dense"),
    r"\bRTX 4090\b": (165e12, "NVIDIA Ada architecture paper, RTX 4090, bfloat16 dense"),
}
"""FLOP/s by a pattern of the device's name. The datasheets' figures with sparsity are halved."""

LIKELY_SHARE = 0.3
"""Of the peak, for the estimate of the time. Small models reach less (docs/scale_up.md)."""
ROOM = 0.8
"""Of the memory that is there: beyond it an estimate does not fit. The rest is for the allocator's
fragments and the libraries; resident memory was 9 and 25 % above the estimate (docs/scale_up.md).
"""


@dataclass(frozen=True)
class Peak:
    """The most that matrix products reach on a device: FLOP/s, and where the number is from."""

    flops_per_second: float
    source: str


def device_peak(device: str, bf16: bool) -> Peak:
    """Return the peak of a device in the format that a training uses.

    Args:
        device: "cpu", "cuda", ...
        bf16: whether the products are in bfloat16; else float32.

    Returns:
        the published peak of a GPU that we know, in bfloat16; else what one square product of some
        ten million operations or more reaches here, the best of up to 20. On a busy machine that
        is too little, and the shares of it too large.
    """
    if bf16 and torch.device(device).type == "cuda":
        known = published_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    return _measured_peak(torch.device(device).type, bf16)


def published_peak(name: str) -> Peak | None:
    """Return the published bfloat16 peak of a GPU by its name; None for one that we do not know."""
    for pattern, (flops, source) in PUBLISHED_PEAKS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return Peak(flops, source)
    return None


@lru_cache
def _measured_peak(device: str, bf16: bool) -> Peak:
    side = 8192 if device == "cuda" else 256 if bf16 else 1024  # bfloat16 may be emulated
    name = "bfloat16" if bf16 else "float32"
    left = torch.ones(side, side, dtype=getattr(torch, name), device=device)
    best, began = float("inf"), time.perf_counter()
    for _ in range(20):
        start = time.perf_counter()
        left @ left
        synchronise(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - began > 1:
            break
    return Peak(2 * side**3 / best, f"measured here: a product of {side}x{side} in {name}")


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


# --- operations -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageModelFlops:
    """FLOPs of training a causal LM, by what they grow with.

    Attributes:
        token: of the linear layers, for each token.
        token_pair: of attention, for each pair of tokens of a sequence, masked ones included.
        loss_token: of the head, for each position with a label.
        micro_batch: of folded LoRA (W + BA), for each forward and backward pass.
    """

    token: float
    token_pair: float
    loss_token: float
    micro_batch: float = 0.0

    def of(self, tokens: float, pairs: float, loss_tokens: float, micro_batches: float) -> float:
        """Return the FLOPs of some work.

        Args:
            tokens: without padding.
            pairs: the sum of the squared lengths of the sequences.
            loss_tokens: positions with a label.
            micro_batches: forward and backward passes.
        """
        return (
            self.token * tokens
            + self.token_pair * pairs
            + self.loss_token * loss_tokens
            + self.micro_batch * micro_batches
        )


def count_flops(
    model: Any, head_rows: int | None = None
) -> tuple[LanguageModelFlops, LanguageModelFlops]:
    """Count the operations of a causal LM, or of a PEFT model around one, as it is trained now.

    Args:
        model: what has ``requires_grad`` is trained. No data are needed: it may be of fake or meta
            tensors.
        head_rows: that training computes logits of (`training.factored_head`); None: all.

    Returns:
        training (forward and backward); the forward pass alone with the adapter switched off, as
        ``text_kl`` runs it.
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    in_head = set(head.modules())
    token = base = folded = 0.0
    skipped: set[Any] = set()
    for module in plain.modules():
        if getattr(module, "is_folded", False):  # by `adapters.fold_lora`
            (rank,) = module.r.values()
            size = module.in_features * module.out_features
            token += 6 * size
            base += 2 * size
            folded += 6 * size * rank
            skipped |= set(module.modules())
        elif isinstance(module, nn.Linear) and module not in in_head and module not in skipped:
            size = module.in_features * module.out_features
            trained = module.weight.requires_grad
            token += (6 if trained else 4) * size
            base += 0 if trained and plain is not model else 2 * size
    config = plain.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pair = 4.0 * config.num_hidden_layers * config.num_attention_heads * width
    rows = head.weight.numel()
    some = rows if head_rows is None else head_rows * head.weight.shape[1]
    trained = any(p.requires_grad for part in (head, embedding) for p in part.parameters())
    return (
        LanguageModelFlops(token, 3 * pair, (6 if trained else 4) * some, folded),
        LanguageModelFlops(base, pair, 2 * rows),
    )


class Speedometer:
    """Counts the work and the time of the steps of a training, after its first step.

    Not counted: what comes before the end of the first step (opening files, compiling, filling
    caches), and the time of writing checkpoints. Waiting for data counts.

    Args:
        model: a causal LM, or a PEFT model around one.
        device: where it is trained.
        bf16: whether its products are in bfloat16.
        head_rows: as for `count_flops`.
    """

    def __init__(self, model: Any, device: str, bf16: bool, head_rows: int | None = None) -> None:
        self.training, self.forward = count_flops(model, head_rows)
        self.device, self.bf16 = device, bf16
        self.steps = -1
        self.seconds = 0.0
        self._since: float | None = None
        self._work = torch.zeros(2, 4, dtype=torch.float64)

    def add(self, lengths: Tensor, loss_tokens: Tensor, forward_only: bool = False) -> None:
        """Count a pass.

        Args:
            lengths: int64 (B,), tokens of each sequence without padding.
            loss_tokens: scalar, positions with a label.
        """
        self._work = self._work.to(lengths.device)  # a GPU is not waited for
        one = torch.ones_like(loss_tokens)
        work = torch.stack([lengths.sum(), lengths.square().sum(), loss_tokens, one])
        self._work[int(forward_only)] += work

    def step(self) -> None:
        """Tell that an optimizer step is done."""
        self.steps += 1
        if self.steps == 0:
            self._work.zero_()
            self.resume()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of what runs inside."""
        self.stop()
        yield
        if self.steps >= 0:
            self.resume()

    def resume(self) -> None:
        """Let the clock run."""
        synchronise(self.device)
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock."""
        if self._since is not None:
            synchronise(self.device)
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def facts(self) -> dict[str, Any]:
        """Return what was reached, for ``run.json``; nothing where fewer than two steps ran."""
        if self.steps < 1 or not self.seconds:
            return {}
        training, forward = self._work.tolist()
        work = self.training.of(*training) + self.forward.of(*forward)
        return {
            **reached(work, self.seconds, device_peak(self.device, self.bf16)),
            "tokens_per_second": round(training[0] / self.seconds, 1),
            "timed_steps": self.steps,
        }


def reached(flops: float, seconds: float, peak: Peak) -> dict[str, Any]:
    """Return what ``run.json`` says of a speed: FLOP/s, its share of the peak, the peak."""
    achieved = flops / seconds
    return {
        "achieved_flops_per_second": round(achieved),
        "share_of_peak": round(achieved / peak.flops_per_second, 6),
        "peak_flops_per_second": round(peak.flops_per_second),
        "peak_source": peak.source,
    }


# --- memory ---------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all tensors made while it is on, and remembers the most.

    Attributes:
        peak: bytes, at most, of what was alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _is_tensor(tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Make models inside on the meta device, whatever their size; then `fake` them."""
    with torch.device("meta"):
        yield


def fake(model: nn.Module) -> FakeTensorMode:
    """Turn a model of the meta device into one of fake CPU tensors, in place.

    Returns:
        the mode in which it can be run.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    known: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            both: Any = (module._parameters, module._buffers)
            for tensors in both:
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in known:
                        new: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        if isinstance(tensor, nn.Parameter):
                            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                        known[id(tensor)] = new
                    tensors[name] = known[id(tensor)]
    return mode


def traced_bytes(model: Any, shape: tuple[int, int], loss_tokens: int, bf16: bool) -> int:
    """Trace what one micro-batch needs beside weights, gradients and the optimizer's state.

    Args:
        model: a causal LM, or a PEFT model around one, after `fake`; call it inside that mode.
        shape: (B, T).
        loss_tokens: positions with a label.
        bf16: bfloat16 autocast.

    Returns:
        bytes: the most that are alive at one time, of activations, of the head's logits, and of
        what the backward pass holds in between.
    """
    B, T = shape
    D = model.get_input_embeddings().weight.shape[-1]
    at = torch.zeros(loss_tokens, dtype=torch.int64)

    def gather(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0].reshape(B * T, D)[at][None], *arguments[1:])

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    input_ids = torch.zeros(B, T, dtype=torch.int64)
    live = LiveBytes()
    try:
        with live:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(input_ids=input_ids, use_cache=False).logits[0].float()
                loss = nn.functional.cross_entropy(logits, at, reduction="none").sum()
            loss.backward()
            del logits, loss
    finally:
        handle.remove()
    return live.peak


# --- the estimate of one training -----------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What one training will cost.

    Attributes:
        stage: its name.
        parameters: numbers, by part.
        trained: number of the parameters that are trained.
        steps: optimizer steps.
        examples_per_step, tokens_per_step: over all micro-batches; a token is one of the language
            model, without padding, or one code of a picture.
        data: what is learnt from, in words.
        flops_per_step: forward and backward.
        memory: bytes at the peak, by part.
    """

    stage: str
    parameters: Mapping[str, int]
    trained: int
    steps: int
    examples_per_step: float
    tokens_per_step: float
    data: str
    flops_per_step: float
    memory: Mapping[str, int]

    @property
    def flops(self) -> float:
        """FLOPs of all steps."""
        return self.flops_per_step * self.steps

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    def lines(self, peak: Peak, share: float, memory_bytes: int) -> list[str]:
        """Word it.

        Args:
            peak: of the device that it is for.
            share: of that peak that is likely to be reached.
            memory_bytes: of the device that is there.
        """
        seconds = self.flops / (peak.flops_per_second * share)
        found = [
            self.stage,
            f"  parameters  {_counts(self.parameters)}; {_number(self.trained)} trained",
            f"  data        {self.data}",
            f"  step        {self.examples_per_step:,.0f} examples, {self.tokens_per_step:,.0f} "
            f"tokens, {_number(self.flops_per_step)}FLOP",
            f"  training    {self.steps:,} steps, {self.steps * self.examples_per_step:,.0f} "
            f"examples, {_number(self.flops)}FLOP",
            f"  time        {_time(seconds)} at {share:.0%} of {_number(peak.flops_per_second)}"
            f"FLOP/s",
            f"  memory      {_size(self.peak_bytes)}: "
            + ", ".join(f"{name} {_size(size)}" for name, size in self.memory.items()),
        ]
        if self.peak_bytes > ROOM * memory_bytes:
            found.append(
                f"  WARNING     {_size(self.peak_bytes)} do not fit into {ROOM:.0%} of the "
                f"{_size(memory_bytes)} that are there: halve per_device_train_batch_size and "
                "double gradient_accumulation_steps (batch_size, for an image tokenizer)"
            )
        return found


def wording(
    estimates: Sequence[Estimate], peak: str | None = None, share: float = LIKELY_SHARE
) -> Iterator[str]:
    """Word estimates, line by line.

    Args:
        peak: TFLOP/s of the device that they are for, or a name that `PUBLISHED_PEAKS` knows. None:
            of this machine, in the format that is faster here.
        share: of that peak that is likely to be reached.

    Raises:
        ConfigurationError: another peak.
    """
    found = _given_peak(peak)
    yield f"peak: {_number(found.flops_per_second)}FLOP/s ({found.source})"
    for one in estimates:
        yield ""
        yield from one.lines(found, share, memory_there())


def _given_peak(peak: str | None) -> Peak:
    if peak is None:
        from training.precision import bf16_is_faster

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return device_peak(device, bf16_is_faster(device))
    known = published_peak(peak)
    if known is not None:
        return known
    try:
        flops = float(peak) * 1e12
    except ValueError:
        flops = 0.0
    if not 0 < flops < float("inf"):
        raise ConfigurationError(
            f"peak is {peak!r}; expected TFLOP/s as a number, or H100, H200, A100, L4, RTX 4090"
        )
    return Peak(flops, "given")


def memory_there() -> int:
    """Return bytes: of the GPU where there is one, else the main memory that is free now."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    import psutil

    return psutil.virtual_memory().available


def static_bytes(model: nn.Module, optimizer: OptimizerRecipe, is_row: Any) -> dict[str, int]:
    """Return the bytes that stay for the whole training: weights, gradients, optimizer state.

    AdamW keeps two numbers for each trained one, Muon one.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    groups = make_optimizer(model, optimizer, is_row).param_groups
    kept = [(1 if group["muon"] else 2, p) for group in groups for p in group["params"]]
    return {
        "weights": sum(t.numel() * t.element_size() for t in tensors),
        "gradients": sum(p.numel() * p.element_size() for _, p in kept),
        "optimizer": sum(n * p.numel() * p.element_size() for n, p in kept),
    }


def _estimate(
    stage: str,
    model: Any,
    recipe: Any,
    examples: Any,
    weights: Mapping[str, float],
    packing: bool | int,
    is_row: Any,
    head: Any = None,
) -> Estimate:
    """Estimate the training of a causal LM, inside the mode of its fake tensors; ``head``: its rows
    in short form (`training.factored_rows.CompactRows`), if its loss is computed with them."""
    from training.data.collate import Steps
    from training.data.mixing import Mix
    from training.data.packing import row_tokens
    from training.trainer import DEFAULTS

    values = {**DEFAULTS, **recipe.training}
    batch, parts = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    sampled = min(SAMPLED_STEPS, values["max_steps"])
    with unset_fake_temporarily():
        means = examples.mean_loss_tokens([name for name, w in weights.items() if w > 0])
        mix = Mix(examples.num_items, means, weights, batch * parts, seed=values["seed"])
        steps = Steps(examples, mix, sampled, batch, parts)
        size = row_tokens(packing, recipe.attention)
        batches = [_Batch.of(steps.batch(number), size) for number in range(sampled * parts)]
    training, forward = count_flops(model, None if head is None else len(head))
    if head is not None:
        head.on = True
    flops = sum(training.of(b.tokens, b.pairs, b.loss_tokens, 1) for b in batches)
    if hasattr(recipe, "loss") and recipe.loss.text_kl:
        flops += sum(forward.of(*b.text, 0) for b in batches)
    memory = static_bytes(model, recipe.optimizer, is_row)
    if getattr(recipe, "mode", "") == "qlora":
        held = [m.weight for n, m in model.named_modules() if n.endswith(".base_layer")]
        held = [w for w in held if w is not model.get_input_embeddings().weight]
        memory["weights"] -= sum(round(w.numel() * (w.element_size() - 0.5 - 1 / 64)) for w in held)
    largest = max(batches, key=lambda b: b.shape[0] * b.shape[1])
    whole = traced_bytes(model, largest.shape, largest.loss_tokens, bool(recipe.bf16))
    memory["activations"] = traced_bytes(model, largest.shape, 1, bool(recipe.bf16))
    memory["logits"] = max(whole - memory["activations"], 0)
    items = ", ".join(f"{n:,} of {name}" for name, n in examples.num_items.items() if n)
    return Estimate(
        stage=stage,
        parameters=_parts(model),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        steps=values["max_steps"],
        examples_per_step=sum(b.examples for b in batches) / sampled,
        tokens_per_step=sum(b.tokens for b in batches) / sampled,
        data=f"examples: {items}",
        flops_per_step=flops / sampled,
        memory=memory,
    )


@dataclass(frozen=True)
class _Batch:
    """Sums over a micro-batch; ``text``: tokens, pairs and loss tokens of its text examples.

    ``shape`` is (rows, tokens of a row), padding included.
    """

    shape: tuple[int, int]
    examples: int
    tokens: int
    pairs: int
    loss_tokens: int
    text: tuple[int, int, int]

    @classmethod
    def of(cls, examples: Sequence[Any], row_tokens: int | None) -> "_Batch":
        from training.data.packing import layout
        from unimodal.messages import IGNORED

        def sums(chosen: Sequence[Any]) -> tuple[int, int, int]:
            lengths = [len(e.input_ids) for e in chosen]
            labelled = sum(int((e.labels[1:] != IGNORED).sum()) for e in chosen)
            return sum(lengths), sum(n * n for n in lengths), labelled

        lengths = [len(e.input_ids) for e in examples]
        rows = layout(lengths, row_tokens)
        shape = len(rows), max(sum(lengths[number] for number in row) for row in rows)
        text = sums([e for e in examples if e.direction == "text"])
        return cls(shape, len(examples), *sums(examples), text)


def _parts(model: Any) -> dict[str, int]:
    """Numbers of parameters: rows of the embedding (and of an untied head), layers, adapter."""
    parts = {"embedding": 0, "head": 0, "layers": 0, "adapter": 0}
    tables = {id(p) for p in model.get_input_embeddings().parameters()}
    heads = {id(p) for p in model.get_output_embeddings().parameters()}
    adapted = hasattr(model, "peft_config")
    for parameter in model.parameters():
        name = "embedding" if id(parameter) in tables else "layers"
        name = "head" if id(parameter) in heads - tables else name
        parts["adapter" if adapted and parameter.requires_grad else name] += parameter.numel()
    return {name: count for name, count in parts.items() if count}


def image_tokenizer_estimate(recipe: Any, num_pictures: int) -> Estimate:
    """Estimate the training of an image tokenizer.

    The caption encoder of a contrastive term (at most 4.3 M weights) is not counted.

    Args:
        recipe: a `training.image_tokenizer.TokenizerRecipe`.
        num_pictures: that it learns from.
    """
    from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
    from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer

    config = ImageTokenizerConfig(**recipe.tokenizer)
    B, size = recipe.batch_size, config.image_size
    bf16 = recipe.precision == "bfloat16"
    with FakeTensorMode():
        model = ImageTokenizer(config)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        pixel_values = torch.zeros(B, config.num_channels, size, size)
        vectors = torch.zeros(B, config.num_tokens, config.codebook_dim, requires_grad=True)
        live = LiveBytes()
        with FlopCounterMode(display=False) as counter, live:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                latents = model._latents(pixel_values).float()
                painted = model._pixels(vectors).float()
            loss = latents.sum() + (painted - pixel_values).square().mean()
            loss.backward()
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    sizes = {"product": config.product_sizes, "vq": [config.codebook_size]}
    dims = {"product": config.product_dims, "vq": [config.codebook_dim]}
    kind = config.quantizer_type
    pairs = zip(sizes.get(kind, []), dims.get(kind, []), strict=True)
    search = sum(2.0 * K * D for K, D in pairs) * B * config.num_tokens
    gradients = sum(p.numel() * 4 for p in trained)
    parts = {name: _size_of(part) for name, part in model.named_children()}
    return Estimate(
        stage="image_tokenizer",
        parameters={name: count for name, count in parts.items() if count},
        trained=sum(p.numel() for p in trained),
        steps=recipe.max_steps,
        examples_per_step=B,
        tokens_per_step=B * config.num_tokens,
        data=f"{num_pictures:,} pictures, {_size(num_pictures * config.num_channels * size**2)}",
        flops_per_step=counter.get_total_flops() + search,
        memory={
            "weights": 2 * weights,  # the trained ones and their running mean
            "gradients": gradients,
            "optimizer": 2 * gradients,
            "activations": live.peak,
        },
    )


def _size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- recipes --------------------------------------------------------------------------------------

SAMPLED_STEPS = 4
"""Steps whose real batches are looked at."""


def estimate_recipe(path: str | Path, overrides: Sequence[str] = ()) -> list[Estimate]:
    """Estimate every training of a recipe.

    Args:
        path: a recipe of `unimodal train`, `train-text-model`, `train-tokenizer` or `demo` (or the
            name of one of the package's demos). Of a demo, a miniature is made first, for the
            lengths of its texts.
        overrides: "a.b=value", see `training.recipes.load_recipe`.

    Raises:
        ConfigurationError, CheckpointError, DataError: the recipe, its model or its data cannot be
            used.
    """
    from training.demo import DemoRecipe, demo_recipe_file, dry_run
    from training.image_tokenizer import TokenizerRecipe
    from training.recipes import (
        LanguageModelRecipe,
        TextModelRecipe,
        build_recipe,
        load_content,
        load_recipe,
    )

    file = demo_recipe_file(path)
    content = load_content(file, overrides)
    if "model" in content:
        return [language_model_estimate(load_recipe(LanguageModelRecipe, file, overrides))]
    if isinstance(content.get("data"), list):
        recipe = build_recipe(TokenizerRecipe, content)
        return [image_tokenizer_estimate(recipe, recipe.count_pictures())]
    if "config" in content or "start" in content:
        return [text_model_estimate(build_recipe(TextModelRecipe, content))]
    return dry_run(build_recipe(DemoRecipe, content), stop_after="merge")


def text_model_estimate(recipe: Any) -> Estimate:
    """Estimate a `training.recipes.TextModelRecipe`; what it starts from must be there."""
    from transformers import AutoTokenizer

    from training.data.examples import TextExamples
    from training.language_model import table_names
    from training.runs import resolved
    from training.text_model import make_model, tokenizer_folder

    recipe = resolved(recipe)
    folder = tokenizer_folder(recipe)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = TextExamples(tokenizer, recipe.text, recipe.max_length, recipe.assistant_only)
    with without_data():
        model = make_model(recipe, tokenizer, folder, weights=False)
    with fake(model):
        is_row, weights = table_names(model), {"text": 1.0}
        return _estimate("text_model", model, recipe, examples, weights, recipe.packing, is_row)


def language_model_estimate(recipe: Any) -> Estimate:
    """Estimate a `training.recipes.LanguageModelRecipe`, of any mode; its merged model and its code
    caches must be there.

    With qlora, a weight of a linear layer takes 4 bits, and a byte in 64 for its block's scale.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
    from training.adapters import add_adapter, fold_lora, is_adapter_row
    from training.data.examples import Examples
    from training.factored_rows import share_rows
    from training.language_model import table_names
    from training.runs import resolved
    from unimodal.merge import find_folder
    from unimodal.processing_unimodal import UnimodalProcessor

    recipe = resolved(recipe)
    folder = find_folder(recipe.model)
    processor = UnimodalProcessor.from_pretrained(folder, load_image_tokenizer=False)
    data = recipe.data
    examples = Examples.of(processor, data)
    with without_data():
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder),
            dtype=getattr(torch, recipe.dtype),
            attn_implementation=recipe.attention,
        )
        if recipe.mode != "full":
            norms = recipe.optimizer.norms_learning_rate is not None
            model = add_adapter(model, processor.vocabulary, recipe.lora, norms=norms)
    head = None
    with fake(model):
        if recipe.mode != "full" and recipe.lora.rows == "factored":
            config = ImageTokenizerConfig.from_pretrained(folder / "image_tokenizer")
            head = share_rows(model, config.code_factors(), examples.code_shares())
        if recipe.mode == "lora" and recipe.lora.fold:
            fold_lora(model)
        is_row = table_names(model) if recipe.mode == "full" else is_adapter_row
        return _estimate("lora", model, recipe, examples, data.weights, data.packing, is_row, head)


# --- numbers in words -----------------------------------------------------------------------------


def _number(value: float) -> str:
    """1.2e9 as "1.2 G"."""
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g} "


def _size(value: float) -> str:
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{value / 1024**power:.3g} {name}"
    return f"{value:.0f} bytes"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _counts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_number(count).strip()}" for name, count in parts.items())
