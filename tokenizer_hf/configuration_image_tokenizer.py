"""What an image tokenizer is made of: encoder, token layout, quantizer, decoder, sizes."""

import math
from typing import Any

import numpy as np
from transformers.configuration_utils import PretrainedConfig

from tokenizer_hf.errors import ConfigurationError

BODIES = ("conv", "vit", "palette")
GROUNDS = ("patch", "picture")
LAYOUTS = ("2d", "1d", "nested_1d")


class ImageTokenizerConfig(PretrainedConfig):
    """The configuration of an :class:`ImageTokenizer`, saved as ``config.json``.

    Args:
        image_size: height and width of a picture, pixels.
        num_channels: channels of a picture; 3 is RGB.
        encoder_type: ``"conv"`` (a grid of codes), ``"vit"`` or ``"palette"`` (each patch as a mask
            and two colours; nothing is learned but the codebooks).
        decoder_type: ``"conv"``, ``"vit"`` or ``"palette"``. Conv and ViT bodies may be mixed where
            both give the same 2-D grid; palette stands on both sides or on none.
        token_layout: ``"2d"`` (one code per grid cell, raster order), ``"1d"`` (codes of the whole
            picture, read by latent queries) or ``"nested_1d"`` (1-D, and any prefix decodes).
        base_channels: conv bodies: channels at half resolution, before the multiplier.
        channel_multiplier: conv bodies: one entry per halving, so ``[1, 2, 4, 4]`` turns 64 pixels
            into a grid of 4 × 4 codes. Level i has ``base_channels * channel_multiplier[i]``
            channels.
        num_res_blocks: conv bodies: residual blocks per level (``patch_local``: blocks in all).
        patch_local: conv bodies: each code sees, and paints, its own square patch and nothing else.
            The width is then ``base_channels * channel_multiplier[-1]``.
        patch_size: ViT and palette bodies: side of a patch, pixels.
        palette_ground: palette bodies: which colour of a patch is its background: ``"patch"`` (the
            one that more of its border has) or ``"picture"`` (the one that most patches of the
            picture share, so that masks are things and not holes in them).
        hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio: ViT bodies: the transformer.
        num_latent_tokens: 1-D layouts: codes per picture.
        min_tokens: ``nested_1d``: the shortest prefix that training drops to and that ``decode``
            takes. In the other layouts it is set to ``num_tokens``.
        quantizer_type: ``"vq"`` (a learned codebook), ``"fsq"`` (a fixed grid) or ``"product"`` (a
            learned codebook for each part of the latent; a code stands for one combination).
        codebook_size: number of codes. With FSQ it is set to the product of ``fsq_levels``, with
            ``"product"`` to that of ``product_sizes``.
        codebook_dim: width of a code vector. With FSQ it is set to ``len(fsq_levels)``, with
            palette bodies to what they make.
        distance: VQ: ``"l2"`` or ``"cosine"``.
        codebook_update: VQ: ``"ema"`` (running means of the vectors that chose a code) or
            ``"gradient"`` (a loss term pulls the code).
        ema_decay: VQ with ``"ema"``: share of the old mean that one training step keeps, in [0, 1).
        commitment_cost: VQ: weight of the loss that pulls the encoder to its code.
        revive_after: VQ: a code that no vector chose for so many training steps is dead, and moves
            to a vector that is far from every code; 0 turns that off. Unused codes of a new
            codebook are dead from the start, so the first training steps place the codebook on the
            data.
        fsq_levels: FSQ: number of levels of each dimension.
        product_sizes: product: codes of each part. Palette bodies have three parts: mask,
            foreground colour, background colour; or two: mask, pair of colours (fewer codes where
            few pairs come). Elsewhere the latent is cut evenly.

    Raises:
        ConfigurationError: values that cannot be right together.
    """

    model_type = "unimodal_image_tokenizer"

    image_size: int = 64
    num_channels: int = 3
    encoder_type: str = "conv"
    decoder_type: str = "conv"
    token_layout: str = "2d"

    base_channels: int = 64
    channel_multiplier: list[int] | tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    patch_local: bool = False

    patch_size: int = 8
    palette_ground: str = "patch"
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    mlp_ratio: float = 4.0
    num_latent_tokens: int = 16
    min_tokens: int = 1

    quantizer_type: str = "vq"
    codebook_size: int = 2048
    codebook_dim: int = 16
    distance: str = "l2"
    codebook_update: str = "ema"
    ema_decay: float = 0.99
    commitment_cost: float = 0.25
    revive_after: int = 100
    fsq_levels: list[int] | tuple[int, ...] = (8, 5, 5, 5)
    product_sizes: list[int] | tuple[int, ...] = (64, 16, 8)

    def __post_init__(self, **kwargs: Any) -> None:
        self.channel_multiplier = [int(factor) for factor in self.channel_multiplier]
        self.fsq_levels = [int(levels) for levels in self.fsq_levels]
        self.product_sizes = [int(size) for size in self.product_sizes]
        self._check()
        if self.quantizer_type == "fsq":
            self.codebook_size = math.prod(self.fsq_levels)
            self.codebook_dim = len(self.fsq_levels)
        if self.encoder_type == "palette":
            self.codebook_dim = self.patch_size**2 + 2 * self.num_channels
        if self.quantizer_type == "product":
            self.codebook_size = math.prod(self.product_sizes)
        if not self.is_nested:
            self.min_tokens = self.num_tokens
        super().__post_init__(**kwargs)

    @property
    def is_nested(self) -> bool:
        """Whether any prefix of the codes, from ``min_tokens`` on, decodes to a picture."""
        return self.token_layout == "nested_1d"

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the codes, or None where the layout is one-dimensional."""
        if self.token_layout != "2d":
            return None
        side = self.image_size // self._cell(self.encoder_type)
        return side, side

    @property
    def num_tokens(self) -> int:
        """Codes per picture, at most."""
        return self.num_latent_tokens if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def num_codebooks(self) -> int:
        """Codes per position. One, for the quantizers that exist now."""
        return 1

    @property
    def code_radices(self) -> list[int]:
        """How many values each factor of a code has; a code is their mixed-radix number, first
        factor fastest. FSQ: the levels; product: the parts; VQ: one factor, the code itself."""
        factors = {"fsq": self.fsq_levels, "product": self.product_sizes}
        return list(factors.get(self.quantizer_type, [self.codebook_size]))

    def code_factors(self) -> np.ndarray:
        """Which factors' values each code is made of.

        Returns:
            int64 (codebook_size, number of factors). Column i holds the value of factor i, counted
            on from the values of the factors before it, so all are in [0, sum(code_radices)).
        """
        codes = np.arange(self.codebook_size)
        columns, first = [], 0
        for radix in self.code_radices:
            codes, digit = np.divmod(codes, radix)
            columns.append(first + digit)
            first += radix
        return np.stack(columns, axis=1)

    @property
    def product_dims(self) -> list[int]:
        """Width of each part of the latent that a product quantizer cuts."""
        if self.encoder_type == "palette":
            C = self.num_channels
            return [self.patch_size**2, *([2 * C] if len(self.product_sizes) == 2 else [C, C])]
        parts = len(self.product_sizes)
        return [self.codebook_dim // parts] * parts

    def _cell(self, body: str) -> int:
        """Side, in pixels, of the square that one grid cell stands for."""
        return 2 ** len(self.channel_multiplier) if body == "conv" else self.patch_size

    def _check(self) -> None:
        for name, value, known in (
            ("encoder_type", self.encoder_type, BODIES),
            ("decoder_type", self.decoder_type, BODIES),
            ("token_layout", self.token_layout, LAYOUTS),
            ("palette_ground", self.palette_ground, GROUNDS),
            ("quantizer_type", self.quantizer_type, ("vq", "fsq", "product")),
            ("distance", self.distance, ("l2", "cosine")),
            ("codebook_update", self.codebook_update, ("ema", "gradient")),
        ):
            if value not in known:
                raise ConfigurationError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        for name in (
            "image_size", "num_channels", "base_channels", "patch_size", "hidden_size",
            "num_hidden_layers", "num_attention_heads", "num_latent_tokens", "min_tokens",
            "codebook_size", "codebook_dim",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.channel_multiplier or min(self.channel_multiplier) < 1:
            raise ConfigurationError(
                f"channel_multiplier is {self.channel_multiplier}; "
                "expected a factor of at least 1 per halving"
            )
        if not self.fsq_levels or min(self.fsq_levels) < 3:
            raise ConfigurationError(
                f"fsq_levels is {self.fsq_levels}; expected at least 3 per dimension"
            )
        self._check_product()
        if not 0 <= self.ema_decay < 1:
            raise ConfigurationError(f"ema_decay is {self.ema_decay}; expected at least 0, below 1")
        bodies = {self.encoder_type, self.decoder_type}
        if "palette" in bodies and (len(bodies) > 1 or self.quantizer_type == "fsq"):
            raise ConfigurationError(
                f"encoder_type {self.encoder_type!r}, decoder_type {self.decoder_type!r} and "
                f"quantizer_type {self.quantizer_type!r} came; palette bodies need each other, and "
                "a quantizer with learned codes: vq or product"
            )
        if self.token_layout != "2d" and bodies != {"vit"}:
            raise ConfigurationError(
                f"token_layout {self.token_layout!r} needs encoder_type and decoder_type 'vit'; "
                f"got {self.encoder_type!r} and {self.decoder_type!r}"
            )
        for body in bodies:
            if self.image_size % self._cell(body):
                raise ConfigurationError(
                    f"image_size {self.image_size} is not a multiple of {self._cell(body)}, "
                    f"the side of a cell of the {body} body; "
                    "change image_size, channel_multiplier or patch_size"
                )
        reads, paints = self._cell(self.encoder_type), self._cell(self.decoder_type)
        if reads != paints:
            raise ConfigurationError(
                f"the {self.encoder_type} encoder makes cells of {reads} pixels and the "
                f"{self.decoder_type} decoder paints cells of {paints}; make them equal"
            )
        if "vit" in bodies and self.hidden_size % self.num_attention_heads:
            raise ConfigurationError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.is_nested and self.min_tokens > self.num_latent_tokens:
            raise ConfigurationError(
                f"min_tokens {self.min_tokens} exceeds num_latent_tokens {self.num_latent_tokens}"
            )

    def _check_product(self) -> None:
        if self.quantizer_type != "product":
            return
        sizes = self.product_sizes
        if not sizes or min(sizes) < 1:
            raise ConfigurationError(f"product_sizes is {sizes}; expected at least 1 code each")
        palette = self.encoder_type == "palette"
        if palette and len(sizes) not in (2, 3):
            raise ConfigurationError(
                f"product_sizes is {sizes}; palette bodies have three parts: mask, foreground, "
                "background; or two: mask, both colours"
            )
        if not palette and self.codebook_dim % len(sizes):
            raise ConfigurationError(
                f"codebook_dim {self.codebook_dim} cannot be cut into {len(sizes)} equal parts; "
                "change it or product_sizes"
            )
