"""`unimodal train-text-model`: a small causal LM, to be merged later."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from tokenizer_hf.errors import CheckpointError, ConfigurationError
from training.data.examples import TextExamples
from training.data.mixing import Mix
from training.data.packing import row_tokens
from training.language_model import make_steps, table_names
from training.recipes import TextModelRecipe
from training.runs import close_run, digest, open_run, publishing, run_to_the_end
from training.trainer import UnimodalTrainer, training_arguments
from unimodal.merge import find_folder
from unimodal.shipped import resolve

logger = logging.getLogger(__name__)


def train_text_model(recipe: TextModelRecipe, *, resume: bool = True) -> Path:
    """Run a recipe to its end; ``output_dir`` then is a plain causal LM folder.

    The model is made from ``model_type`` and ``config``, vocabulary size and special ids come from
    the tokenizer; or it goes on from ``start``. Chats are learnt as a whole, user turns too,
    but for the share ``assistant_only``.

    Args:
        resume: as in `training.language_model.train`.

    Raises:
        ConfigurationError: an unknown model type or setting, or ``output_dir`` holds another run.
        CheckpointError: no tokenizer there, or no model to start from.
        DataError: the text files are missing or hold no usable line.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint has been written.
    """
    output_dir = Path(recipe.output_dir)
    folder = tokenizer_folder(recipe)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no text tokenizer at {folder}: {error}") from error
    identity = {
        "tokenizer": digest(sorted(Path(folder).glob("tokenizer.json"))),
        "data": digest([Path(file) for file in recipe.text]),
    }
    if recipe.start is not None:
        identity["start"] = digest(sorted(Path(folder).glob("*.safetensors")))
    finished, recipe = open_run(recipe, identity, resume)
    if finished:
        return output_dir
    set_seed(recipe.training.get("seed", 0))
    model = make_model(recipe, tokenizer, folder)
    examples = TextExamples(tokenizer, recipe.text, recipe.max_length, recipe.assistant_only)
    args = training_arguments(str(output_dir), bool(recipe.bf16), recipe.training)
    mix = Mix(
        examples.num_items,
        examples.mean_loss_tokens(),
        {"text": 1.0},
        examples_per_step=args.gradient_accumulation_steps * args.per_device_train_batch_size,
        seed=args.seed,
    )
    trainer = UnimodalTrainer(
        model,
        args,
        make_steps(examples, mix, args),
        optimizer=recipe.optimizer,
        is_row=table_names(model),
        pad_token_id=tokenizer.pad_token_id or 0,
        row_tokens=row_tokens(recipe.packing, recipe.attention),
        compiled=recipe.compile,
    )
    run_to_the_end(trainer, output_dir)
    with publishing(output_dir) as temporary:
        trainer.save_model(str(temporary))
        tokenizer.save_pretrained(temporary)
    close_run(output_dir, **trainer.speedometer.facts())
    return output_dir


def tokenizer_folder(recipe: TextModelRecipe) -> str:
    """Return the folder that the tokenizer comes from, with ``start`` the weights as well."""
    if recipe.start is not None:
        return str(find_folder(recipe.start))
    return resolve(str(recipe.tokenizer))


def make_model(
    recipe: TextModelRecipe, tokenizer: Any, folder: str, *, weights: bool = True
) -> torch.nn.Module:
    """Make the model: random, or the one to start from.

    Args:
        folder: that of `tokenizer_folder`.
        weights: read those of ``start``; False: random ones, where only the shapes matter.

    Raises:
        CheckpointError: there is no model to start from.
        ConfigurationError: settings that the model's class refuses.
    """
    if recipe.start is not None:
        return _start_model(folder, recipe.attention, weights)
    fixed = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if wrong := sorted(set(recipe.config) & set(fixed)):
        raise ConfigurationError(f"config.{wrong[0]} comes from the tokenizer; leave it out")
    try:
        config = AutoConfig.for_model(recipe.model_type, **recipe.config, **fixed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=recipe.attention)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(
            f"model_type {recipe.model_type!r} with config {recipe.config}: {error}"
        ) from error


def _start_model(folder: str, attention: str, weights: bool) -> torch.nn.Module:
    settings = {"dtype": torch.float32, "attn_implementation": attention}
    try:
        if weights:
            return AutoModelForCausalLM.from_pretrained(folder, **settings)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **settings)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no text model to start from at {folder}: {error}") from error
