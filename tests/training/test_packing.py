"""Packing: other rows, the same losses, gradients and counts; who mixes examples is refused."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, modeling_flash_attention_utils

from tests.toy import LLM_FAMILIES, qwen_tokenizer, tiny_llm
from tests.training.test_language_model import metrics, recipe_of, settings_of
from tokenizer_hf.errors import ConfigurationError
from training.adapters import add_adapter, fold_lora
from training.data.collate import collate
from training.data.examples import Example
from training.data.packing import ONE_ROW, layout, row_tokens
from training.language_model import train
from training.packed_attention import require_packed_attention
from training.recipes import (
    DIRECTIONS,
    LoraRecipe,
    LossRecipe,
    OptimizerRecipe,
    TextModelRecipe,
    build_recipe,
)
from training.text_model import train_text_model
from training.trainer import UnimodalTrainer, training_arguments
from unimodal.messages import IGNORED
from unimodal.processing_unimodal import UnimodalProcessor

VOCABULARY = 60
WINDOWS = {"gemma3_text": 8, "mistral": 8, "gemma2": 8}
"""Sliding windows, shorter than an example."""


def examples_of(seed: int = 0, count: int = 14) -> list[Example]:
    """Examples of 2 to 24 tokens of all directions; texts are learnt from their first token on."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        ids = rng.integers(1, VOCABULARY, rng.integers(2, 25))
        direction = DIRECTIONS[number % len(DIRECTIONS)]
        learnt = ids if direction == "text" else np.where(rng.random(len(ids)) < 0.5, IGNORED, ids)
        found.append(Example(ids, learnt, direction))
    return found


def trainer_of(model: Any, tmp_path: Path, loss: LossRecipe, row_tokens: int | None) -> Any:
    args = training_arguments(str(tmp_path), False, {"max_steps": 1})
    steps: Any = []
    return UnimodalTrainer(
        model,
        args,
        steps,
        optimizer=OptimizerRecipe(),
        loss=loss,
        is_row=lambda name: False,
        row_tokens=row_tokens,
    )


def measured(model: Any, tmp_path: Path, loss: LossRecipe, row_tokens: int | None) -> Any:
    """Loss, gradients by name, sums by direction and counted work of one micro-batch."""
    trainer = trainer_of(model, tmp_path, loss, row_tokens)
    batch = trainer.data_collator(examples_of())
    model.zero_grad()
    value = trainer.compute_loss(model, batch)
    value.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return batch, value.detach(), gradients, trainer._sums, trainer.speedometer._work


def require_same(packed: Any, padded: Any) -> None:
    torch.testing.assert_close(packed[1], padded[1], atol=1e-6, rtol=1e-5)
    assert packed[2].keys() == padded[2].keys() and packed[2]
    largest = max(float(gradient.abs().max()) for gradient in padded[2].values())
    for name, gradient in padded[2].items():
        torch.testing.assert_close(packed[2][name], gradient, atol=1e-5 * largest, rtol=1e-4)
    torch.testing.assert_close(packed[3], padded[3], atol=1e-4, rtol=1e-5)
    assert torch.equal(packed[3][1], padded[3][1])  # loss tokens by direction
    assert torch.equal(packed[4], padded[4])  # tokens, pairs, loss tokens, passes


# --- rows ---


@pytest.mark.parametrize("size", [0, 30, 10**9, ONE_ROW])
def test_every_example_stands_in_one_row(size: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 25, rng.integers(1, 60)).tolist()
        rows = layout(lengths, size)
        assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
        sums = [sum(lengths[number] for number in row) for row in rows]
        assert max(sums) <= max(size or 1.5 * max(lengths), *lengths)
        assert len(rows) * max(sums) <= len(lengths) * max(lengths)  # no more than padded rows have
        if size == ONE_ROW:
            assert len(rows) == 1
    assert layout([3, 5, 4], None) == [[0], [1], [2]]


def test_rows_are_filled_evenly() -> None:
    assert layout([2, 9, 4, 5, 7], 0) == [[1], [4, 0], [3, 2]]  # 9, 9 and 9 tokens
    assert layout([2, 9, 4, 5, 7, 1], 14) == [[1, 2, 5], [4, 3, 0]]  # 14 and 14
    assert layout([9, 2, 2, 2], 0) == [[0], [1, 2, 3]]
    assert layout([4, 4, 4, 4], 8) == [[0], [1], [2], [3]]  # two rows have no fewer tokens
    lengths = np.random.default_rng(0).integers(5, 90, 600).tolist()
    rows = layout(lengths, 0)
    width = max(sum(lengths[number] for number in row) for row in rows)
    assert sum(lengths) / (len(rows) * width) > 0.95


def test_packed_rows() -> None:
    one = Example(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 4]), "text")
    two = Example(np.array([5, 6]), np.array([IGNORED, 6]), "draw")
    three = Example(np.array([7]), np.array([7]), "text")
    batch = collate([two, one, three], pad_token_id=9, row_tokens=4)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 9]]
    ignored = [[IGNORED, 2, 3, 4], [IGNORED, 6, IGNORED, IGNORED]]
    assert batch["labels"].tolist() == ignored
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch["segments"].tolist() == [[1, 1, 1, 1], [0, 0, 2, 0]]
    assert [DIRECTIONS[i] for i in batch["directions"]] == ["draw", "text", "text"]
    assert batch["lengths"].tolist() == [2, 4, 1]
    apart = collate([one, one], row_tokens=0)
    assert apart["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert "position_ids" not in collate([one, one])


# --- the same losses ---


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_losses_gradients_and_counts_are_those_of_padded_rows(
    family: str, attention: str, tmp_path: Path
) -> None:
    window = {"sliding_window": WINDOWS[family]} if family in WINDOWS else {}
    model = tiny_llm(family, vocab_size=VOCABULARY, **window)
    model.set_attn_implementation(attention)
    loss = LossRecipe(weights={"draw": 3.0, "text": 0.5})
    padded = measured(model, tmp_path, loss, None)
    for size in (0, 60, ONE_ROW):
        packed = measured(model, tmp_path, loss, size)
        assert len(packed[0]["input_ids"]) < len(padded[0]["input_ids"]) == 14
        require_same(packed, padded)


@pytest.mark.parametrize("folded", [False, True])
def test_the_distance_from_the_base_is_that_of_padded_rows(
    folded: bool, merged: Path, tmp_path: Path
) -> None:
    processor = UnimodalProcessor.from_pretrained(merged, load_image_tokenizer=False)
    base = AutoModelForCausalLM.from_pretrained(merged, attn_implementation="eager")
    model = add_adapter(base, processor.vocabulary, LoraRecipe(rank=4))
    if folded:
        fold_lora(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    loss = LossRecipe(weights={"draw": 3.0}, text_kl=2.0)
    padded, plain = (
        measured(model, tmp_path, one, None) for one in (loss, LossRecipe(weights={"draw": 3.0}))
    )
    assert float(padded[1] - plain[1]) > 0.02
    texts = [len(example.input_ids) for example in examples_of() if example.direction == "text"]
    assert padded[4][1, :2].tolist() == [sum(texts), sum(n * n for n in texts)]
    for size in (0, 60):
        require_same(measured(model, tmp_path, loss, size), padded)


def test_a_packed_run_learns_what_a_padded_one_learns(
    merged: Path, cache: Path, text: Path, tmp_path: Path
) -> None:
    logs = []
    for packing in (False, True, 96):
        settings = settings_of(merged, cache, text, tmp_path / str(packing))
        data = {**settings["data"], "packing": packing}
        run = train(recipe_of(settings, data=data, loss={"text_kl": 0.3}))
        logs.append(metrics(run))
    for log in logs[1:]:
        assert [one.keys() for one in log] == [one.keys() for one in logs[0]]
        for ours, theirs in zip(log, logs[0], strict=True):
            names = [name for name in theirs if name.startswith(("loss", "text_kl"))]
            assert len(names) > 3
            for name in names:
                assert ours[name] == pytest.approx(theirs[name], abs=2e-4)


def test_a_text_model_can_be_packed(text: Path, tmp_path: Path) -> None:
    qwen_tokenizer().save_pretrained(tmp_path / "tokenizer")
    logs = []
    for packing in (False, True):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
        steps = {"max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1}
        content = {
            "tokenizer": str(tmp_path / "tokenizer"),
            "output_dir": str(tmp_path / str(packing)),
            "text": [str(text)],
            "config": sizes,
            "bf16": False,
            "packing": packing,
            "training": {**steps, "gradient_accumulation_steps": 2, "disable_tqdm": True},
        }
        folder = train_text_model(build_recipe(TextModelRecipe, content))
        logs.append([entry["loss"] for entry in metrics(folder)])
    assert logs[1] == pytest.approx(logs[0], abs=2e-4)


# --- flash attention, refusals ---


def _varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """What flash_attn_varlen_func computes, in plain torch: (tokens, heads, width)."""
    edges = cu_seqlens_q.tolist()
    parts = [
        _flash(q[None, a:b], k[None, a:b], v[None, a:b], dropout_p, softmax_scale, causal)[0]
        for a, b in itertools.pairwise(edges)
    ]
    return torch.cat(parts)


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """What flash_attn_func computes, in plain torch: (B, T, heads, width)."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    found = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True
    )
    return found.transpose(1, 2)


def test_flash_attention_gets_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own path to flash attention, with the two kernels computed by torch."""
    library = modeling_flash_attention_utils
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn"):
        monkeypatch.setattr(library, name, None)
    monkeypatch.setattr(library, "_lazy_imports", lambda *_, **__: (_flash, _varlen, *[None] * 3))
    model = tiny_llm("qwen3", vocab_size=VOCABULARY)
    model.set_attn_implementation("eager")
    padded = measured(model, tmp_path, LossRecipe(), None)
    model.config._attn_implementation = "flash_attention_2"
    size = row_tokens(True, "flash_attention_2")
    packed = measured(model, tmp_path, LossRecipe(), size)
    assert len(packed[0]["input_ids"]) == 1
    require_same(packed, padded)
    with pytest.raises(ConfigurationError, match="qwen3 with attention flash_attention_2 does not"):
        require_packed_attention(model, 0, bf16=False)  # several rows: examples see each other


@pytest.mark.parametrize("family", ["bloom", "opt", "mamba", "jamba", "gpt_oss"])
def test_models_that_mix_examples_are_refused(family: str, tmp_path: Path) -> None:
    """No positions; a mask without them; recurrence, strong and weak (3e-4 of the largest logit).

    With weights as small as they are where a training starts from nothing: it shows least there.
    """
    model = tiny_llm(family, vocab_size=VOCABULARY, initializer_range=0.02).train()
    with pytest.raises(ConfigurationError, match=f"{family} with .* set packing to false"):
        trainer_of(model, tmp_path, LossRecipe(), 0)
    assert model.training


def test_positions_that_do_not_start_anew_are_refused() -> None:
    model = tiny_llm("gpt2", vocab_size=VOCABULARY)
    require_packed_attention(model, 0, bf16=False)
    model.transformer.wpe.register_forward_pre_hook(
        lambda module, given: (torch.arange(given[0].shape[-1]).expand_as(given[0]),)
    )
    with pytest.raises(ConfigurationError, match="gpt2 with attention sdpa does not"):
        require_packed_attention(model, 0, bf16=False)


def test_positions_that_the_model_counts_otherwise_are_refused() -> None:
    """Packed examples agree among themselves here, and with none that is alone."""
    model = tiny_llm("gpt2", vocab_size=VOCABULARY)

    def one_later(module: Any, args: Any, given: dict[str, Any]) -> Any:
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + 1
        return args, given

    model.transformer.register_forward_pre_hook(one_later, with_kwargs=True)
    with pytest.raises(ConfigurationError, match="gpt2 with attention sdpa does not"):
        require_packed_attention(model, 0, bf16=False)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_models_that_do_not_are_taken(family: str, bf16: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llm(family, vocab_size=VOCABULARY).to(dtype)
        for size in (0, 16, ONE_ROW):
            require_packed_attention(model, size, bf16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"packing": 4}}, r"data\.packing must be at least 8"),
        ({"data": {"packing": "yes"}}, r"data\.packing must be bool \| int, got 'yes'"),
        (
            {"data": {"packing": 64}, "attention": "flash_attention_2"},
            "as a single row, of any length; set it to true",
        ),
    ],
)
def test_wrong_settings_are_refused(
    changes: dict[str, Any], message: str, merged: Path, cache: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        recipe_of(settings_of(merged, cache, text, tmp_path), **changes)
