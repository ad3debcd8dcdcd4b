"""Folding an adapter into a plain folder: the same logits, the same text rows, still tied."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.toy import toy_merged_folder
from tokenizer_hf.errors import CheckpointError, ConfigurationError, MismatchError
from tokenizer_hf.vocabulary import ImageVocabulary
from training.adapters import add_adapter, fold_lora, is_adapter_row, merge_adapter
from training.recipes import LoraRecipe
from unimodal.pipeline import Unimodal
from unimodal.processing_unimodal import UnimodalProcessor


def vocabulary_of(folder: Path) -> ImageVocabulary:
    return UnimodalProcessor.from_pretrained(folder, load_image_tokenizer=False).vocabulary


def make_adapter(base: Path, out: Path, *, norms: bool = False) -> Path:
    """An adapter with random LoRA matrices, rows and, if asked, norms, as a run would save it."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = add_adapter(plain, vocabulary_of(base), LoraRecipe(rank=4), norms=norms)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(str(out), save_embedding_layers=False)
    return out


def logits_of(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    ids = torch.randint(0, 200, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture
def base(merged: Path, tmp_path: Path) -> Path:
    """A copy of the merged folder that a test may move."""
    return Path(shutil.copytree(merged, tmp_path / "base"))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("family", "tied"),
    [("qwen3", True), ("llama", False), ("gemma3_text", True), ("gpt_neox", False)],
)
def test_merged_logits_are_the_adapters(
    family: str, tied: bool, norms: bool, tmp_path: Path
) -> None:
    folder = toy_merged_folder(tmp_path, family, tied=tied)
    adapter = make_adapter(folder, tmp_path / "adapter", norms=norms)
    result = merge_adapter(adapter, tmp_path / "out")
    expected = logits_of(folder, adapter)
    assert (expected - logits_of(folder)).abs().max() > 0.05  # the adapter does something
    torch.testing.assert_close(logits_of(result.folder), expected, atol=1e-4, rtol=0)
    assert result.max_logit_difference < 1e-4
    before = AutoModelForCausalLM.from_pretrained(folder)
    after = AutoModelForCausalLM.from_pretrained(result.folder)
    assert after.config.tie_word_embeddings is tied
    vectors = {name for name, p in before.named_parameters() if p.ndim == 1 and "norm" in name}
    now = dict(after.named_parameters())
    changed_vectors = {n for n, p in before.named_parameters() if (p != now[n]).any()} & vectors
    assert changed_vectors == (vectors if norms else set()) and vectors
    vocabulary = vocabulary_of(folder)
    for one, other in (
        (before.get_input_embeddings(), after.get_input_embeddings()),
        (before.get_output_embeddings(), after.get_output_embeddings()),
    ):
        changed = torch.nonzero((one.weight != other.weight).any(1)).flatten().tolist()
        assert changed == vocabulary.new_token_ids
    if not tied:
        a = after.get_output_embeddings().weight[vocabulary.new_token_ids]
        assert not torch.equal(a, after.get_input_embeddings().weight[vocabulary.new_token_ids])


def test_a_merged_folder_is_whole(base: Path, tmp_path: Path) -> None:
    result = merge_adapter(make_adapter(base, tmp_path / "adapter"), tmp_path / "out")
    names = {file.name for file in base.iterdir()}
    assert {file.name for file in result.folder.iterdir()} == names
    assert "untrained" in (base / "README.md").read_text()
    card = (result.folder / "README.md").read_text()
    assert "untrained" not in card and "an adapter, folded into the weights" in card
    assert len(Unimodal.from_pretrained(result.folder).draw("a red circle", seed=0)) == 1


def test_bfloat16_keeps_text_rows_and_tells_the_difference(tmp_path: Path) -> None:
    folder = toy_merged_folder(tmp_path, dtype=torch.bfloat16)
    adapter = make_adapter(folder, tmp_path / "adapter")
    result = merge_adapter(adapter, tmp_path / "out")
    assert json.loads((result.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert 1e-4 < result.max_logit_difference < 0.5
    exact = merge_adapter(adapter, tmp_path / "exact", dtype="float32")
    assert exact.max_logit_difference < 1e-4


def test_a_missing_base_is_named_and_can_be_given(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"base of .*adapter is missing: .*base.*--base"):
        merge_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert merge_adapter(adapter, tmp_path / "out", base=moved).max_logit_difference < 1e-4


def test_a_run_from_before_there_were_row_ends_is_merged(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    values = vocabulary_of(base).to_dict()
    for new in ("row_length", "row_ends", "row_end_string", "row_end_token_id"):
        del values[new]
    (adapter / "run.json").write_text(json.dumps({"image_vocabulary": values}))
    assert merge_adapter(adapter, tmp_path / "out").max_logit_difference < 1e-4
    values = {**values, "row_length": 2, "row_ends": 1, "row_end_token_id": 5}
    (adapter / "run.json").write_text(json.dumps({"image_vocabulary": values}))
    with pytest.raises(MismatchError, match="or other ids"):
        merge_adapter(adapter, tmp_path / "again")


def test_a_base_with_other_weights_is_told(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    (adapter / "run.json").write_text(json.dumps({"identity": {"model": "0" * 64}}))
    merge_adapter(adapter, tmp_path / "out")
    assert "not those that the adapter was trained on" in caplog.text


def test_wrong_folders_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="is no adapter"):
        merge_adapter(base, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="--out"):
        merge_adapter(adapter, base)
    with pytest.raises(CheckpointError, match="not a merged model"):
        llm = tmp_path / "llm"
        shutil.copytree(base, llm, ignore=shutil.ignore_patterns("processor_config.json"))
        merge_adapter(adapter, tmp_path / "out", base=llm)
    with pytest.raises(MismatchError, match="does not fit the base"):
        merge_adapter(
            adapter, tmp_path / "out", base=toy_merged_folder(tmp_path / "other", "gpt_neox")
        )
    run = {"image_vocabulary": {**vocabulary_of(base).to_dict(), "fingerprint": "f" * 64}}
    (adapter / "run.json").write_text(json.dumps(run))
    with pytest.raises(MismatchError, match="ffffffffffffffff"):
        merge_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folded_lora_has_pefts_outputs_and_gradients(merged: Path) -> None:
    ids = torch.randint(0, 300, (4, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for folded in (False, True):
        model: Any = AutoModelForCausalLM.from_pretrained(merged)
        model = add_adapter(model, vocabulary_of(merged), LoraRecipe(rank=4, alpha=8))
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        if folded:
            assert fold_lora(model) == 14
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((logits.detach(), gradients))
    (plain, plain_gradients), (fold, fold_gradients) = found
    torch.testing.assert_close(fold, plain, atol=1e-5, rtol=1e-5)
    assert plain_gradients.keys() == fold_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(fold_gradients[name], gradient, atol=1e-6, rtol=1e-4)
    assert any(is_adapter_row(name) for name in fold_gradients)
