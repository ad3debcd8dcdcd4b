"""A model of the demo's size with random weights: to measure how fast something is, not how good.

Speed does not depend on what the weights are, and a random model can have as many codes a picture
as one likes. Whatever is measured on one has to say so.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
from unimodal.merge import merge

CHANNEL_MULTIPLIERS = {16: [1, 2, 4, 4], 64: [1, 2, 4], 256: [1, 2]}
"""By codes a picture: each step halves the edge of 64 pixels."""
TEXT_ROWS = 8192
CODEBOOK_SIZE = 2048
_END = "<|endoftext|>"


def random_model(out: str | Path, num_codes: int, words: str, seed: int = 0) -> Path:
    """Write a merged folder: Qwen3 128 × 4 with 8,192 text rows, 2,048 codes, pictures of 64 × 64.

    Args:
        out: the folder.
        num_codes: of a picture: 16, 64 or 256.
        words: a text whose words the text tokenizer has as tokens.
        seed: of all weights.

    Raises:
        ConfigurationError: another number of codes.
    """
    if num_codes not in CHANNEL_MULTIPLIERS:
        raise ConfigurationError(
            f"a random model of {num_codes} codes a picture; expected one of "
            f"{', '.join(map(str, CHANNEL_MULTIPLIERS))}"
        )
    torch.manual_seed(seed)
    tokenizer = _text_tokenizer(words)
    llm = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=TEXT_ROWS,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            tie_word_embeddings=True,
            max_position_embeddings=512,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    image_tokenizer = ImageTokenizer(
        ImageTokenizerConfig(
            image_size=64,
            patch_local=True,
            base_channels=64,
            channel_multiplier=CHANNEL_MULTIPLIERS[num_codes],
            num_res_blocks=1,
            codebook_size=CODEBOOK_SIZE,
            codebook_dim=128,
        )
    )
    with TemporaryDirectory(prefix="unimodal-random-") as parts:
        llm.save_pretrained(Path(parts, "llm"))
        tokenizer.save_pretrained(Path(parts, "llm"))
        image_tokenizer.save_pretrained(Path(parts, "image_tokenizer"))
        return merge(Path(parts, "llm"), Path(parts, "image_tokenizer"), out, seed=seed)


def _text_tokenizer(words: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=1024,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[_END],
        show_progress=False,
    )
    backend.train_from_iterator([f" {words} {words}"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=_END, pad_token=_END)
