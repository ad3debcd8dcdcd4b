"""`UnimodalTrainer`: transformers' Trainer with our loss, our batches and atomic checkpoints."""

import contextlib
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import rotate_checkpoints

from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.files import atomic_write
from training.data.collate import Steps, collate
from training.estimate import Speedometer
from training.factored_head import FactoredHead
from training.factored_rows import folded, load_parts, save_parts
from training.optimizer import make_optimizer
from training.packed_attention import require_packed_attention
from training.precision import bf16_is_faster
from training.recipes import DIRECTIONS, LossRecipe, OptimizerRecipe
from unimodal.messages import IGNORED

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
CHECKPOINT_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
WEIGHT_FILES = (
    "adapter_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
)
RECIPE_FIELDS = {
    "output_dir": "output_dir",
    "bf16": "bf16",
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "optim": "optimizer.name",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "torch_compile": "compile",
    "torch_compile_backend": "compile",
    "torch_compile_mode": "compile",
}
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "max_grad_norm": 1.0,
    "logging_steps": 20,
    "save_steps": 200,
    "save_total_limit": 2,
    "report_to": ["tensorboard"],
    "seed": 0,
}


def training_arguments(output_dir: str, bf16: bool, values: dict[str, Any]) -> TrainingArguments:
    """Make TrainingArguments from a recipe's ``training`` block over our defaults.

    Raises:
        ConfigurationError: no max_steps, an argument that transformers does not know, one that
            the recipe sets elsewhere; more than one device.
    """
    for name, field in RECIPE_FIELDS.items():
        if name in values:
            raise ConfigurationError(f"training.{name} is set by the recipe's field {field}")
    if not isinstance(values.get("max_steps"), int) or values["max_steps"] < 1:
        raise ConfigurationError(
            f"training.max_steps must be a positive integer, got {values.get('max_steps')!r}"
        )
    try:
        args = TrainingArguments(
            output_dir=output_dir,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            **{**DEFAULTS, **values},
        )
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"training: transformers.TrainingArguments: {error}") from error
    if args.n_gpu > 1 or args.world_size > 1:
        raise ConfigurationError(
            f"a run uses one device, found {max(args.n_gpu, args.world_size)}; give it one with "
            "CUDA_VISIBLE_DEVICES=0, and start it without torchrun or accelerate launch"
        )
    return args


def default_attention(name: str) -> str:
    """Resolve attention "auto": eager on a CPU, SDPA elsewhere."""
    return ("sdpa" if torch.cuda.is_available() else "eager") if name == "auto" else name


def default_bf16(wanted: bool | None) -> bool:
    """Resolve bf16 None: where it is faster on this machine."""
    if wanted is not None:
        return wanted
    return bf16_is_faster("cuda" if torch.cuda.is_available() else "cpu")


class UnimodalTrainer(Trainer):
    """Trains a causal LM on `Steps`.

    The loss is the plain next-token loss, the mean over the labelled tokens of an optimizer step,
    computed only at the labelled positions: the head's matrix product leaves the others out.

    Args:
        model: a causal LM, or a PEFT model around one.
        args: of `training_arguments`.
        steps: the batches.
        optimizer: the recipe's optimizer part.
        loss: the recipe's loss part.
        is_row: tells by its name whether a parameter holds rows of the embedding or the head.
        row_ids: ids of the new rows; in mode full, ``rows_first_steps`` trains only these.
        code_ids: ids of the image codes; only needed with ``uncounted``.
        uncounted: bool (V,): codes that stay out of the softmax where a code is to be predicted.
        factored_head: computes the loss in place of the full softmax, with the same value; None:
            the full softmax.
        text_ids: ids over which ``text_kl`` compares with the base.
        row_tokens: pack micro-batches into rows of this length, as `training.data.packing.layout`
            takes it; None: pad them.
        compiled: run the layers through ``torch.compile``; see `compile_layers`.

    Raises:
        ConfigurationError: packing, and the model does not keep packed examples apart.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        steps: Steps,
        *,
        optimizer: OptimizerRecipe,
        loss: LossRecipe | None = None,
        is_row: Callable[[str], bool],
        pad_token_id: int = 0,
        text_ids: Tensor | None = None,
        row_ids: Tensor | None = None,
        code_ids: range = range(0),
        uncounted: Tensor | None = None,
        factored_head: FactoredHead | None = None,
        row_tokens: int | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=steps,
            data_collator=partial(collate, pad_token_id=pad_token_id, row_tokens=row_tokens),
        )
        if row_tokens is not None:
            require_packed_attention(model, row_tokens, args.bf16)
        loss = loss or LossRecipe()
        self.steps = steps
        self.optimizer_recipe, self.is_row = optimizer, is_row
        self.text_kl, self.text_ids = loss.text_kl, text_ids
        self.code_ids, self.uncounted = code_ids, uncounted
        self.factored_head = factored_head
        factors = torch.tensor([loss.weights.get(d, 1.0) for d in DIRECTIONS])
        self._factors = None if bool((factors == 1).all()) else factors
        self._sums = torch.zeros(3, len(DIRECTIONS), dtype=torch.float64)
        self._saving_into: str | None = None
        # Our loss is already the mean over the tokens of the whole optimizer step.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.interrupt = StopOnInterrupt()
        # Before TensorBoard's, which writes for a while: Ctrl-C counts from the very start.
        self.callback_handler.callbacks.insert(0, self.interrupt)
        self.add_callback(LogBeforeSave())
        self.speedometer = Speedometer(
            model,
            args.device.type,
            args.bf16,
            head_rows=None if factored_head is None else len(factored_head.rows),
        )
        self.add_callback(Pace(self.speedometer))
        if compiled:
            compile_layers(model)
        if optimizer.rows_first_steps:
            self.add_callback(RowsFirst(model, is_row, optimizer.rows_first_steps, row_ids))

    # --- batches and optimizer ---

    def get_train_dataloader(self) -> DataLoader:
        """Return the run's micro-batches, in order."""
        loader: DataLoader = DataLoader(
            self.steps,
            batch_size=self.steps.batch_size,
            shuffle=False,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the recipe's optimizer; see `training.optimizer`."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            self.optimizer = make_optimizer(
                trained, self.optimizer_recipe, self.is_row, bf16=self.args.bf16
            )
        return self.optimizer

    # --- loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the summed loss of a micro-batch over the labelled tokens of the whole step."""
        labels = inputs["labels"][:, 1:]
        learnt = labels != IGNORED
        plain = self.accelerator.unwrap_model(model)
        head = self.factored_head
        compact = contextlib.nullcontext() if head is None else head.compact()
        with labelled_positions(plain, learnt), compact:
            outputs = model(**_tokens(inputs), use_cache=False)
        logits = outputs.logits[0].float()
        if head is not None:
            losses = head.losses(logits, labels[learnt])
        else:
            losses = nn.functional.cross_entropy(
                self._counted(logits, labels[learnt]), labels[learnt], reduction="none"
            )
        directions = inputs["directions"][inputs["segments"][:, 1:][learnt]]
        self.speedometer.add(inputs["lengths"], learnt.sum())
        self._count(0, directions, losses)
        if self._factors is not None:
            losses = losses * self._factors.to(losses.device)[directions]
        loss = losses.sum()
        if self.text_kl:
            loss = loss + self.text_kl * self._text_divergence(model, inputs, logits, directions)
        tokens = learnt.sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / tokens
        return (loss, outputs) if return_outputs else loss

    def _counted(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return logits (N, V) without the uncounted codes, where the label is a code."""
        if self.uncounted is None:
            return logits
        is_code = (labels >= self.code_ids.start) & (labels < self.code_ids.stop)
        return logits.masked_fill(is_code[:, None] & self.uncounted.to(logits.device), -torch.inf)

    def _text_divergence(
        self, model: nn.Module, inputs: dict[str, Any], logits: Tensor, directions: Tensor
    ) -> Tensor:
        """Sum KL(base || tuned) over the text vocabulary at the loss positions of texts.

        Args:
            logits: float32 (N, V), of the labelled positions, row by row; with a factored head
                (N, P + F).
            directions: int64 (N,).
        """
        text = DIRECTIONS.index("text")
        is_text = inputs["directions"] == text
        learnt = (inputs["labels"][:, 1:] != IGNORED) & is_text[inputs["segments"][:, 1:]]
        rows = learnt.any(1)
        if not bool(rows.any()):
            return logits.new_zeros(())
        plain: Any = self.accelerator.unwrap_model(model)
        tokens = {name: values[rows] for name, values in _tokens(inputs).items()}
        with torch.no_grad(), plain.disable_adapter(), labelled_positions(plain, learnt[rows]):
            base = model(**tokens, use_cache=False).logits[0].float()
        self.speedometer.add(inputs["lengths"][is_text], learnt.sum(), forward_only=True)
        tuned = logits[directions == text]
        if self.text_ids is not None:
            columns = self.text_ids.to(base.device)
            base = base[:, columns]
            if self.factored_head is not None:
                columns = self.factored_head.columns.to(base.device)[columns]
            tuned = tuned[:, columns]
        base, tuned = base.log_softmax(-1), tuned.log_softmax(-1)
        divergences = (base.exp() * (base - tuned)).sum(-1)
        self._count(2, directions[directions == text], divergences)
        return divergences.sum()

    def _count(self, row: int, directions: Tensor, values: Tensor) -> None:
        n = len(DIRECTIONS)
        self._sums = self._sums.to(values.device)  # a GPU is not waited for until the next log
        values = values.detach().double()
        self._sums[row] += torch.bincount(directions, weights=values, minlength=n)
        if row == 0:
            self._sums[1] += torch.bincount(directions, minlength=n)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss of each direction since the last log."""
        if "loss" in logs:
            sums, tokens, divergence = self._sums.tolist()
            for name, total, count, kl in zip(DIRECTIONS, sums, tokens, divergence, strict=True):
                if count:
                    logs[f"loss_{name}"] = total / count
                    if self.text_kl and name == "text":
                        logs["text_kl"] = kl / count
            self._sums.zero_()
        super().log(logs, start_time)

    # --- checkpoints ---

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_into or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under a temporary name; it gets its own name once it is whole."""
        with self.speedometer.paused():
            self._save_whole_checkpoint(model, trial)

    def _save_whole_checkpoint(self, model: nn.Module, trial: Any) -> None:
        final = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        final.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=final, prefix=".saving-")
        self._saving_into = temporary
        try:
            super()._save_checkpoint(model, trial)
            shutil.rmtree(final / name, ignore_errors=True)
            os.rename(Path(temporary, name), final / name)
        finally:
            self._saving_into = None
            shutil.rmtree(temporary, ignore_errors=True)
        self.write_metrics()
        rotate_checkpoints(
            output_dir=str(final), save_total_limit=self.args.save_total_limit, use_mtime=False
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        model: Any = self.accelerator.unwrap_model(self.model)
        extra = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        with folded(model):
            model.save_pretrained(folder, state_dict=state_dict, **extra)
        if self._saving_into is not None:
            save_parts(model, str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_parts(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)

    def write_metrics(self) -> None:
        """Write everything logged so far to ``metrics.jsonl``, one JSON object a line."""
        with atomic_write(Path(str(self.args.output_dir)) / METRICS) as temporary:
            lines = [json.dumps(entry) + "\n" for entry in self.state.log_history]
            temporary.write_text("".join(lines), encoding="utf-8")


def _tokens(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return what a model takes of a batch: tokens, and positions where there are packed ones."""
    return {name: inputs[name] for name in ("input_ids", "position_ids") if name in inputs}


@contextlib.contextmanager
def labelled_positions(model: Any, learnt: Tensor) -> Iterator[None]:
    """Make the head compute logits only where ``learnt`` is set; they come out as (1, N, V).

    The hidden states are gathered by a hook before the head, so that whatever a model does with its
    logits afterwards (scaling, soft capping) still happens.

    Args:
        model: a causal LM, or a PEFT model around one.
        learnt: bool (B, T - 1): position t predicts the token at t + 1.
    """

    def gather(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][:, :-1][learnt][None], *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def compile_layers(model: Any) -> None:
    """Run each decoder layer through ``torch.compile``, in place; names stay as they are.

    Layers of the same classes share one graph, whatever the lengths of the batches, so that
    compiling takes as long as for one layer. What has no such layers is compiled as a whole. The
    head stays outside: `labelled_positions` hooks it anew for every batch, and whether a graph that
    was traced with one hook sees the next is up to torch's guards. transformers' own
    ``torch_compile`` takes the head in, so `training_arguments` refuses it.

    Args:
        model: a causal LM, or a PEFT model around one.

    Raises:
        ConfigurationError: no C++ compiler, which torch needs on a CPU.
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    if plain.device.type == "cpu":
        # Torch's own search; here, because the import takes two seconds.
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ConfigurationError(
                "compile needs a C++ compiler on a CPU, and none was found (g++, or what CXX "
                "names); install one, or set compile to false"
            ) from error
    # A batch that happens to have as many rows as a head has dimensions is no other kind of batch.
    torch.fx.experimental._config.use_duck_shape = False
    body = getattr(plain, plain.base_model_prefix)
    layers = [m for m in body.modules() if isinstance(m, GradientCheckpointingLayer)]
    for module in layers or [body]:
        module.compile(dynamic=True)


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint with all its parts; half-written ones are passed over."""
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and folder.is_dir():
            found.append((int(number), folder))
    for _, folder in sorted(found, reverse=True):
        missing = [name for name in CHECKPOINT_FILES if not _is_filled(folder / name)]
        if not any(_is_filled(folder / name) for name in WEIGHT_FILES):
            missing.append("weights")
        if not missing:
            return folder
        logger.warning("%s is half written (no %s); not used", folder, ", ".join(missing))
    return None


def _is_filled(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


class LogBeforeSave(TrainerCallback):
    """Logs at every step that saves, so that a resumed run logs the same stretches."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a log where a checkpoint is asked for."""
        if control.should_save:
            control.should_log = True


class Pace(TrainerCallback):
    """Tells a `Speedometer` what happens."""

    def __init__(self, speedometer: Speedometer) -> None:
        self.speedometer = speedometer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count an optimizer step."""
        self.speedometer.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self.speedometer.stop()


class RowsFirst(TrainerCallback):
    """Trains only the new rows during the first steps."""

    def __init__(
        self,
        model: nn.Module,
        is_row: Callable[[str], bool],
        num_steps: int,
        row_ids: Tensor | None,
    ) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.others = [p for name, p in trained if not is_row(name)]
        self.tables = [p for name, p in trained if is_row(name)]
        self.num_steps, self.row_ids = num_steps, row_ids
        self.handles: list[Any] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze everything else in the first steps, and free it afterwards."""
        early = state.global_step < self.num_steps
        for parameter in self.others:
            parameter.requires_grad_(not early)
        if early and self.row_ids is not None and not self.handles:
            self.handles = [table.register_hook(self._only_new_rows) for table in self.tables]
        elif not early and self.handles:
            for handle in self.handles:
                handle.remove()
            self.handles = []

    def _only_new_rows(self, gradient: Tensor) -> Tensor:
        assert self.row_ids is not None
        rows = self.row_ids.to(gradient.device)
        return torch.zeros_like(gradient).index_copy(0, rows, gradient[rows])


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C finishes the step and writes a checkpoint; the second stops at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over SIGINT (only the main thread can)."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        print("\nfinishing this step and saving (Ctrl-C again: stop at once)", flush=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop if Ctrl-C came."""
        if self.stopped:
            control.should_save = control.should_log = control.should_training_stop = True

    def restore(self) -> None:
        """Give SIGINT back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
