"""Merge: a text LLM + an image tokenizer -> one folder that is still a plain causal LM.

Weights are streamed: every tensor is copied as it is, except the embedding and the output head,
which get rows for the image words. Nothing of the base model is run, and nothing about its text
changes: ids, rows and logits of text stay what they were.
"""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from tokenizer_hf.errors import CheckpointError, ConfigurationError, VocabularyError
from tokenizer_hf.files import atomic_folder, atomic_write
from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
from tokenizer_hf.sentencepiece_vocabulary import extend_sentencepiece, extend_sentencepiece_like
from tokenizer_hf.vocabulary import ImageVocabulary, VocabularyExtension, extend_tokenizer
from unimodal.processing_unimodal import CAPTION_INSTRUCTION, DRAW_INSTRUCTION, UnimodalProcessor
from unimodal.row_ends import fit_row_ends
from unimodal.row_initialisation import ROW_INITS, caption_evidence, new_rows
from unimodal.shipped import require_not_shipped, resolve
from unimodal.weight_shards import NewRows, StoredTensor, read_header, rewrite, shard_files

PLAIN_TEMPLATE = """\
{%- if bos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}
{{- message['role'] | capitalize + ':\\n' + message['content'] }}
{%- if message['role'] == 'assistant' and eos_token %}{{ eos_token }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"""
"""For base models without a chat template of their own."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_UNTRAINED = "The image words are untrained until a recipe of `unimodal train` has taught them."
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth")
_NOT_OF_THE_MODEL = (
    "config.json",  # written anew with the weights
    # what a training run leaves in the folder:
    "adapter_config.json",
    "recipe.yaml",
    "metrics.jsonl",
    "run.json",
    "trainer_state.json",
)
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


def merge(
    llm: str | Path,
    image_tokenizer: str | Path,
    out: str | Path,
    *,
    vocab_mode: str = "added",
    row_init: str = "mean_cov",
    pairs: str | Path | None = None,
    row_ends: int | Literal["auto"] = 0,
    dtype: str | torch.dtype | None = None,
    pad_to: int = 64,
    seed: int = 0,
    caption_instruction: str = CAPTION_INSTRUCTION,
    draw_instruction: str = DRAW_INSTRUCTION,
) -> Path:
    """Write one folder from a decoder-only language model and an image tokenizer.

    Args:
        llm: folder or hub id of a causal LM with safetensors weights and a fast tokenizer.
        image_tokenizer: folder or hub id of an :class:`ImageTokenizer`.
        out: the folder to write; it appears whole or not at all. An older merged folder there is
            replaced, any other folder with files in it is refused.
        vocab_mode: ``"added"`` or ``"base"``, see :func:`extend_tokenizer`.
        row_init: how the new rows start, see :func:`new_rows`.
        pairs: a code cache folder, for ``row_init="meaning"``.
        row_ends: how many end-of-row words stand between two rows of codes; "auto": as many as fit
            the language model's positions, see :func:`unimodal.row_ends.fit_row_ends`.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"`` for all weights; None keeps them.
        pad_to: the embedding's rows are padded to a multiple of this.
        seed: of the new rows.
        caption_instruction: what asks for a caption.
        draw_instruction: what asks for a drawing, with ``{prompt}`` in it.

    Returns:
        ``out``.

    Raises:
        CheckpointError: a folder that is missing, is no causal LM, has no safetensors weights, is
            corrupt, or whose weights and config disagree.
        VocabularyError: a text tokenizer that cannot be extended or does not fit its model.
        ConfigurationError: settings that cannot be right.
        MismatchError: ``pairs`` were encoded by another image tokenizer.
        OSError: the disk is full or ``out`` cannot be written; nothing is left then.
    """
    if row_init not in ROW_INITS:
        raise ConfigurationError(
            f"row_init is {row_init!r}; expected one of {', '.join(ROW_INITS)}"
        )
    if (row_init == "meaning") != (pairs is not None):
        raise ConfigurationError(
            f"row_init {row_init!r} with pairs={pairs}; expected a code cache as pairs exactly "
            'where row_init is "meaning"'
        )
    torch_dtype = _torch_dtype(dtype)
    out = Path(out)
    base = find_folder(llm)
    picture_folder = find_folder(image_tokenizer)
    require_free(out, (base, picture_folder))

    config = _causal_config(base)
    model = ImageTokenizer.from_pretrained(picture_folder).eval()
    if row_ends == "auto":
        row_ends = fit_row_ends(config, model.config)
    extension = VocabularyExtension.from_image_tokenizer(model, row_ends)
    text_tokenizer = _text_tokenizer(base)
    tokenizer, vocabulary = extend_tokenizer(text_tokenizer, extension, vocab_mode)
    vocabulary = _with_rows(vocabulary, config.vocab_size, pad_to)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE

    files = shard_files(base)
    evidence = (
        None
        if pairs is None
        else caption_evidence(pairs, tokenizer, vocabulary, model.config.code_factors())
    )
    changes = {}
    for tensor in _vocabulary_tensors(config, files, vocabulary.rows):
        text = tensor.read()[: vocabulary.start_token_id]
        if text.ndim == 1:  # the bias of an output head
            rows = text.float().mean().expand(vocabulary.rows - len(text))
        else:
            vectors = model.code_vectors()
            rows = new_rows(
                text, vocabulary, row_init, code_vectors=vectors, evidence=evidence, seed=seed
            ).to(text.dtype)
        changes[tensor.name] = NewRows(len(text), rows)

    processor = UnimodalProcessor(
        model.image_processor,
        tokenizer,
        vq_model=model,
        image_vocabulary=vocabulary,
        caption_instruction=caption_instruction,
        draw_instruction=draw_instruction,
    )
    with atomic_folder(out) as folder:
        rewrite(files, folder, changes, torch_dtype)
        _write_config(base, folder, vocabulary, torch_dtype)
        _write_generation_config(base, folder, config)
        processor.save_pretrained(folder)
        _write_sentencepiece(base, folder, text_tokenizer, vocabulary)
        _require_same_ids(folder, text_tokenizer, vocabulary)
        (folder / "README.md").write_text(_card(llm, image_tokenizer, vocabulary), encoding="utf-8")
    return out


def export_vocabulary(
    image_tokenizer: str | Path,
    out: str | Path | None = None,
    text_tokenizer: str | Path | None = None,
    vocab_mode: str = "added",
    row_ends: int = 0,
) -> list[str]:
    """Write the vocabulary extension of an image tokenizer, and a text tokenizer that has it.

    Args:
        image_tokenizer: folder or hub id.
        out: folder to write into; None is the image tokenizer's own.
        text_tokenizer: folder, hub id or SentencePiece ``.model`` to extend into ``out``, with
            ``image_vocabulary.json`` beside it.
        vocab_mode: as in :func:`merge`; a ``.model`` always gets CONTROL pieces.
        row_ends: as in :func:`merge`, a number.

    Returns:
        A line of text for each thing that was written.

    Raises:
        CheckpointError, VocabularyError: as :func:`merge`.
        ConfigurationError: no ``out``, and the image tokenizer comes with this package.
    """
    source = find_folder(image_tokenizer)
    if out is None:
        require_not_shipped(source, "give the folder to write with --out")
    target = source if out is None else Path(out)
    model = ImageTokenizer.from_pretrained(source)
    extension = VocabularyExtension.from_image_tokenizer(model, row_ends)
    written = [
        f"{extension.num_codes + extension.num_controls} new words: {extension.save(target)}"
    ]
    if text_tokenizer is None:
        return written
    if str(text_tokenizer).endswith(".model"):
        vocabulary = extend_sentencepiece(text_tokenizer, extension, target / "tokenizer.model")
    else:
        base = _text_tokenizer(find_folder(text_tokenizer))
        tokenizer, vocabulary = extend_tokenizer(base, extension, vocab_mode)
        tokenizer.save_pretrained(target)
    with atomic_write(target / "image_vocabulary.json") as temporary:
        temporary.write_text(json.dumps(vocabulary.to_dict(), indent=2) + "\n", encoding="utf-8")
    first, last = vocabulary.start_token_id, vocabulary.vocab_size - 1
    return [*written, f"text tokenizer with the image ids {first} to {last}: {target}"]


# --- what comes in --------------------------------------------------------------------------------


def find_folder(name: str | Path) -> Path:
    """The local folder of a model: a path, a hub id that is downloaded (or found in the cache), or
    the name of one that comes with this package ("shipped:text_model").

    No code of the repository is run, and pickled weights are not downloaded.

    Raises:
        CheckpointError: neither a folder nor a hub id that can be had.
    """
    path = Path(resolve(str(name))).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; expected the folder of a model")
    if not _HUB_ID.fullmatch(str(name)):
        raise CheckpointError(
            f"there is no folder {name}; expected a model folder or a hub id such as "
            "Qwen/Qwen3-0.6B"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub's errors have no common base below Exception
        raise CheckpointError(
            f"there is no folder {name}, and the hub does not give it: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        ) from error


def _causal_config(folder: Path) -> Any:
    """The config of a decoder-only text model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json; expected the folder of a language model"
        )
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is no config that transformers knows: {_first_line(error)}"
        ) from error
    architecture = (raw.get("architectures") or ["unknown"])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{folder} is an encoder-decoder ({architecture}); expected a decoder-only causal LM"
        )
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not known or "vocab_size" not in raw or not _is_causal(architecture):
        raise CheckpointError(
            f"{folder} is a {architecture} ({config.model_type}); expected a text-only causal LM "
            "that transformers knows without remote code, such as Qwen3ForCausalLM"
        )
    return config


def _is_causal(architecture: str) -> bool:
    return architecture == "unknown" or architecture.endswith(("ForCausalLM", "LMHeadModel"))


def _text_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a corrupt file
        raise CheckpointError(
            f"the text tokenizer in {folder} cannot be loaded: {_first_line(error)}"
        ) from error


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigurationError(f"dtype {dtype!r}; expected float32, bfloat16 or float16")
    return found


def require_free(out: Path, sources: tuple[Path, ...]) -> None:
    """Refuse to write over a source, or over a folder of something else.

    Raises:
        ConfigurationError: says which.
    """
    resolved = out.resolve()
    for source in sources:
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise ConfigurationError(
                f"out is {out}, which holds the source {source}; give a new folder"
            )
    if out.is_dir() and any(out.iterdir()) and not (out / "processor_config.json").is_file():
        raise ConfigurationError(
            f"out is {out}, which has files in it and is no merged model; give a new folder"
        )
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"out is {out}, which is a file; give a new folder")


def copy_companions(base: Path, out: Path) -> None:
    """Copy what a merged folder holds besides its weights: tokenizer, processor, pictures' side."""
    for file in base.iterdir():
        if file.is_dir() and file.name == "image_tokenizer":
            shutil.copytree(file, out / file.name, dirs_exist_ok=True)
        elif file.is_file() and not file.name.startswith("."):
            weights = any(file.match(pattern) for pattern in _WEIGHTS)
            if not weights and file.name not in _NOT_OF_THE_MODEL:
                shutil.copyfile(file, out / file.name)


def say_trained(folder: Path, how: str) -> None:
    """Put what was done in the place of "untrained" in a folder's model card, if it says so.

    Args:
        folder: copied from a merged one, and trained.
        how: one sentence.
    """
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace(_UNTRAINED, how), encoding="utf-8")


# --- rows -----------------------------------------------------------------------------------------


def _with_rows(vocabulary: ImageVocabulary, base_rows: int, pad_to: int) -> ImageVocabulary:
    """The vocabulary with the rows of the merged embedding: never fewer than the base's."""
    if pad_to < 1:
        raise ConfigurationError(f"pad_to is {pad_to}; expected at least 1")
    if vocabulary.start_token_id > base_rows:
        raise VocabularyError(
            f"the text tokenizer has {vocabulary.start_token_id} ids but the model has {base_rows} "
            "embedding rows; expected a tokenizer that belongs to the model"
        )
    rows = -(-max(vocabulary.vocab_size, base_rows) // pad_to) * pad_to
    return replace(vocabulary, rows=rows)


def _vocabulary_tensors(config: Any, files: list[Path], rows: int) -> list[StoredTensor]:
    """The stored tensors that grow with the vocabulary: embedding, output head and its bias.

    They are found by building the architecture twice without memory, with the old and the new
    vocabulary size, and comparing shapes. Older checkpoints name some tensors differently; such a
    tensor is found by its shape among the names that the architecture does not have.
    """
    before, after = _shapes(config), _shapes(config, rows)
    stored = {name: tensor for file in files for name, tensor in read_header(file).items()}
    prefix = f"{skeleton(config).base_model_prefix}."
    strange = [tensor for name, tensor in stored.items() if name not in before]
    found, missing = [], []
    for name in (name for name in before if before[name] != after[name]):
        if before[name][1:] != after[name][1:]:
            raise CheckpointError(
                f"{name} of shape {before[name]} becomes {after[name]}; expected an architecture "
                "whose vocabulary is the first axis of its embedding and head"
            )
        tensor = stored.get(name) or stored.get(name.removeprefix(prefix))
        if tensor is None:
            alike = [tensor for tensor in strange if tensor.shape == before[name]]
            tensor = alike[0] if len(alike) == 1 else None
        if tensor is None:
            missing.append(name)
        elif tensor.shape != before[name]:
            raise CheckpointError(
                f"{tensor.file} holds {tensor.name} of shape {tensor.shape}, config.json says "
                f"{before[name]}; expected weights and config of one model"
            )
        else:
            found.append(tensor)
    if missing and not (found and getattr(config, "tie_word_embeddings", False)):
        raise CheckpointError(
            f"{files[0].parent} has no tensor {missing[0]}; expected the weights of a "
            f"{config.model_type} causal LM"
        )
    return found


def skeleton(config: Any) -> Any:
    """Build the architecture of a causal LM's config, without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _shapes(config: Any, vocab_size: int | None = None) -> dict[str, tuple[int, ...]]:
    if vocab_size is not None:
        config = copy.deepcopy(config)
        config.vocab_size = vocab_size
    return {name: tuple(value.shape) for name, value in skeleton(config).state_dict().items()}


# --- what goes out --------------------------------------------------------------------------------


def _write_config(
    base: Path, folder: Path, vocabulary: ImageVocabulary, dtype: torch.dtype | None
) -> None:
    """The base's config.json, word for word, but for the number of rows and the dtype."""
    values = json.loads((base / "config.json").read_text(encoding="utf-8"))
    values["vocab_size"] = vocabulary.rows
    if dtype is not None:
        values.pop("torch_dtype", None)
        values["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_generation_config(base: Path, folder: Path, config: Any) -> None:
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    else:
        from transformers import GenerationConfig

        GenerationConfig.from_model_config(config).save_pretrained(folder)


def _write_sentencepiece(
    base: Path, folder: Path, tokenizer: Any, vocabulary: ImageVocabulary
) -> None:
    """A ``tokenizer.model`` beside the ``tokenizer.json`` is kept in step with it, or left out."""
    target = folder / "tokenizer.model"
    target.unlink(missing_ok=True)
    if (base / "tokenizer.model").is_file():
        extend_sentencepiece_like(base / "tokenizer.model", tokenizer, vocabulary, target)


def _require_same_ids(folder: Path, text_tokenizer: Any, vocabulary: ImageVocabulary) -> None:
    """Read the tokenizer back: text must have its old ids, and each image word its own."""
    written = _text_tokenizer(folder)
    probe = 'A red circle, 123 – naïve café?\n\n  {"x": [1, 2]}  日本 🙂 \t<end>'
    strings = vocabulary.strings()
    same_text = written(probe)["input_ids"] == text_tokenizer(probe)["input_ids"]
    same_words = written.convert_tokens_to_ids(strings) == vocabulary.new_token_ids
    if not (same_text and same_words):
        what = "text" if not same_text else "the image words"
        raise VocabularyError(
            f"{type(written).__name__} gives {what} other ids after it is saved and loaded; "
            "expected the same. Use the other vocab_mode"
        )


def _card(llm: str | Path, image_tokenizer: str | Path, vocabulary: ImageVocabulary) -> str:
    """A short model card; training changes one line of it (:func:`say_trained`)."""
    tokens = f"{vocabulary.num_tokens}"
    if vocabulary.nested:
        tokens = f"{vocabulary.min_tokens} to {tokens}"
    rows = ""
    if vocabulary.row_length:
        between = vocabulary.row_end_string * vocabulary.row_ends
        rows = f" in rows of {vocabulary.row_length} with `{between}` between them"
    first, last = vocabulary.code_token_ids.start, vocabulary.code_token_ids.stop - 1
    return f"""---
library_name: transformers
pipeline_tag: any-to-any
tags:
- unimodal
---

# One model that sees and draws

A plain causal language model whose vocabulary also holds the codes of an image tokenizer. Made with
`unimodal merge` from the language model `{Path(llm).name}` and the image tokenizer
`{Path(image_tokenizer).name}`.

- A picture is `{vocabulary.start_string}`, {tokens} codes{rows}, `{vocabulary.end_string}`.
- Ids {first} to {last} are the codes; ids from {vocabulary.vocab_size} to {vocabulary.rows - 1} are
  padding and never sampled by `unimodal`.
- {_UNTRAINED}

```python
from unimodal import Unimodal

model = Unimodal.from_pretrained("path/of/this/folder")
print(model.caption("picture.png"))
model.draw("a red circle")[0].save("drawing.png")
```

`AutoModelForCausalLM` and `AutoTokenizer` load it without any code of ours;
`AutoProcessor.from_pretrained(..., trust_remote_code=True)` encodes and decodes the pictures.
"""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
