"""Adapters: LoRA on the linear layers plus the new rows, and folding them into a plain folder."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tokenizer_hf.errors import CheckpointError, ConfigurationError, MismatchError
from tokenizer_hf.files import atomic_folder
from tokenizer_hf.vocabulary import ImageVocabulary
from training.factored_rows import FACTOR_ROWS
from training.recipes import LoraRecipe
from training.runs import RUN_FILE, digest
from unimodal.merge import copy_companions, find_folder, say_trained

logger = logging.getLogger(__name__)


def add_adapter(
    model: Any, vocabulary: ImageVocabulary, recipe: LoraRecipe, *, norms: bool = False
) -> PeftModel:
    """Put a LoRA on the linear layers and, unless ``recipe.rows`` is "none", train the image rows.

    The rows of an untied model are trained in both the embedding and the head; in a tied one the
    head follows the embedding. Text rows are never trained.

    Args:
        model: a merged causal LM.
        norms: train the weights of all norms too; the adapter then holds them whole.

    Raises:
        ConfigurationError: ``target_modules`` names no layer of this model.
    """
    ids = vocabulary.new_token_ids
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows: Any = ids
    if head is not None and head.weight is not embedding.weight:
        rows = {_leaf_name(model, embedding): ids, _leaf_name(model, head): ids}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha or recipe.rank,  # type: ignore[arg-type]
        lora_dropout=recipe.dropout,
        target_modules=recipe.target_modules,
        trainable_token_indices=None if recipe.rows == "none" else rows,
        modules_to_save=_norm_names(model) if norms else None,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigurationError(f"lora.target_modules: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in adapted.modules():
        if norms and isinstance(module, ModulesToSaveWrapper):
            module.register_forward_hook(_in_the_format_of_the_input)
    return adapted


def _in_the_format_of_the_input(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A trained norm has float32 weights, and its output would be so in a bfloat16 model."""
    return output.to(inputs[0].dtype)


def is_adapter_row(name: str) -> bool:
    """Tell by its name whether an adapter's parameter holds image rows."""
    return "trainable_tokens_delta" in name or name.endswith(FACTOR_ROWS)


def fold_lora(model: PeftModel) -> int:
    """Make every LoRA layer compute with W + scale · B·A, one product for all tokens of a step.

    The function, its gradients and the saved adapter stay what they were; a switched-off adapter
    stays switched off. Layers whose base is quantised or not float32 are left alone.

    Returns:
        the number of layers that were changed.
    """
    changed = 0
    for module in model.modules():
        if not isinstance(module, LoraLinear):
            continue
        base = module.get_base_layer()
        if type(base) is nn.Linear and base.weight.dtype == torch.float32:
            module.__class__ = FoldedLoraLinear
            changed += 1
    return changed


class FoldedLoraLinear(LoraLinear):
    """A LoRA layer that computes in one product.

    A class of its own and no function on each layer: `torch.compile` shares a graph among layers of
    the same classes.
    """

    is_folded = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1 or kwargs:
            return super().forward(x, *args, **kwargs)
        [name] = self.active_adapters
        base: Any = self.get_base_layer()
        lora_a: Any = self.lora_A[name]
        lora_b: Any = self.lora_B[name]
        with torch.autocast(x.device.type, enabled=False):  # the sum keeps float32's precision
            update = lora_b.weight @ lora_a.weight
            weight = torch.add(base.weight, update, alpha=self.scaling[name])
        return nn.functional.linear(x, weight, base.bias)


@dataclass(frozen=True)
class MergedAdapter:
    """What `merge_adapter` wrote and measured.

    Attributes:
        folder: the plain model folder.
        max_logit_difference: the largest absolute difference from the adapter's logits, float32.
        max_logit: the largest absolute logit, to judge it by.
    """

    folder: Path
    max_logit_difference: float
    max_logit: float


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str = "auto",
    num_sequences: int = 4,
) -> MergedAdapter:
    """Fold an adapter's LoRA and rows into a plain model folder, and check the result.

    The sum is made in float32. The folder is written under a temporary name, loaded again and
    compared with the adapter on random sequences; it gets its name only if all of this holds: the
    logits agree, text rows are bit for bit the base's, a tied head is still tied.

    Args:
        adapter: folder that `unimodal train` wrote in mode lora or qlora.
        out: the new folder; an existing one is replaced.
        base: the merged base, if it is not where the adapter says.
        dtype: of the saved weights: "auto" (the base's), "float32" or "bfloat16". The check on the
            logits (1e-4, relative to logits above 1) is only enforced in float32; bfloat16 rounds
            the weights, and the difference is returned.

    Raises:
        CheckpointError: no adapter there, its base is missing, or the check failed.
        MismatchError: the base is another model than the adapter was trained on.
    """
    adapter, out = Path(adapter), Path(out)
    base_folder = _base_folder(adapter, base)
    vocabulary = _vocabulary(base_folder)
    _require_same_vocabulary(adapter, base_folder, vocabulary)
    saved_dtype = _saved_dtype(base_folder, dtype)
    if out.resolve() in (adapter.resolve(), base_folder.resolve()):
        raise ConfigurationError(f"--out {out} is the adapter or its base; give another folder")

    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    tied = bool(plain.config.tie_word_embeddings)
    text_rows = _text_rows(plain, vocabulary)
    try:
        model: Any = PeftModel.from_pretrained(plain, str(adapter)).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise MismatchError(
            f"the adapter {adapter} does not fit the base {base_folder}: {str(error)[:300]}; give "
            "the base that it was trained on with --base"
        ) from error
    sequences = torch.randint(
        0, vocabulary.vocab_size, (num_sequences, 32), generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        expected = model(input_ids=sequences).logits
    merged = model.merge_and_unload(safe_merge=True).to(saved_dtype)
    with atomic_folder(out) as temporary:
        merged.save_pretrained(temporary)
        del model, merged
        copy_companions(base_folder, temporary)
        say_trained(
            temporary, "Trained with `unimodal train` (an adapter, folded into the weights)."
        )
        again = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32).eval()
        with torch.inference_mode():
            difference = float((again(input_ids=sequences).logits - expected).abs().max())
        largest = float(expected.abs().max())
        _require(
            saved_dtype != torch.float32 or difference <= 1e-4 * max(1.0, largest),
            f"its logits differ from the adapter's by {difference:.2e}",
        )
        _require(
            bool(again.config.tie_word_embeddings) == tied,
            f"tie_word_embeddings became {not tied}",
        )
        for before, after in zip(text_rows, _text_rows(again, vocabulary), strict=True):
            _require(
                torch.equal(before.to(saved_dtype), after.to(saved_dtype)), "text rows changed"
            )
    return MergedAdapter(out, difference, largest)


def _base_folder(adapter: Path, base: str | Path | None) -> Path:
    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{adapter} is no adapter (it has no adapter_config.json); give the output_dir of a "
            "finished `unimodal train` in mode lora or qlora"
        )
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{adapter}/adapter_config.json cannot be read: {error}") from error
    name = base or config.base_model_name_or_path
    if not name:
        raise CheckpointError(f"{adapter} does not say what its base is; give it with --base")
    try:
        return find_folder(name)
    except CheckpointError as error:
        if base is not None:
            raise
        raise CheckpointError(
            f"the base of {adapter} is missing: {name}; give where it is now with --base"
        ) from error


def _vocabulary(folder: Path) -> ImageVocabulary:
    try:
        config = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        return ImageVocabulary.from_dict(config["image_vocabulary"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the base {folder} is not a merged model (processor_config.json: {error}); give the "
            "folder that `unimodal merge` wrote"
        ) from error


def _require_same_vocabulary(adapter: Path, base: Path, vocabulary: ImageVocabulary) -> None:
    """Compare with what the training run wrote down; an adapter of elsewhere has no such file."""
    file = adapter / RUN_FILE
    if file.is_file():
        run = json.loads(file.read_text(encoding="utf-8"))
        weights = digest(sorted(base.glob("*.safetensors")))
        if run.get("identity", {}).get("model", weights) != weights:
            logger.warning(
                "the weights of %s are not those that the adapter was trained on (another dtype or "
                "other shards are fine; another model is not)",
                base,
            )
        trained = run.get("image_vocabulary")
        if trained is not None and ImageVocabulary.from_dict(trained) != vocabulary:
            raise MismatchError(
                f"the adapter {adapter} was trained with the image tokenizer "
                f"{trained.get('fingerprint', '?')[:16]}, but the base {base} holds "
                f"{vocabulary.fingerprint[:16]} or other ids; give the right base with --base"
            )


def _saved_dtype(base: Path, dtype: str) -> torch.dtype:
    if dtype == "auto":
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ConfigurationError(f"dtype must be one of auto, {', '.join(known)}; got {dtype!r}")
    return known[dtype]


def _text_rows(model: Any, vocabulary: ImageVocabulary) -> list[Tensor]:
    """Copy the rows of all ids that the extension did not add, of embedding and head."""
    keep = torch.ones(model.get_input_embeddings().weight.shape[0], dtype=torch.bool)
    keep[vocabulary.new_token_ids] = False
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module.weight.detach()[keep].clone() for module in modules]


def _norm_names(model: nn.Module) -> list[str]:
    """Return the last parts of the names of all modules whose parameters are vectors alone."""
    return sorted(
        {
            name.split(".")[-1]
            for name, module in model.named_modules()
            if (own := list(module.parameters())) and all(p.ndim == 1 for p in own)
        }
    )


def _leaf_name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted).split(".")[-1]


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckpointError(
            f"the merged model is not the adapter's: {problem}; nothing was written"
        )
