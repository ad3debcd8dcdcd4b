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
from training.factored_rows import FACTOR_ROWS, folded, share_rows, unseen_combinations
from training.language_model import load_model
from training.recipes import LanguageModelRecipe, LoraRecipe, OptimizerRecipe, build_recipe
from training.trainer import UnimodalTrainer, training_arguments
from unimodal.merge import merge
from unimodal.processing_unimodal import UnimodalProcessor

LEVELS = [4, 3]
FACTORS = np.array([[code % 4, 4 + code // 4] for code in range(12)])


@pytest.fixture(scope="module", params=["tied", "untied"])
def parts(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_llm(folder / "llm", tied=request.param == "tied")
    tiny_image_tokenizer(quantizer_type="fsq", fsq_levels=LEVELS).save_pretrained(folder / "it")
    merge(folder / "llm", folder / "it", folder / "merged")
    return folder


def recipe_of(parts: Path, **settings: Any) -> LanguageModelRecipe:
    content = {"model": str(parts / "merged"), "output_dir": str(parts / "run"), **settings}
    return build_recipe(LanguageModelRecipe, {"dtype": "float32", "attention": "eager", **content})


def adapted(parts: Path, shares: np.ndarray) -> tuple[Any, Any]:
    torch.manual_seed(0)
    vocabulary = UnimodalProcessor.from_pretrained(parts / "merged").vocabulary
    model = load_model(parts / "merged", recipe_of(parts))
    model = add_adapter(model, vocabulary, LoraRecipe(rank=2))
    share_rows(model, FACTORS, shares)
    return model, vocabulary


def test_a_code_gets_its_own_row_and_the_sum_of_its_factors(parts: Path) -> None:
    model, vocabulary = adapted(parts, np.ones(12))
    ids = torch.arange(vocabulary.vocab_size)[None]
    before = model(input_ids=ids).logits
    names = [name for name, p in model.named_parameters() if is_adapter_row(name)]
    shared = [p for name, p in model.named_parameters() if name.endswith(FACTOR_ROWS)]
    assert len(shared) == len(names) / 2 and all(p.shape == (7, 32) for p in shared)
    for one in shared:
        torch.nn.init.normal_(one)
    changed = model(input_ids=ids).logits
    assert not torch.allclose(before, changed)
    embedding = model.get_input_embeddings().weight
    base = model.get_input_embeddings().original_module.weight
    codes = slice(vocabulary.offsets[0], vocabulary.offsets[0] + 12)
    expected = base[codes] + shared[0][FACTORS[:, 0]] + shared[0][FACTORS[:, 1]]
    torch.testing.assert_close(embedding[codes], expected)
    start = vocabulary.start_token_id
    assert torch.equal(embedding[start : start + 2], base[start : start + 2])

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
    model, vocabulary = adapted(parts, shares)
    ids = torch.tensor(vocabulary.new_token_ids)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            assert not parameter.grad[2 + 5].any()
            assert parameter.grad[2 + 4].any() and parameter.grad[:2].any()
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
    model, vocabulary = adapted(parts, np.ones(12))
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
