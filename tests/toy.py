"""Tiny real things for the tests: text tokenizers, random LLMs, image tokenizers, merged folders.

Nothing here is a mock: every object is what ``from_pretrained`` would give for a published model of
its style, only small.
"""

import io
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokenizer_hf.vocabulary import VocabularyExtension

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")


@cache
def corpus() -> tuple[str, ...]:
    """A few hundred sentences about coloured shapes, with some digits, accents and punctuation."""
    rng = random.Random(0)
    colours = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "pink")
    shapes = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
    lines = []
    for _ in range(400):
        one, two = rng.choice(colours), rng.choice(colours)
        first, second = rng.choice(shapes), rng.choice(shapes)
        side = rng.choice(("left of", "right of", "above", "below"))
        size = rng.choice(("small", "large"))
        lines.append(
            rng.choice(
                (
                    f"A {size} {one} {first} is {side} a {two} {second}.",
                    f"What is {side} the {one} {first}? It's a {two} {second}!",
                    f"Draw: {rng.randint(1, 3)} {one} {first}s on {two}, size {rng.randint(0, 99)}",
                    f"Describe the picture.\nThere is a {size} {one} {first}, naïve café – ok?",
                )
            )
        )
    return tuple(lines)


def qwen_tokenizer() -> Any:
    """Qwen style: byte-level BPE, NFC, ChatML specials added after the vocabulary, no bos."""
    backend = _byte_bpe(QWEN_PATTERN, 400, normalizer=normalizers.NFC())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    backend.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
    )
    from transformers import Qwen2Tokenizer

    spec = _json(backend)
    return Qwen2Tokenizer(
        vocab=spec["model"]["vocab"],
        merges=[tuple(merge) for merge in spec["model"]["merges"]],
        added_tokens_decoder={
            token["id"]: AddedToken(token["content"], special=token["special"], normalized=False)
            for token in spec["added_tokens"]
        },
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE,
    )


def llama3_tokenizer() -> Any:
    """Llama-3 style: byte-level BPE with ``ignore_merges``, header specials, bos before a text."""
    backend = _byte_bpe(LLAMA3_PATTERN, 380, ignore_merges=True)
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    specials += ["<|eot_id|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    bos = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|> $B",
                special_tokens=[("<|begin_of_text|>", bos)],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        chat_template=LLAMA3_TEMPLATE,
    )


def llama2_tokenizer() -> Any:
    """Llama-2 style: SentencePiece BPE with byte fallback, as transformers loads its .model."""
    import tempfile

    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(sentencepiece_model())
        tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.vocab_file = None
    tokenizer.init_kwargs.pop("vocab_file", None)
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = LLAMA2_TEMPLATE
    return tokenizer


TEXT_TOKENIZERS = {
    "qwen": qwen_tokenizer,
    "llama3": llama3_tokenizer,
    "llama2": llama2_tokenizer,
}


@cache
def sentencepiece_model() -> bytes:
    """A Llama-2-style ``tokenizer.model``: BPE, byte fallback, dummy prefix, <unk> <s> </s>."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


def _byte_bpe(
    pattern: str, size: int, normalizer: Any = None, ignore_merges: bool = False
) -> Tokenizer:
    backend = Tokenizer(BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    return backend


def _json(backend: Tokenizer) -> Any:
    import json

    return json.loads(backend.to_str())


def toy_extension(
    codebook_size: int = 16, num_codebooks: int = 1, num_tokens: int = 4, **changes: Any
) -> VocabularyExtension:
    """An extension that belongs to no image tokenizer in particular."""
    values = {"min_tokens": num_tokens, "fingerprint": "0" * 64, **changes}
    return VocabularyExtension(
        codebook_size=codebook_size, num_codebooks=num_codebooks, num_tokens=num_tokens, **values
    )


# --- language models ------------------------------------------------------------------------------

LLM_FAMILIES = ("qwen3", "llama", "gemma3_text", "mistral", "gpt_neox", "phi3", "gemma2")


def tiny_llm(
    family: str = "qwen3", *, vocab_size: int, tied: bool = True, seed: int = 0, **changes: Any
) -> Any:
    """A random causal LM of two layers and width 32."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config = CONFIG_MAPPING[family](**{**values, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def save_llm(
    folder: str | Path,
    family: str = "qwen3",
    *,
    tokenizer: Any = None,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """Write a base LLM as it would come from the hub: model, tokenizer, chat template."""
    folder = Path(folder)
    tokenizer = qwen_tokenizer() if tokenizer is None else tokenizer
    changes.setdefault("vocab_size", len(tokenizer) + 3)  # published models have spare rows
    changes.setdefault("eos_token_id", tokenizer.eos_token_id)
    changes.setdefault("bos_token_id", tokenizer.bos_token_id)
    changes.setdefault("pad_token_id", tokenizer.pad_token_id)
    model = tiny_llm(family, tied=tied, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_image_tokenizer(seed: int = 0, **changes: Any) -> Any:
    """An untrained image tokenizer of 16 x 16 pixels, 4 codes a picture, 16 codes.

    Its decoder paints noticeably different pictures for different codes.
    """
    from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
    from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer

    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "image_size": 16,
        "base_channels": 8,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "codebook_size": 16,
        "codebook_dim": 4,
    }
    return ImageTokenizer(ImageTokenizerConfig(**{**values, **changes})).eval()


def nested_image_tokenizer(seed: int = 0, **changes: Any) -> Any:
    """An untrained nested tokenizer: 2 to 6 codes a picture of 16 x 16 pixels, 16 codes."""
    values: dict[str, Any] = {
        "encoder_type": "vit",
        "decoder_type": "vit",
        "token_layout": "nested_1d",
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_latent_tokens": 6,
        "min_tokens": 2,
    }
    return tiny_image_tokenizer(seed, **{**values, **changes})


def toy_merged_folder(
    tmp_path: str | Path,
    family: str = "qwen3",
    *,
    style: str = "qwen",
    tied: bool = True,
    nested: bool = False,
    vocab_mode: str = "added",
    dtype: torch.dtype = torch.float32,
    **merge_settings: Any,
) -> Path:
    """A merged folder of a random LLM and an untrained image tokenizer: ``tmp_path / "merged"``.

    The parts are beside it: ``tmp_path / "llm"`` and ``tmp_path / "image_tokenizer"``.
    """
    from unimodal.merge import merge

    tmp_path = Path(tmp_path)
    llm = save_llm(
        tmp_path / "llm", family, tokenizer=TEXT_TOKENIZERS[style](), tied=tied, dtype=dtype
    )
    image_tokenizer = nested_image_tokenizer() if nested else tiny_image_tokenizer()
    image_tokenizer.save_pretrained(tmp_path / "image_tokenizer")
    return merge(
        llm,
        tmp_path / "image_tokenizer",
        tmp_path / "merged",
        vocab_mode=vocab_mode,
        **merge_settings,
    )


def scale_rows(folder: str | Path, factors: dict[int, float]) -> None:
    """Multiply rows of a merged folder's tied embedding: likelier where they are likely at all."""
    from safetensors.torch import load_file, save_file

    file = Path(folder, "model.safetensors")
    tensors = load_file(file)
    [name] = [key for key in tensors if key.endswith("embed_tokens.weight")]
    for token_id, factor in factors.items():
        tensors[name][token_id] *= factor
    save_file(tensors, file, metadata={"format": "pt"})
