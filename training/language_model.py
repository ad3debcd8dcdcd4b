"""`unimodal train`: teach a merged model to draw and to caption, by LoRA, QLoRA or full tuning."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed

from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
from tokenizer_hf.errors import CheckpointError
from training.adapters import add_adapter, fold_lora, is_adapter_row
from training.data.collate import Steps
from training.data.examples import Examples
from training.data.mixing import Mix
from training.data.packing import row_tokens
from training.factored_head import factored_head
from training.factored_rows import share_rows, unseen_combinations
from training.recipes import DataRecipe, LanguageModelRecipe
from training.runs import close_run, digest, open_run, publishing, run_to_the_end
from training.trainer import UnimodalTrainer, training_arguments
from unimodal.merge import copy_companions, find_folder, say_trained
from unimodal.processing_unimodal import UnimodalProcessor

logger = logging.getLogger(__name__)


def train(recipe: LanguageModelRecipe, *, resume: bool = True) -> Path:
    """Run a recipe to its end.

    In ``output_dir`` there are afterwards: the adapter (an ordinary PEFT folder), or in mode full a
    merged model folder; ``recipe.yaml`` with every default resolved; ``run.json``;
    ``metrics.jsonl`` with the losses by direction; checkpoints; TensorBoard logs under ``runs/``.

    Args:
        resume: go on from the last whole checkpoint in ``output_dir``, which gives exactly what an
            uninterrupted run gives. False: start over and remove an earlier run from there.

    Raises:
        ConfigurationError: settings that cannot be right, or ``output_dir`` holds the run of
            another recipe; the message lists the differences.
        CheckpointError, MismatchError, DataError: the model or the data cannot be used.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint has been written.
    """
    folder = find_folder(recipe.model)
    processor = UnimodalProcessor.from_pretrained(folder, load_image_tokenizer=False)
    identity = {
        "model": digest(sorted(folder.glob("*.safetensors"))),
        "data": digest(
            [Path(c) / "cache_manifest.json" for c in recipe.data.caches]
            + [Path(t) for t in recipe.data.text]
        ),
    }
    output_dir = Path(recipe.output_dir)
    finished, recipe = open_run(recipe, identity, resume)
    if finished:
        return output_dir
    set_seed(recipe.training.get("seed", 0))
    examples = Examples.of(processor, recipe.data)
    model = load_model(folder, recipe)
    text_ids, row_ids = _id_groups(processor)
    uncounted = rows = None
    if recipe.mode == "full":
        is_row = table_names(model)
    else:
        norms = recipe.optimizer.norms_learning_rate is not None
        model = add_adapter(model, processor.vocabulary, recipe.lora, norms=norms)
        if recipe.lora.rows == "factored":
            config = ImageTokenizerConfig.from_pretrained(folder / "image_tokenizer")
            factors, code_shares = config.code_factors(), examples.code_shares()
            rows = share_rows(model, factors, code_shares)
            uncounted = torch.zeros(processor.vocabulary.rows, dtype=torch.bool)
            codes = processor.vocabulary.code_token_ids
            uncounted[codes.start : codes.stop] = torch.from_numpy(
                unseen_combinations(factors, code_shares)
            )
            logger.info("%d codes that training never shows do not count", uncounted.sum())
        is_row = is_adapter_row
        if recipe.lora.fold:
            logger.info("folded %d LoRA layers", fold_lora(model))

    args = training_arguments(str(output_dir), bool(recipe.bf16), recipe.training)
    curriculum = recipe.data.curriculum
    mix = Mix(
        examples.num_items,
        examples.mean_loss_tokens(directions_of(recipe.data)),
        recipe.data.weights,
        examples_per_step=args.gradient_accumulation_steps * args.per_device_train_batch_size,
        prompt_dropout=recipe.data.prompt_dropout,
        seed=args.seed,
        starting_weights=curriculum.weights if curriculum else None,
        moving_steps=curriculum.steps if curriculum else 0,
    )
    shares = ", ".join(f"{d} {share:.0%}" for d, share in mix.example_shares.items())
    logger.info("examples by direction: %s", shares)
    trainer = UnimodalTrainer(
        model,
        args,
        make_steps(examples, mix, args),
        optimizer=recipe.optimizer,
        loss=recipe.loss,
        is_row=is_row,
        pad_token_id=processor.tokenizer.pad_token_id or 0,
        text_ids=text_ids,
        row_ids=row_ids if recipe.mode == "full" else None,
        code_ids=processor.vocabulary.code_token_ids,
        uncounted=uncounted,
        factored_head=factored_head(model, rows, uncounted),
        row_tokens=row_tokens(recipe.data.packing, recipe.attention),
        compiled=recipe.compile,
    )
    run_to_the_end(trainer, output_dir)
    with publishing(output_dir) as temporary:
        trainer.save_model(str(temporary))
        if recipe.mode == "full":
            copy_companions(folder, temporary)
            say_trained(temporary, "Trained with `unimodal train` (all weights).")
    facts = trainer.speedometer.facts()
    close_run(output_dir, image_vocabulary=processor.vocabulary.to_dict(), **facts)
    return output_dir


def load_model(folder: Path, recipe: LanguageModelRecipe) -> Any:
    """Load the merged base as a resolved recipe wants it: float format, attention, 4 bits."""
    options: dict[str, Any] = {
        "dtype": getattr(torch, recipe.dtype),
        "attn_implementation": recipe.attention,
    }
    if recipe.mode == "qlora":
        from peft import prepare_model_for_kbit_training
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if recipe.bf16 else torch.float32,
        )
        options["device_map"] = {"": "cuda" if torch.cuda.is_available() else "cpu"}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the model {folder} cannot be loaded: {error}") from error
    if recipe.mode == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def table_names(model: Any) -> Callable[[str], bool]:
    """Return a test, by name, for the parameters of the embedding and the head."""
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    names = {n for n, p in model.named_parameters() if any(p is table for table in tables)}
    return names.__contains__


def directions_of(recipe: DataRecipe) -> set[str]:
    """Return the directions that are trained at some time in a run."""
    early = recipe.curriculum.weights if recipe.curriculum else {}
    return {name for weights in (recipe.weights, early) for name, w in weights.items() if w > 0}


def make_steps(examples: Any, mix: Mix, args: Any) -> Steps:
    """Return the batches of a run."""
    return Steps(
        examples,
        mix,
        args.max_steps,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
    )


def _id_groups(processor: UnimodalProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids of the text vocabulary and the ids that the extension added."""
    vocabulary = processor.vocabulary
    new = torch.tensor(vocabulary.new_token_ids)
    text = torch.ones(vocabulary.vocab_size, dtype=torch.bool)
    text[new] = False
    return torch.nonzero(text).flatten(), new
