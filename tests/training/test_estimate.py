"""Estimates against what torch counts, allocates and measures; the dry run; the measured speed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from tests.toy import LLM_FAMILIES, tiny_llm
from tests.training.test_language_model import recipe_of, settings_of
from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
from training.adapters import add_adapter, fold_lora
from training.demo import demo_recipe_file
from training.estimate import (
    Estimate,
    Peak,
    Speedometer,
    count_flops,
    device_peak,
    estimate_recipe,
    fake,
    image_tokenizer_estimate,
    language_model_estimate,
    published_peak,
    traced_bytes,
    without_data,
    wording,
)
from training.image_tokenizer import TokenizerRecipe
from training.language_model import train
from training.recipes import LoraRecipe
from unimodal.processing_unimodal import UnimodalProcessor

B, T, LABELLED, VOCABULARY = 4, 48, 70, 512


def model_of(mode: str, merged: Path, family: str = "qwen3") -> Any:
    wide = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16}
    model = tiny_llm(family, vocab_size=VOCABULARY, **wide)
    model.set_attn_implementation("eager")
    if mode != "full":
        processor = UnimodalProcessor.from_pretrained(merged, load_image_tokenizer=False)
        model = add_adapter(model, processor.vocabulary, LoraRecipe(rank=8))
        if mode == "folded":
            assert fold_lora(model)
    return model


def pass_through(model: Any, backward: bool = True) -> None:
    """One micro-batch, the head at LABELLED positions only."""

    def gather(module: Any, arguments: Any) -> Any:
        return (arguments[0].flatten(0, 1)[:LABELLED][None], *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    ids = torch.randint(0, 200, (B, T))
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    handle.remove()
    if backward:
        labels = ids.flatten()[:LABELLED]
        torch.nn.functional.cross_entropy(logits, labels, reduction="none").sum().backward()


@pytest.mark.parametrize("mode", ["full", "lora", "folded"])
@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_flops_are_those_that_torch_counts(mode: str, family: str, merged: Path) -> None:
    model = model_of(mode, merged, family)
    training, forward = count_flops(model)
    with FlopCounterMode(display=False) as counter:
        pass_through(model)
    ours = training.of(B * T, B * T * T, LABELLED, 1)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)
    if mode != "full":
        with FlopCounterMode(display=False) as counter, torch.no_grad(), model.disable_adapter():
            pass_through(model, backward=False)
        ours = forward.of(B * T, B * T * T, LABELLED, 0)
        assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_lora_saves_the_weight_gradients(merged: Path) -> None:
    full, lora, folded = (count_flops(model_of(m, merged))[0] for m in ("full", "lora", "folded"))
    assert lora.token < full.token == folded.token
    assert folded.micro_batch > 0 == full.micro_batch


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["full", "folded"])
def test_traced_memory_is_what_torch_allocates(mode: str, attention: str, merged: Path) -> None:
    """The allocator's own record, by the profiler, of a step with real numbers.

    Measured: 0.5 % apart with eager attention, 5 % with SDPA, whose kernels round up their buffers
    in another way on fake tensors.
    """
    model = model_of(mode, merged)
    model.set_attn_implementation(attention)
    pass_through(model)  # gradients are there already
    with torch.profiler.profile(profile_memory=True) as profile:
        pass_through(model)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    with without_data():
        copy = model_of(mode, merged)
        copy.set_attn_implementation(attention)
    with fake(copy):
        traced = traced_bytes(copy, (B, T), LABELLED, bf16=False)
    assert traced == pytest.approx(peak, rel=0.02 if attention == "eager" else 0.06)
    assert all(p.numel() for p in copy.parameters())


def test_tokenizer_flops_are_those_that_torch_counts(tmp_path: Path) -> None:
    values = {"image_size": 32, "base_channels": 16, "channel_multiplier": [1, 2]}
    values |= {"quantizer_type": "fsq", "num_res_blocks": 1}
    recipe = TokenizerRecipe(data=["x"], output_dir="y", tokenizer=values, batch_size=4)
    estimate = image_tokenizer_estimate(recipe, 100)
    model = ImageTokenizer(ImageTokenizerConfig(**values)).train()
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(4, 3, 32, 32)).loss.backward()
    assert estimate.flops_per_step == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert sum(estimate.parameters.values()) == sum(p.numel() for p in model.parameters())


def test_palette_tokenizers_learn_nothing_by_gradient() -> None:
    values = {"encoder_type": "palette", "decoder_type": "palette", "quantizer_type": "product"}
    recipe = TokenizerRecipe(data=["x"], output_dir="y", tokenizer=values, batch_size=4)
    estimate = image_tokenizer_estimate(recipe, 100)
    assert estimate.trained == estimate.memory["gradients"] == 0
    assert estimate.flops_per_step > 0


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_reaches_what_its_estimate_counts(
    mode: str, merged: Path, cache: Path, text: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(settings_of(merged, cache, text, tmp_path / "run"), mode=mode)
    estimate = language_model_estimate(recipe)
    facts = json.loads((train(recipe) / "run.json").read_text())
    assert facts["timed_steps"] == 7  # the first of 8 is start-up
    assert facts["peak_source"].startswith("measured here")
    assert 0 < facts["share_of_peak"] < 1
    share = facts["achieved_flops_per_second"] / facts["peak_flops_per_second"]
    assert facts["share_of_peak"] == pytest.approx(share, abs=1e-6)
    seconds_a_step = estimate.flops_per_step / facts["achieved_flops_per_second"]
    tokens_a_step = facts["tokens_per_second"] * seconds_a_step
    assert tokens_a_step == pytest.approx(estimate.tokens_per_step, rel=0.15)
    assert estimate.examples_per_step == 8 and estimate.steps == 8
    if mode == "lora":
        assert estimate.trained == estimate.parameters["adapter"]
        four_bits = language_model_estimate(dataclasses.replace(recipe, mode="qlora"))
        assert four_bits.memory["weights"] < estimate.memory["weights"]


def test_packing_saves_memory_and_no_work(merged: Path, cache: Path, text: Path) -> None:
    settings = settings_of(merged, cache, text, Path("/nowhere"))
    step = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    padded, packed = (
        language_model_estimate(
            recipe_of(settings, data={**settings["data"], "packing": packing}, training=step)
        )
        for packing in (False, True)
    )
    assert packed.flops_per_step == padded.flops_per_step
    assert (packed.examples_per_step, packed.tokens_per_step) == (16, padded.tokens_per_step)
    assert packed.memory["activations"] < 0.9 * padded.memory["activations"]


def test_text_kl_costs_another_forward_pass(merged: Path, cache: Path, text: Path) -> None:
    settings = settings_of(merged, cache, text, Path("/nowhere"))
    plain, held = (
        language_model_estimate(recipe_of(settings, loss={"text_kl": kl})).flops_per_step
        for kl in (0.0, 1.0)
    )
    assert 1.005 * plain < held < 1.5 * plain


def test_the_clock_leaves_out_the_first_step_and_the_checkpoints(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr("training.estimate.time.perf_counter", lambda: next(now))
    monkeypatch.setattr("training.estimate.device_peak", lambda *_: Peak(1e6, "here"))
    meter = Speedometer(model_of("full", merged), "cpu", False)
    lengths, labelled = torch.tensor([4, 2]), torch.tensor(3)
    meter.add(lengths, labelled)
    meter.step()  # the clock starts: 0
    assert meter.facts() == {}
    meter.add(lengths, labelled)
    meter.step()
    with meter.paused():  # stops at 10, goes on at 20
        pass
    meter.stop()  # at 30
    facts = meter.facts()
    assert meter.seconds == 20 and facts["timed_steps"] == 1
    flops = count_flops(model_of("full", merged))[0].of(6, 20, 3, 1)
    assert facts["achieved_flops_per_second"] == round(flops / 20)
    assert facts["tokens_per_second"] == 0.3


def test_peaks() -> None:
    for name, flops in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ):
        found = published_peak(name)
        assert found is not None and found.flops_per_second == flops
    assert published_peak("NVIDIA L40S") is None
    assert 1e8 < device_peak("cpu", False).flops_per_second < 1e14


def test_what_does_not_fit_is_said() -> None:
    parts = {"weights": 3 * 2**30}
    one = Estimate("lora", {"layers": 10**6}, 10**6, 10, 8, 100, "8 texts", 1e12, parts)
    assert not any("WARNING" in line for line in one.lines(Peak(1e12, ""), 0.5, 4 * 2**30))
    told = one.lines(Peak(1e12, ""), 0.5, int(3.5 * 2**30))
    assert "3 GiB do not fit" in told[-1] and "per_device_train_batch_size" in told[-1]
    assert "20 s at 50%" in "\n".join(told)
    assert next(iter(wording([one], "H100"))).startswith("peak: 989 TFLOP/s")
    with pytest.raises(ConfigurationError, match="peak is 'fast'"):
        list(wording([one], "fast"))


def test_estimate_of_any_recipe(
    merged: Path, cache: Path, text: Path, pictures: Path, tmp_path: Path
) -> None:
    def of(content: dict[str, Any]) -> Estimate:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(content))
        (found,) = estimate_recipe(file, ["output_dir=/nowhere"])
        return found

    settings = settings_of(merged, cache, text, tmp_path)
    assert of(settings).stage == "lora"
    shape = {"image_size": 16, "channel_multiplier": [1, 1]}
    tokenizer = {"data": [str(pictures)], "tokenizer": shape, "held_out": 4, "num_pictures": 9}
    assert of(tokenizer).data.startswith("9 pictures")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16}
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    words = {"tokenizer": str(merged), "text": [str(text)], "config": sizes}
    found = of({**words, "training": {"max_steps": 3}})
    assert found.stage == "text_model" and found.examples_per_step == 64
    shipped = {"start": "shipped:text_model", "text": [str(text)], "training": {"max_steps": 3}}
    assert of(shipped).flops_per_step > 20 * found.flops_per_step


def test_the_gpu_recipe_goes_through_in_miniature(tmp_path: Path) -> None:
    """With its models cut down; all its other settings are used as they are."""
    content = yaml.safe_load(demo_recipe_file("gpu").read_text())
    content["text_model"]["config"] |= {"hidden_size": 64, "intermediate_size": 96}
    content["text_model"]["config"] |= {"num_hidden_layers": 2, "num_attention_heads": 1}
    content["text_model"]["config"] |= {"num_key_value_heads": 1}
    content["image_tokenizer"]["tokenizer"] |= {"base_channels": 8}
    file = tmp_path / "demo.yaml"
    file.write_text(yaml.safe_dump(content))
    found = estimate_recipe(file)
    assert [one.stage for one in found] == ["image_tokenizer", "text_model", "lora"]
    assert [one.steps for one in found] == [20_000, 8_000, 8_000]
    assert found[2].examples_per_step * found[2].steps >= 10**6
    assert found[0].data.startswith("200,000 pictures")
    content["lora"]["lora"]["rnak"] = 3
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigurationError, match=r"lora\.lora has no field 'rnak'|'rnak'"):
        estimate_recipe(file)
