"""`unimodal quantize`: what is written, that transformers reads it, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.toy import nested_image_tokenizer, save_llm
from tokenizer_hf.errors import CheckpointError, ConfigurationError
from unimodal.merge import merge
from unimodal.pipeline import Unimodal

quantization = pytest.importorskip(
    "compressed_tensors.quantization", reason="compressed-tensors (of the serve extras) is missing"
)
from unimodal.quantize import quantize, quantized_linear  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 2}


def merged(base: Path, family: str = "qwen3", **changes: Any) -> Path:
    llm = save_llm(base / "llm", family, **{**SIZES, "num_key_value_heads": 1, **changes})
    nested_image_tokenizer().save_pretrained(base / "it")
    return merge(llm, base / "it", base / "merged")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merged(tmp_path_factory.mktemp("quantize"), max_shard_size="100KB")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def logits_of(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 400, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(("scheme", "error"), [("W8A8", 0.5 / 127), ("W4A16", 0.5 / 7.5)])
def test_linear_weights_are_rounded_and_all_else_is_as_it_was(
    folder: Path, tmp_path: Path, scheme: str, error: float
) -> None:
    out = quantize(folder, tmp_path / "q", scheme)
    before, after = weights_of(folder), weights_of(out)
    linear = {name for name in before if "proj" in name}
    assert len(linear) == 14 and len(list(out.glob("model-*"))) > 1
    for name in before.keys() - linear:
        assert torch.equal(before[name], after[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        loaded(input_ids=torch.tensor([[1, 2]]))  # transformers unpacks at the first forward
    for name in linear:
        now = loaded.get_parameter(name)
        groups = before[name].reshape(len(now), -1, 32 if scheme == "W4A16" else now.shape[1])
        bound = groups.abs().amax(-1, keepdim=True) * error * 1.01
        assert ((now.reshape(groups.shape) - groups).abs() <= bound).all(), name
        assert not torch.equal(now, before[name])
    kind = torch.int8 if scheme == "W8A8" else torch.int32
    assert sum(value.dtype == kind for value in after.values()) == 14
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert scheme in (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["ignore"]) == ("compressed-tensors", ["lm_head"])


def test_transformers_rounds_the_activations_of_w8a8_too(folder: Path, tmp_path: Path) -> None:
    """So that `unimodal evaluate` measures what vLLM computes, not only the weights' error."""
    out = quantize(folder, tmp_path / "q", "W8A8")
    scheme = quantization.preset_name_to_scheme("W8A8", ["Linear"])
    scheme.format = "int-quantized"
    plain = shutil.copytree(folder, tmp_path / "plain")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                parts = quantized_linear(weight, scheme)
                weight.copy_(parts["weight"].float() * parts["weight_scale"])
    for file in plain.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(plain)
    exact, weights_only, both = logits_of(folder), logits_of(plain), logits_of(out)
    largest = exact.abs().max()
    assert 0 < (weights_only - exact).abs().max() < 0.1 * largest
    assert 1e-3 < (both - weights_only).abs().max() < 0.1 * largest


def test_a_quantized_model_draws_and_captions(folder: Path, tmp_path: Path) -> None:
    model = Unimodal.from_pretrained(quantize(folder, tmp_path / "q", "W4A16"), device="cpu")
    [picture] = model.draw("a red circle", seed=1)
    assert isinstance(model.caption(picture, max_new_tokens=4), str)


def test_an_untied_head_and_a_prefixless_checkpoint(tmp_path: Path) -> None:
    folder = merged(tmp_path, "gpt_neox", tied=False)
    before = weights_of(folder)
    after = weights_of(quantize(folder, tmp_path / "q", "W8A8"))
    assert torch.equal(before["embed_out.weight"], after["embed_out.weight"])
    assert torch.equal(before["gpt_neox.embed_in.weight"], after["gpt_neox.embed_in.weight"])
    name = "gpt_neox.layers.0.attention.dense"
    assert after[f"{name}.weight"].dtype == torch.int8
    assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])
    assert (logits_of(tmp_path / "q") - logits_of(folder)).abs().max() < 1


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="W8A8, W4A16"):
        quantize(folder, tmp_path / "q", "W2A2")
    with pytest.raises(ConfigurationError, match="only W4A16"):
        quantize(folder, tmp_path / "q", "W8A8", group_size=32)
    with pytest.raises(ConfigurationError, match="64, 96 inputs; expected one of 32"):
        quantize(folder, tmp_path / "q", "W4A16", group_size=64)
    with pytest.raises(ConfigurationError, match="holds the source"):
        quantize(folder, folder, "W8A8")
    with pytest.raises(CheckpointError, match="processor_config"):
        quantize(folder.parent / "llm", tmp_path / "q", "W8A8")
    once = quantize(folder, tmp_path / "once", "W8A8")
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize(once, tmp_path / "q", "W8A8")
    narrow = merged(tmp_path / "narrow", intermediate_size=48)
    with pytest.raises(ConfigurationError, match="multiples of 32"):
        quantize(narrow, tmp_path / "q", "W4A16")
    assert not (tmp_path / "q").exists()
