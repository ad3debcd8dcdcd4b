"""The image tokenizer: pictures <-> codes, as a Hugging Face model."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput

from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
from tokenizer_hf.decoders.conv import ConvDecoder, PatchDecoder
from tokenizer_hf.decoders.palette import PaletteDecoder
from tokenizer_hf.decoders.vit import VitDecoder
from tokenizer_hf.encoders.blocks import ZeroConv2d, ZeroLinear, cut_into_patches
from tokenizer_hf.encoders.conv import ConvEncoder, PatchEncoder
from tokenizer_hf.encoders.palette import PaletteEncoder
from tokenizer_hf.encoders.vit import VitEncoder
from tokenizer_hf.errors import CheckpointError, CodeError, ConfigurationError, UnimodalError
from tokenizer_hf.image_processing_image_tokenizer import ImageTokenizerImageProcessor
from tokenizer_hf.quantizers.fsq import FiniteScalarQuantizer
from tokenizer_hf.quantizers.product import ProductQuantizer
from tokenizer_hf.quantizers.vq import VectorQuantizer
from tokenizer_hf.vocabulary import VocabularyExtension

_TRAINING_ONLY_FIELDS = ("codebook_update", "ema_decay", "commitment_cost", "revive_after")
_TRAINING_ONLY_TENSORS = ("cluster_size", "steps_unused")


@dataclass
class ImageTokenizerOutput(ModelOutput):
    """What a forward pass returns."""

    loss: Tensor | None = None
    """Scalar: the sum of ``losses``."""
    losses: dict[str, Tensor] | None = None
    """Scalars by name: ``l1``, ``l2`` (reconstruction) and, in training, those of the quantizer."""
    reconstruction: Tensor | None = None
    """(B, 3, H, W), about [-1, 1], not clamped."""
    codes: Tensor | None = None
    """(B, L) int64."""
    code_vectors: Tensor | None = None
    """(B, L, codebook_dim) float32, of the codes; gradients pass straight to the encoder."""


class ImageTokenizer(PreTrainedModel):
    """Pictures (B, 3, H, W) in [-1, 1] <-> codes (B, L) int64 in [0, codebook_size).

    ``image_processor`` turns files into ``pixel_values``; it is saved and loaded with the model.

    Args:
        config: see :class:`ImageTokenizerConfig`.
    """

    config_class = ImageTokenizerConfig
    config: ImageTokenizerConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = "image"
    _keep_in_fp32_modules_strict = ["quantizer"]  # noqa: RUF012

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__(config)
        self.encoder = _make_encoder(config)
        self.quantizer = _make_quantizer(config)
        self.decoder = _make_decoder(config)
        self.pre_quant: Any = nn.Identity()
        self.post_quant: Any = nn.Identity()
        if config.encoder_type != "palette":
            self.pre_quant = nn.Linear(self.encoder.output_dim, config.codebook_dim)
            self.post_quant = nn.Linear(config.codebook_dim, self.decoder.input_dim)
        self.image_processor = ImageTokenizerImageProcessor(size=config.image_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers sets each weight once, children first: a block cannot correct its layers
        if isinstance(module, ZeroLinear | ZeroConv2d):
            init.zeros_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, VitEncoder):
            init.normal_(module.positions, std=0.5)
        elif isinstance(module, VitDecoder):
            init.normal_(module.patch_positions, std=0.5)
            if module.token_positions is not None:
                init.normal_(module.token_positions, std=0.5)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor, num_tokens: int | None = None) -> Tensor:
        """Turn pictures into codes; the same picture gives the same codes in any batch.

        Args:
            pixel_values: (B, 3, image_size, image_size), any float dtype, in [-1, 1].
            num_tokens: nested layouts: how many codes; the first ones of the full sequence.

        Returns:
            codes (B, L) int64, values in [0, codebook_size).

        Raises:
            CodeError: ``pixel_values`` of another shape, or a ``num_tokens`` that cannot be
                decoded.
        """
        length = self._length(num_tokens)
        return self.quantizer(self._latents(pixel_values)).codes[:, :length]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into pictures.

        Args:
            codes: (B, L) integers in [0, codebook_size); L is ``num_tokens``, or where the layout
                is nested anything from ``min_tokens`` to ``num_tokens``.

        Returns:
            pixel_values (B, 3, image_size, image_size) float32 in [-1, 1].

        Raises:
            CodeError: codes outside the codebook, or of a length that cannot be decoded.
        """
        if codes.ndim != 2 or codes.is_floating_point():
            raise CodeError(
                f"codes of shape {tuple(codes.shape)} and type {codes.dtype} came; "
                "expected integers of shape (batch, codes)"
            )
        self._length(codes.shape[1])
        if codes.numel() and not (codes.min() >= 0 and codes.max() < self.config.codebook_size):
            raise CodeError(
                f"codes from {int(codes.min())} to {int(codes.max())} came; expected 0 to "
                f"{self.config.codebook_size - 1}; were they made by another image tokenizer?"
            )
        return self._pixels(self.quantizer.lookup(codes.long())).float().clamp(-1, 1)

    def forward(self, pixel_values: Tensor, num_tokens: int | None = None) -> ImageTokenizerOutput:
        """Reconstruct pictures, with the losses that train the tokenizer.

        Args:
            pixel_values: (B, 3, image_size, image_size), any float dtype, in [-1, 1].
            num_tokens: nested layouts: reconstruct from that many codes. In training mode the
                default is one random length from ``min_tokens`` to ``num_tokens`` for the whole
                batch.

        Returns:
            :class:`ImageTokenizerOutput`.

        Raises:
            CodeError: as :meth:`encode`.

        Source of the random length: Miwa et al., "One-D-Piece" (2025), §3 ("tail token drop"),
            uniform.
        """
        if num_tokens is None and self.training and self.config.is_nested:
            first, last = self.config.min_tokens, self.config.num_tokens
            num_tokens = int(torch.randint(first, last + 1, ()))
        length = self._length(num_tokens)
        quantized = self.quantizer(self._latents(pixel_values))
        code_vectors = quantized.vectors[:, :length]
        reconstruction = self._pixels(code_vectors).float()
        error = reconstruction - pixel_values.float()
        losses = {"l1": error.abs().mean(), "l2": error.square().mean(), **quantized.losses}
        return ImageTokenizerOutput(
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            reconstruction=reconstruction,
            codes=quantized.codes[:, :length],
            code_vectors=code_vectors,
        )

    @torch.no_grad()
    def start_from_principal_components(self, pixel_values: Tensor) -> None:
        """Make a new ``patch_local`` tokenizer, but for its codes, an exact linear autoencoder.

        The encoder's latents become the principal components of the pictures' patches, scaled so
        that all of them together have variance ``codebook_dim``, and the decoder their inverse. The
        residual blocks start at zero, so the codebook is at first placed on the patches themselves
        and training refines from there. What it saves: on the embedded world 98 % of
        reconstructions are right after 100 steps, against none (docs/learning.md).

        Args:
            pixel_values: (B, 3, image_size, image_size) in [-1, 1]; a few hundred pictures or more.

        Raises:
            ConfigurationError: the tokenizer is not ``patch_local`` on both sides, or its bodies
                are narrower than ``codebook_dim``.
        """
        encoder, decoder, D = self.encoder, self.decoder, self.config.codebook_dim
        if not isinstance(encoder, PatchEncoder) or not isinstance(decoder, PatchDecoder):
            raise ConfigurationError("principal components are a start for patch_local bodies only")
        if min(encoder.output_dim, encoder.embed.in_features) < D:
            raise ConfigurationError(
                f"codebook_dim is {D}, more than the width {encoder.output_dim} of the bodies or "
                f"the {encoder.embed.in_features} values of a patch"
            )
        patches = cut_into_patches(pixel_values.float(), encoder.side).flatten(0, 1)
        mean = patches.mean(0)
        covariance = (patches - mean).T @ (patches - mean) / len(patches)
        variances, directions = torch.linalg.eigh(covariance)
        directions = directions.flip(1)[:, :D]
        scale = (D / variances.flip(0)[:D].sum().clamp_min(1e-12)).sqrt()
        for layer in (encoder.embed, self.pre_quant, self.post_quant, decoder.paint):
            layer.weight.zero_()
            layer.bias.zero_()
        encoder.embed.weight[:D] = scale * directions.T
        encoder.embed.bias[:D] = -scale * (directions.T @ mean)
        self.pre_quant.weight[:, :D] = torch.eye(D)
        self.post_quant.weight[:D] = torch.eye(D)
        decoder.paint.weight[:, :D] = directions / scale
        decoder.paint.bias.copy_(mean)

    def code_vectors(self) -> Tensor:
        """(codebook_size, codebook_dim) float32: the VQ codebook, or the grid points of FSQ."""
        return self.quantizer.code_vectors().to(self.device)

    def fingerprint(self) -> str:
        """A sha256 (hexadecimal) of everything that gives a code its meaning.

        It covers the configuration, less what only training uses, and all weights rounded to
        bfloat16, so it survives saving, loading, and a copy in bfloat16. Code caches and merged
        models carry it.
        """
        fields = ImageTokenizerConfig.__annotations__.keys() - set(_TRAINING_ONLY_FIELDS)
        # Fields younger than published tokenizers count only where they are used.
        if self.config.quantizer_type != "product":
            fields -= {"product_sizes"}
        if self.config.palette_ground == "patch":
            fields -= {"palette_ground"}
        meaning = {name: getattr(self.config, name) for name in sorted(fields)}
        digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            if name.rpartition(".")[2] not in _TRAINING_ONLY_TENSORS:
                rounded = tensor.detach().cpu().to(torch.bfloat16).contiguous()
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(rounded.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    def _latents(self, pixel_values: Tensor) -> Tensor:
        side, channels = self.config.image_size, self.config.num_channels
        if tuple(pixel_values.shape[1:]) != (channels, side, side) or pixel_values.ndim != 4:
            raise CodeError(
                f"pixel_values of shape {tuple(pixel_values.shape)} came; expected "
                f"(batch, {channels}, {side}, {side}); use the tokenizer's image processor"
            )
        return self.pre_quant(self.encoder(_as_weights(pixel_values, self.pre_quant)))

    def _pixels(self, vectors: Tensor) -> Tensor:
        return self.decoder(self.post_quant(_as_weights(vectors, self.post_quant)))

    def _length(self, num_tokens: int | None) -> int:
        longest, shortest = self.config.num_tokens, self.config.min_tokens
        if num_tokens is None:
            return longest
        if not shortest <= num_tokens <= longest:
            expected = f"{shortest} to {longest}" if shortest < longest else f"{longest}"
            raise CodeError(f"{num_tokens} codes per picture came; this tokenizer uses {expected}")
        return num_tokens

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write ``config.json``, ``model.safetensors``, ``preprocessor_config.json`` and
        ``vocabulary_extension.json``.

        Everything is written beside the folder first and renamed into it at the end: a full disk
            leaves
        what was there.

        Args:
            save_directory: a folder; other files in it stay.
            push_to_hub: upload the folder afterwards, to ``repo_id`` or the folder's name.
            **kwargs: as in :class:`PreTrainedModel`; with ``push_to_hub``, also its arguments.

        Raises:
            OSError: as the file system says.
        """
        folder = Path(save_directory)
        hub_names = ("repo_id", "commit_message", "private", "revision", "create_pr", "tags")
        hub = {name: kwargs.pop(name) for name in hub_names if name in kwargs}
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
        try:
            super().save_pretrained(temporary, **kwargs)
            self.image_processor.save_pretrained(temporary)
            VocabularyExtension.from_image_tokenizer(self).save(temporary)
            written = {file.name for file in temporary.iterdir()}
            for name in sorted(written, key=lambda name: name == "config.json"):
                os.replace(temporary / name, folder / name)
            for old in folder.glob("model*.safetensors*"):
                if old.name not in written:
                    old.unlink()
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", folder.name), token=kwargs.get("token"), **hub)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a folder or a hub id. Only safetensors are read, never pickles.

        Args:
            pretrained_model_name_or_path: a folder that :meth:`save_pretrained` wrote, or a hub id.
            *args, **kwargs: as in :class:`PreTrainedModel` (``dtype``, ``subfolder``, ``revision``
                …).

        Raises:
            CheckpointError: no such folder, a folder of another model, weights that are absent,
                damaged, or do not fit the configuration.
        """
        source = os.fspath(pretrained_model_name_or_path)
        _check_folder(source, kwargs.get("subfolder", ""))
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.pop("use_safetensors", None)
        try:
            loaded: Any = super().from_pretrained(
                source, *args, use_safetensors=True, output_loading_info=True, **kwargs
            )
        except UnimodalError:
            raise
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{source!r} cannot be loaded as an image tokenizer: {_first_line(error)}"
            ) from error
        model, info = loaded
        wrong = {
            name: keys
            for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if (keys := info[name])
        }
        if wrong:
            name, keys = next(iter(wrong.items()))
            raise CheckpointError(
                f"the weights of {source!r} do not fit its config.json: {len(keys)} "
                f"{name.replace('_', ' ')}, for example {min(map(str, keys))!r}; "
                "the folder mixes two models or is half-written"
            )
        hub = {
            name: kwargs[name]
            for name in ("subfolder", "revision", "cache_dir", "token", "local_files_only")
            if name in kwargs
        }
        with suppress(OSError):  # without preprocessor_config.json the default of __init__ stays
            model.image_processor = ImageTokenizerImageProcessor.from_pretrained(source, **hub)
        return (model, info) if wants_info else model


def _as_weights(values: Tensor, layer: nn.Module) -> Tensor:
    """Values in the dtype of a layer's weights; as they are where it has none."""
    return values.to(next(layer.parameters(), values).dtype)


def _make_encoder(config: ImageTokenizerConfig) -> Any:
    if config.encoder_type == "palette":
        return PaletteEncoder(config.num_channels, config.patch_size, config.palette_ground)
    if config.encoder_type == "vit":
        return VitEncoder(
            num_channels=config.num_channels,
            patch_size=config.patch_size,
            num_patches=(config.image_size // config.patch_size) ** 2,
            num_queries=0 if config.grid else config.num_latent_tokens,
            **_transformer(config),
        )
    widths = _widths(config)
    if config.patch_local:
        side = 2 ** len(widths)
        return PatchEncoder(config.num_channels, side, widths[-1], config.num_res_blocks)
    return ConvEncoder(config.num_channels, widths, config.num_res_blocks)


def _make_decoder(config: ImageTokenizerConfig) -> Any:
    if config.decoder_type == "palette":
        assert config.grid is not None
        return PaletteDecoder(config.num_channels, config.patch_size, config.grid)
    if config.decoder_type == "vit":
        side = config.image_size // config.patch_size
        return VitDecoder(
            num_channels=config.num_channels,
            patch_size=config.patch_size,
            grid=(side, side),
            num_tokens=0 if config.grid else config.num_latent_tokens,
            **_transformer(config),
        )
    widths = _widths(config)
    assert config.grid is not None  # the configuration allows conv bodies only with a 2-D layout
    if config.patch_local:
        side = 2 ** len(widths)
        return PatchDecoder(
            config.num_channels, side, widths[-1], config.num_res_blocks, config.grid
        )
    return ConvDecoder(config.num_channels, widths, config.num_res_blocks, config.grid)


def _make_quantizer(config: ImageTokenizerConfig) -> Any:
    if config.quantizer_type == "fsq":
        return FiniteScalarQuantizer(list(config.fsq_levels))
    names = ("distance", "codebook_update", "ema_decay", "commitment_cost", "revive_after")
    settings = {name: getattr(config, name) for name in names}
    if config.quantizer_type == "product":
        return ProductQuantizer(list(config.product_sizes), config.product_dims, **settings)
    return VectorQuantizer(config.codebook_size, config.codebook_dim, **settings)


def _widths(config: ImageTokenizerConfig) -> list[int]:
    return [config.base_channels * factor for factor in config.channel_multiplier]


def _transformer(config: ImageTokenizerConfig) -> dict[str, Any]:
    return {
        "width": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.mlp_ratio,
    }


def _check_folder(source: str, subfolder: str) -> None:
    """Say in one sentence what is wrong with a local folder. Hub ids are left to transformers."""
    folder = Path(source, subfolder)
    if not folder.is_dir():
        if Path(source).exists():
            raise CheckpointError(
                f"{str(folder)!r} is not a folder; expected an image tokenizer's folder"
            )
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.startswith("."):
            return
        raise CheckpointError(
            f"there is no folder {str(folder)!r}; "
            "expected one that ImageTokenizer.save_pretrained wrote"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except FileNotFoundError:
        raise CheckpointError(
            f"{str(folder)!r} has no config.json; expected an image tokenizer's folder"
        ) from None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{str(folder / 'config.json')!r} is damaged: {error}") from error
    if model_type != ImageTokenizerConfig.model_type:
        raise CheckpointError(
            f"{str(folder)!r} holds a model of type {model_type!r}; expected "
            f"{ImageTokenizerConfig.model_type!r}; "
            "a merged model keeps its image tokenizer in image_tokenizer/"
        )
    if not any(folder.glob("model*.safetensors*")):
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is never loaded" if pickles else ""
        raise CheckpointError(
            f"{str(folder)!r} has no model.safetensors{hint}; save the tokenizer again"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
