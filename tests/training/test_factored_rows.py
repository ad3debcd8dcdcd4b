"""Rows that share their factors' rows: the function, and what learns.

That a run resumes exactly is in test_language_model.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from tests.toy import save_llm, tiny_image_tokenizer
from training.adapters import add_adapter, is_adapter_row
from training.factored_head import factored_head
from training.factored_rows import FACTOR_ROWS, folded, share_rows, unseen_combinations
from training.language_model import load_model
from training.recipes import (
    DIRECTIONS,
    LanguageModelRecipe,
    LoraRecipe,
    LossRecipe,
    OptimizerRecipe,
    build_recipe,
)
from training.trainer import UnimodalTrainer, training_arguments
from unimodal.merge import merge
from unimodal.processing_unimodal import UnimodalProcessor

LEVELS = [4, 3]
FACTORS = np.array([[code % 4, 4 + code // 4] for code in range(12)])


@pytest.fixture(scope="module", params=["tied", "untied", "tied, row ends"])
def parts(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_llm(folder / "llm", tied=request.param != "untied")
    tiny_image_tokenizer(quantizer_type="fsq", fsq_levels=LEVELS).save_pretrained(folder / "it")
    row_ends = 2 if request.param == "tied, row ends" else 0
    merge(folder / "llm", folder / "it", folder / "merged", row_ends=row_ends)
    return folder


def recipe_of(parts: Path, **settings: Any) -> LanguageModelRecipe:
    content = {"model": str(parts / "merged"), "output_dir": str(parts / "run"), **settings}
    return build_recipe(LanguageModelRecipe, {"dtype": "float32", "attention": "eager", **content})


def adapted(parts: Path, shares: np.ndarray) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    vocabulary = UnimodalProcessor.from_pretrained(parts / "merged").vocabulary
    model = load_model(parts / "merged", recipe_of(parts))
    model = add_adapter(model, vocabulary, LoraRecipe(rank=2))
    return model, vocabulary, share_rows(model, FACTORS, shares)


def test_a_code_gets_its_own_row_and_the_sum_of_its_factors(parts: Path) -> None:
    model, vocabulary, _ = adapted(parts, np.ones(12))
    ids = torch.arange(vocabulary.vocab_size)[None]
    before = model(input_ids=ids).logits
    names = [name for name, p in model.named_parameters() if is_adapter_row(name)]
    shared = [p for name, p in model.named_parameters() if name.endswith(FACTOR_ROWS)]
    assert len(shared) == len(names) / 2 and all(p.shape == (7, 32) for p in shared)
    base_model = load_model(parts / "merged", recipe_of(parts))
    torch.testing.assert_close(before, base_model(input_ids=ids).logits)  # all have their own part
    started = [one.detach().clone() for one in shared]
    for one in shared:
        torch.nn.init.normal_(one)
    changed = model(input_ids=ids).logits
    assert not torch.allclose(before, changed)
    embedding = model.get_input_embeddings().weight
    base = model.get_input_embeddings().original_module.weight
    codes = slice(vocabulary.offsets[0], vocabulary.offsets[0] + 12)
    moved = (shared[0] - started[0])[FACTORS].sum(1)
    torch.testing.assert_close(embedding[codes], base[codes] + moved)
    controls = vocabulary.control_token_ids
    assert torch.equal(embedding[controls], base[controls])

    with folded(model):
        saved = {name: p.clone() for name, p in get_peft_model_state_dict(model).items()}
    assert not any(FACTOR_ROWS in name for name in saved)
    assert torch.equal(model(input_ids=ids).logits, changed)  # nothing has moved
    plain = add_adapter(
        load_model(parts / "merged", recipe_of(parts)), vocabulary, LoraRecipe(rank=2)
    )
    set_peft_model_state_dict(plain, saved)
    torch.testing.assert_close(plain(input_ids=ids).logits, changed)


def test_only_common_codes_have_a_deviation_of_their_own(parts: Path) -> None:
    shares = np.full(12, 0.03)
    shares[5] = 0.009
    model, vocabulary, _ = adapted(parts, shares)
    embedding = model.get_input_embeddings()
    rows = vocabulary.code_token_ids.start + torch.arange(12)
    start, base = embedding.weight[rows].detach(), embedding.original_module.weight[rows]
    common = np.arange(12) != 5
    torch.testing.assert_close(start[common], base[common])
    # A rare code starts as what its factors' codes have in common with it.
    others = start - start.mean(0)
    row, column = (others.view(3, 4, -1).mean(axis) for axis in (0, 1))
    assert not torch.allclose(start[5], base[5])
    assert (start[5] - start.mean(0)) @ (row[1] + column[1]) > 0
    ids = torch.tensor(vocabulary.new_token_ids)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            controls = vocabulary.num_controls
            assert not parameter.grad[controls + 5].any()
            assert parameter.grad[controls + 4].any() and parameter.grad[:controls].any(1).all()
        elif name.endswith(FACTOR_ROWS):
            assert parameter.grad.any(1).all()


def test_combinations_that_could_be_are_told_from_those_that_could_not() -> None:
    shares = np.ones((3, 4))
    shares[1, 2] = 0  # two values that meet all others
    shares[:2, 3] = 0  # a value that meets one of three only
    found = unseen_combinations(FACTORS, shares.reshape(-1))
    assert [tuple(code) for code in FACTORS[found]] == [(2, 4 + 1)]
    assert not unseen_combinations(FACTORS, np.ones(12)).any()
    opaque = np.arange(4)[:, None]  # VQ: one factor, so nothing could tell what could be
    assert not unseen_combinations(opaque, np.array([1.0, 0, 0, 0])).any()


def test_what_training_never_shows_does_not_count_against_a_code(parts: Path) -> None:
    model, vocabulary, _ = adapted(parts, np.ones(12))
    codes = vocabulary.code_token_ids
    uncounted = torch.zeros(vocabulary.rows, dtype=torch.bool)
    uncounted[codes.start + 7] = True
    args = training_arguments(str(parts / "out"), False, {"max_steps": 1})
    trainer = UnimodalTrainer(
        model, args, [], optimizer=OptimizerRecipe(), is_row=is_adapter_row,
        code_ids=codes, uncounted=uncounted,
    )  # fmt: skip
    text, code = 5, codes.start + 2
    for label, counts in ((code, False), (text, True)):
        seen: list[torch.Tensor] = []
        head = model.get_output_embeddings()
        handle = head.register_forward_hook(lambda m, i, logits: seen.append(logits))  # noqa: B023
        inputs = {
            "input_ids": torch.tensor([[1, label]]),
            "labels": torch.tensor([[-100, label]]),
            "segments": torch.tensor([[0, 0]]),
            "directions": torch.tensor([0]),
            "lengths": torch.tensor([2]),
        }
        loss = trainer.compute_loss(model, inputs)
        handle.remove()
        [gradient] = torch.autograd.grad(loss, seen)
        assert bool(gradient[..., codes.start + 7].any()) == counts
        assert gradient[..., codes.start + 6].any() and torch.isfinite(loss)


def test_the_factored_softmax_is_the_full_one(parts: Path) -> None:
    shares = np.full(12, 0.001)
    shares[3] = 0.5  # a row of its own
    model, vocabulary, rows = adapted(parts, shares)
    codes = vocabulary.code_token_ids
    uncounted = torch.zeros(vocabulary.rows, dtype=torch.bool)
    uncounted[codes.start + 7] = True
    head = factored_head(model, rows, uncounted)
    assert head is not None
    for name, parameter in model.named_parameters():
        if "lora" in name or name.endswith(FACTOR_ROWS):
            torch.nn.init.normal_(parameter, std=0.3)
    labels = [5, codes.start + 3, vocabulary.end_token_id, codes.start + 2, codes.start + 11, 6]
    inputs = {
        "input_ids": torch.tensor([[1, *labels]]),
        "labels": torch.tensor([[-100, *labels]]),
        "segments": torch.tensor([[0] * 7]),
        "directions": torch.tensor([DIRECTIONS.index("text")]),
        "lengths": torch.tensor([7]),
    }
    text_ids = torch.arange(vocabulary.start_token_id)
    found = []
    for used in (head, None):
        trainer = UnimodalTrainer(
            model, training_arguments(str(parts / "out"), False, {"max_steps": 1}), [],
            optimizer=OptimizerRecipe(), loss=LossRecipe(text_kl=0.5), is_row=is_adapter_row,
            code_ids=codes, uncounted=uncounted, factored_head=used, text_ids=text_ids,
        )  # fmt: skip
        model.zero_grad()
        loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
        width = vocabulary.rows - 11 + 7 if used else vocabulary.rows
        assert outputs.logits.shape[-1] == width
    (loss, gradients), (expected, full) = found
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, full, rtol=1e-4, atol=1e-6)
    assert gradients


def test_where_the_factored_softmax_would_not_be_exact_it_is_not_used(parts: Path) -> None:
    model, _, rows = adapted(parts, np.ones(12))
    assert factored_head(model, None) is None
    plain = model.get_base_model()
    forward = plain.forward

    def capped(**inputs: Any) -> Any:  # as Gemma 2 does
        outputs = forward(**inputs)
        outputs.logits = 30 * torch.tanh(outputs.logits / 30)
        return outputs

    assert factored_head(model, rows) is not None
    plain.forward = capped
    assert factored_head(model, rows) is None
    opaque = np.arange(12)[:, None]
    assert share_rows(model, opaque, np.ones(12)) is None
