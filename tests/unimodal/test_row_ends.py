"""How many ends of row fit a language model's rotary positions."""

import math

import pytest
from transformers import Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
from tokenizer_hf.errors import ConfigurationError
from unimodal.row_ends import fit_row_ends, rotary_frequencies


def tokenizer(codes: int) -> ImageTokenizerConfig:
    """Config of an image tokenizer with codes × codes codes."""
    return ImageTokenizerConfig(
        image_size=8 * codes, encoder_type="palette", decoder_type="palette", patch_size=8
    )


def qwen(head_dim: int, theta: float) -> Qwen3Config:
    return Qwen3Config(
        head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )


def test_frequencies_are_those_of_transformers() -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = qwen(32, 10000.0)
    expected = Qwen3RotaryEmbedding(config).inv_freq.tolist()
    assert rotary_frequencies(config) == pytest.approx(expected)
    scaled = LlamaConfig(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    )
    assert len(rotary_frequencies(scaled)) == 64
    assert rotary_frequencies(scaled)[-1] < 500000.0 ** (-126 / 128)
    assert len(rotary_frequencies(GPTNeoXConfig(hidden_size=64, num_attention_heads=2))) < 16
    assert rotary_frequencies(Gemma3TextConfig())[0] == 1


@pytest.mark.parametrize(
    "head_dim, theta, codes, row_ends",
    [
        (32, 10000.0, 8, 3),  # periods 6.3, 11.2, 19.9: rows of 11
        (32, (2 * math.pi / 9) ** -16, 8, 1),  # a period of 9
        (32, (2 * math.pi / 10) ** -16, 8, 2),
        (128, 1e6, 16, 2),  # periods 14.9, 18.5: rows of 18
    ],
)
def test_a_row_comes_close_to_a_period(
    head_dim: int, theta: float, codes: int, row_ends: int
) -> None:
    assert fit_row_ends(qwen(head_dim, theta), tokenizer(codes)) == row_ends


def test_what_has_no_rows_or_no_rotary_positions_is_refused() -> None:
    nested = ImageTokenizerConfig(
        encoder_type="vit", decoder_type="vit", token_layout="nested_1d", patch_size=8
    )
    with pytest.raises(ConfigurationError, match="have no rows"):
        fit_row_ends(qwen(32, 10000.0), nested)
    with pytest.raises(ConfigurationError, match="no rotary positions; give a number"):
        fit_row_ends(GPT2Config(), tokenizer(8))
