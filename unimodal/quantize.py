"""Quantized copies of a model folder, in compressed-tensors' format: vLLM and transformers read it.

``W8A8``: int8 weights, one scale for each output, and int8 activations, one scale for each token,
taken while the model runs. ``W4A16``: int4 weights, one scale for each group of inputs. Weights are
rounded to the nearest step, so no data are needed. Embedding and head stay as they are: the logits
of image codes lie close together.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizer_hf.errors import CheckpointError, ConfigurationError
from tokenizer_hf.files import atomic_folder
from unimodal.merge import copy_companions, find_folder, require_free, skeleton
from unimodal.weight_shards import INDEX_FILE, SINGLE_FILE, StoredTensor, read_header, shard_files

FORMATS = {"W8A8": "int-quantized", "W4A16": "pack-quantized"}
GROUP_SIZES = (128, 64, 32)
ALIGNMENT = 32
"""vLLM's CPU kernels want the in- and outputs of a W4A16 layer to be multiples of this."""


def quantize(
    model: str | Path, out: str | Path, scheme: str, *, group_size: int | None = None
) -> Path:
    """Write a quantized copy of a merged model; one weight file is in memory at a time.

    Args:
        model: a merged folder or hub id, not quantized.
        out: the folder to write; it appears whole or not at all.
        scheme: "W8A8" or "W4A16".
        group_size: of W4A16, inputs that share a scale; None takes the largest of 128, 64 and 32
            that divides the inputs of every layer.

    Returns:
        ``out``.

    Raises:
        ConfigurationError: another scheme, sizes that do not fit it, or no compressed-tensors.
        CheckpointError: no merged model, or one that is quantized, or has weights that are neither
            linear layers nor embeddings (experts, for example).
    """
    _require_library()
    if scheme not in FORMATS:
        raise ConfigurationError(f"scheme {scheme!r}; expected one of {', '.join(FORMATS)}")
    if group_size is not None and scheme != "W4A16":
        raise ConfigurationError(f"a group size came with {scheme}; only W4A16 has groups")
    base, out = find_folder(model), Path(out)
    require_free(out, (base,))
    if not (base / "processor_config.json").is_file():
        raise CheckpointError(
            f"{base} has no processor_config.json; expected a merged model. Merge first, and fold "
            "an adapter in with `unimodal merge-adapter`"
        )
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise CheckpointError(f"{base} is quantized already; give the model that it was made from")
    files = shard_files(base)
    linear, heads = _linear_layers(base, files)
    if scheme == "W4A16":
        group_size = _group_size(linear, group_size)
    settings = _settings(scheme, group_size, heads)
    with atomic_folder(out) as folder:
        _write_weights(files, folder, set(linear), settings)
        copy_companions(base, folder)
        config["quantization_config"] = settings.model_dump(mode="json")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_card(base, folder, scheme, group_size)
    return out


def _require_library() -> None:
    from importlib.util import find_spec

    if find_spec("compressed_tensors") is None:
        raise ConfigurationError(
            "compressed-tensors is not installed; it comes with vLLM, or by `pip install "
            "compressed-tensors==0.17.0`"
        )


def _linear_layers(base: Path, files: list[Path]) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return the stored weights of the linear layers but the head, and the head's names."""
    from transformers import AutoConfig

    model = skeleton(AutoConfig.from_pretrained(base))
    prefix = f"{model.base_model_prefix}."
    head = model.get_output_embeddings()
    tables = {model.get_input_embeddings(), head}
    head_name = next(name for name, module in model.named_modules() if module is head)
    kinds: dict[str, bool] = {}  # is it a linear layer's, by each name that a checkpoint may use
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            for weight in (f"{name}.weight", f"{name}.weight".removeprefix(prefix)):
                kinds[weight] = isinstance(module, nn.Linear) and module not in tables
    stored = {name: tensor for file in files for name, tensor in read_header(file).items()}
    others = {name: t.shape for name, t in stored.items() if len(t.shape) > 1 and name not in kinds}
    # Older checkpoints have another name for the head.
    heads = [name for name, shape in others.items() if shape == tuple(head.weight.shape)]
    strange = [name for name in others if name not in heads]
    linear = {name: tensor for name, tensor in stored.items() if kinds.get(name)}
    if strange or not linear:
        what = f"{len(strange)} weights such as {strange[0]}" if strange else "no linear layer"
        raise CheckpointError(
            f"{base} has {what}; expected linear layers and embeddings only (no mixture of experts)"
        )
    return linear, [head_name, *(name.removesuffix(".weight") for name in heads)]


def _group_size(linear: dict[str, StoredTensor], wanted: int | None) -> int:
    for name, tensor in linear.items():
        if any(size % ALIGNMENT for size in tensor.shape):
            raise ConfigurationError(
                f"{name} is {' × '.join(map(str, tensor.shape))}; W4A16 expects multiples of "
                f"{ALIGNMENT} (vLLM's kernels). Use W8A8"
            )
    inputs = {tensor.shape[1] for tensor in linear.values()}
    fitting = [size for size in GROUP_SIZES if not any(count % size for count in inputs)]
    if wanted is None:
        return fitting[0]  # 32 always fits
    if wanted not in fitting:
        raise ConfigurationError(
            f"group size {wanted} with layers of {', '.join(map(str, sorted(inputs)))} inputs; "
            f"expected one of {', '.join(map(str, fitting))}"
        )
    return wanted


def _settings(scheme: str, group_size: int | None, heads: list[str]) -> Any:
    """Return compressed-tensors' ``QuantizationConfig``."""
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        preset_name_to_scheme,
    )

    layers = preset_name_to_scheme(scheme, ["Linear"])
    layers.format = FORMATS[scheme]
    if group_size is not None:
        layers.weights.group_size = group_size
    return QuantizationConfig(
        config_groups={"group_0": layers},
        format=FORMATS[scheme],
        ignore=heads,
        quantization_status=QuantizationStatus.COMPRESSED,
    )


def _write_weights(files: list[Path], folder: Path, linear: set[str], settings: Any) -> None:
    """Write the shards under their old names, and an index if there are several."""
    scheme = settings.config_groups["group_0"]
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        target = SINGLE_FILE if len(files) == 1 else file.name
        tensors: dict[str, Tensor] = {}
        for name, stored in read_header(file).items():
            values = stored.read()
            if name in linear:
                parts = quantized_linear(values, scheme)
                module = name.removesuffix("weight")
                tensors |= {f"{module}{part}": value for part, value in parts.items()}
            else:
                tensors[name] = values
        save_file(tensors, folder / target, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, target)
        total += sum(value.numel() * value.element_size() for value in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def quantized_linear(weight: Tensor, scheme: Any) -> dict[str, Tensor]:
    """Return what stands for a linear layer's weight, by name within the layer.

    Args:
        weight: float, (outputs, inputs).
        scheme: compressed-tensors' ``QuantizationScheme``.

    Returns:
        W8A8: ``weight`` int8, ``weight_scale`` (outputs, 1). W4A16: ``weight_packed`` int32,
        ``weight_scale`` (outputs, groups), ``weight_shape``.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    size = scheme.weights.group_size or weight.shape[1]
    grouped = weight.float().reshape(weight.shape[0], -1, size)
    scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype)}
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return {name: value.contiguous() for name, value in compressor.compress(state, scheme).items()}


def _write_card(base: Path, folder: Path, scheme: str, group_size: int | None) -> None:
    """Say in the model card what was done; scores above are those of the model before."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    groups = f", {group_size} inputs a group" if group_size else ""
    text += (
        f"\n## Quantized\n\n`unimodal quantize` made this folder of `{base.name}`: {scheme}{groups}"
        ", rounded to nearest, in compressed-tensors' format. Embedding and head are as they were. "
        "Numbers above this section are those of the model before.\n"
    )
    card.write_text(text, encoding="utf-8")
