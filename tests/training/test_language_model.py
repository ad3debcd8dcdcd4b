"""The trainer: HF's loss, exact resuming, whole checkpoints, three modes, clear refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from tests.toy import LLM_FAMILIES, tiny_llm
from tokenizer_hf.errors import CheckpointError, ConfigurationError, DataError, MismatchError
from training import language_model, recipes
from training.adapters import add_adapter, fold_lora, is_adapter_row
from training.data.code_cache import CodeCache
from training.language_model import load_model, table_names, train
from training.optimizer import make_optimizer, orthogonalise
from training.precision import bf16_is_faster
from training.recipes import (
    DataRecipe,
    LanguageModelRecipe,
    LoraRecipe,
    OptimizerRecipe,
    TextModelRecipe,
    build_recipe,
    load_recipe,
    recipe_to_dict,
    save_recipe,
)
from training.trainer import labelled_positions, last_whole_checkpoint, training_arguments
from unimodal.pipeline import Unimodal
from unimodal.processing_unimodal import UnimodalProcessor


def settings_of(merged: Path, cache: Path, text: Path, output_dir: Path) -> dict[str, Any]:
    """A recipe of 8 steps."""
    return {
        "model": str(merged),
        "output_dir": str(output_dir),
        "bf16": False,
        "data": {"caches": [str(cache)], "text": [str(text)]},
        "lora": {"rank": 4},
        "training": {
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "save_steps": 3,
            "logging_steps": 1,
            "disable_tqdm": True,
        },
    }


@pytest.fixture
def settings(merged: Path, cache: Path, text: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of 8 steps whose run has not begun."""
    return settings_of(merged, cache, text, tmp_path / "run")


@pytest.fixture(scope="module")
def finished_run(
    merged: Path, cache: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of that recipe's run, to be copied and not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return train(
        recipe_of(settings_of(merged, cache, text, folder), training={"save_total_limit": None})
    )


@pytest.fixture
def finished(finished_run: Path, settings: dict[str, Any]) -> Path:
    """A copy of the finished run, where ``settings`` want theirs."""
    return Path(shutil.copytree(finished_run, settings["output_dir"]))


def recipe_of(settings: dict[str, Any], **changes: Any) -> LanguageModelRecipe:
    merged = {**settings, **changes}
    merged["training"] = {**settings["training"], **changes.get("training", {})}
    return build_recipe(LanguageModelRecipe, merged)


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (Path(folder) / name).is_file():
            return load_file(Path(folder) / name)
    raise AssertionError(f"no weights in {folder}")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- loss ---


@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_loss_at_labelled_positions_is_the_models_loss(family: str) -> None:
    model = tiny_llm(family, vocab_size=50)
    input_ids = torch.randint(1, 50, (3, 11))
    labels = input_ids.masked_fill(torch.rand(3, 11) < 0.5, -100)
    expected = model(input_ids=input_ids, labels=labels).loss
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    learnt = labels[:, 1:] != -100
    with labelled_positions(model, learnt):
        logits = model(input_ids=input_ids).logits
    assert logits.shape[:2] == (1, int(learnt.sum()))
    loss = torch.nn.functional.cross_entropy(logits[0].float(), labels[:, 1:][learnt])
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(
        (p.grad for p in model.parameters() if p.grad is not None), gradients, strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert model(input_ids=input_ids).logits.shape == (3, 11, 50)  # the hook is gone


def test_padding_without_a_mask_changes_nothing() -> None:
    model = tiny_llm("qwen3", vocab_size=50)
    ids = torch.randint(1, 50, (1, 7))
    padded = torch.cat((ids, torch.zeros(1, 5, dtype=torch.int64)), dim=1)
    both = torch.cat((padded, torch.randint(1, 50, (1, 12))))
    torch.testing.assert_close(
        model(input_ids=both).logits[0, :7], model(input_ids=ids).logits[0], atol=1e-5, rtol=0
    )


def test_logged_loss_is_hfs_over_the_whole_step(settings: dict[str, Any], merged: Path) -> None:
    """One step of 2 micro-batches: the loss is the mean over the tokens of both together."""
    seen: list[tuple[list[int], list[int]]] = []
    plain = language_model.UnimodalTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen.extend(zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True))
        return plain(self, model, inputs, *args, **kwargs)

    language_model.UnimodalTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    try:
        train(recipe_of(settings, training={"max_steps": 1}))
    finally:
        language_model.UnimodalTrainer.compute_loss = plain  # type: ignore[method-assign]
    model = AutoModelForCausalLM.from_pretrained(merged)
    total = tokens = 0.0
    for input_ids, labels in seen:
        kept = torch.tensor([labels])
        count = int((kept[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=torch.tensor([input_ids]), labels=kept).loss) * count
        tokens += count
    [entry] = metrics(settings["output_dir"])
    assert len(seen) == 8
    assert entry["loss"] == pytest.approx(total / tokens, rel=1e-5)
    parts = [name for name in entry if name.startswith("loss_")]
    assert {"loss_draw", "loss_caption"} <= set(parts)


def test_loss_weights_and_text_kl(settings: dict[str, Any]) -> None:
    recipe = recipe_of(
        settings,
        loss={"weights": {"draw": 0.0, "caption": 0.0, "question": 0.0}, "text_kl": 0.5},
        data={**settings["data"], "weights": {"draw": 1, "text": 1}},
    )
    train(recipe)
    log = metrics(recipe.output_dir)
    first = log[0]
    assert first["text_kl"] == pytest.approx(0, abs=1e-6)  # LoRA's B is 0, the rows are the base's
    assert log[-1]["text_kl"] > 1e-5
    share = first["loss"] / first["loss_text"]
    assert 0.1 < share < 0.9  # the drawing tokens weigh nothing and still count as tokens


def test_a_disabled_adapter_is_the_base(merged: Path) -> None:
    processor = UnimodalProcessor.from_pretrained(merged, load_image_tokenizer=False)
    base = AutoModelForCausalLM.from_pretrained(merged)
    ids = torch.randint(0, processor.vocabulary.vocab_size, (2, 9))
    expected = base(input_ids=ids).logits
    model = add_adapter(base, processor.vocabulary, LoraRecipe(rank=4), norms=True)
    fold_lora(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    assert not torch.allclose(model(input_ids=ids).logits, expected, atol=0.1)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected)


# --- resuming ---


class StopAt(TrainerCallback):
    """Stops a run as a kill does: with an exception in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise MemoryError("killed")


MODES = {
    "lora": {"lora": {"rank": 4, "dropout": 0.1}},
    "folded": {"lora": {"rank": 4}, "loss": {"text_kl": 0.2}},
    "full": {"mode": "full", "optimizer": {"name": "muon", "rows_first_steps": 4}},
    "factored": {
        "lora": {"rank": 4, "rows": "factored"},
        "optimizer": {"norms_learning_rate": 1.0e-2},
    },
    "qlora": {"mode": "qlora", "lora": {"rank": 4}},
    "packed": {
        "loss": {"text_kl": 0.2},
        "data": {"packing": 96, "curriculum": {"steps": 15, "weights": {"caption": 1, "text": 2}}},
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", list(MODES))
def test_a_resumed_run_equals_an_uninterrupted_one(
    mode: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"max_steps": 20, "save_steps": 6, "logging_steps": 2}
    changes = {**MODES[mode], "data": {**settings["data"], **MODES[mode].get("data", {})}}
    whole = recipe_of(settings, **changes, training=steps)
    train(whole)
    stopped = recipe_of(settings, **changes, training=steps, output_dir=str(tmp_path / "stopped"))
    plain = language_model.run_to_the_end

    def stopping(trainer: Any, output_dir: Path) -> None:
        trainer.add_callback(StopAt(15))
        plain(trainer, output_dir)

    with monkeypatch.context() as patched:
        patched.setattr(language_model, "run_to_the_end", stopping)
        with pytest.raises(MemoryError):
            train(stopped)
    assert last_whole_checkpoint(stopped.output_dir) == Path(stopped.output_dir) / "checkpoint-12"
    train(stopped)
    assert equal(weights(whole.output_dir), weights(stopped.output_dir))
    assert metrics(whole.output_dir) == metrics(stopped.output_dir)
    assert [entry["step"] for entry in metrics(whole.output_dir)][-1] == 20


def test_half_written_checkpoints_are_passed_over(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = finished
    assert last_whole_checkpoint(folder) == folder / "checkpoint-8"
    (folder / "checkpoint-8" / "optimizer.pt").unlink()
    (folder / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"")
    assert last_whole_checkpoint(folder) == folder / "checkpoint-3"
    assert "checkpoint-8 is half written (no optimizer.pt)" in caplog.text
    assert not list(folder.glob(".saving-*"))


def test_a_failed_save_leaves_no_checkpoint(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(self: Any, output_dir: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(language_model.UnimodalTrainer, "_save_rng_state", full_disk)
    with pytest.raises(OSError, match="No space"):
        train(recipe_of(settings))
    folder = Path(settings["output_dir"])
    assert last_whole_checkpoint(folder) is None
    assert not list(folder.glob("checkpoint-*")) and not list(folder.glob(".saving-*"))
    assert not (folder / "adapter_config.json").exists()


def test_a_finished_run_is_not_run_again(settings: dict[str, Any], finished: Path) -> None:
    folder = finished
    before = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    train(recipe_of(settings))
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_another_recipe_is_refused_in_the_same_folder(
    settings: dict[str, Any], finished: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"lora\.rank: now 8, there 4.*--resume never"):
        train(recipe_of(settings, lora={"rank": 8}))
    train(recipe_of(settings, training={"logging_steps": 5}))  # changes nothing that is computed
    folder = train(recipe_of(settings, lora={"rank": 8}), resume=False)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8


def test_a_run_that_never_got_anywhere_blocks_nothing(settings: dict[str, Any]) -> None:
    broken = recipe_of(settings, data={**settings["data"], "caches": ["no-such-folder"]})
    with pytest.raises(CheckpointError, match="no-such-folder"):
        train(broken)
    assert (train(recipe_of(settings)) / "adapter_config.json").is_file()


def test_a_direction_of_weight_0_need_not_fit(settings: dict[str, Any]) -> None:
    short = {**settings["data"], "max_length": 16, "weights": {"text": 1, "caption": 0}}
    assert (train(recipe_of(settings, data=short)) / "adapter_config.json").is_file()
    with pytest.raises(DataError, match="every caption example is longer"):
        train(recipe_of(settings, data={**short, "weights": {"caption": 1}}), resume=False)


def test_changed_data_are_refused(settings: dict[str, Any], finished: Path, text: Path) -> None:
    before = text.read_text()
    text.write_text(before + '{"text": "one more"}\n')
    try:
        with pytest.raises(ConfigurationError, match="the data files have changed"):
            train(recipe_of(settings))
    finally:
        text.write_text(before)


def test_ctrl_c_saves_and_says_how_to_go_on(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(settings, training={"max_steps": 5000, "save_steps": 2000})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    code = (
        "from training.language_model import train; from training.recipes import *; "
        f"train(load_recipe(LanguageModelRecipe, {str(tmp_path / 'recipe.yaml')!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    runs = Path(recipe.output_dir) / "runs"
    deadline = time.monotonic() + 300
    while not list(runs.rglob("events*")) and time.monotonic() < deadline:
        time.sleep(0.2)  # TensorBoard's file appears when the first step begins
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "run the same command again to go on" in output
    checkpoint = last_whole_checkpoint(recipe.output_dir)
    assert checkpoint is not None and f"step {checkpoint.name.split('-')[1]} of 5000" in output


# --- what is trained ---


def test_lora_trains_layers_and_rows_only(finished_run: Path, merged: Path) -> None:
    folder = finished_run
    saved = weights(folder)
    rows = [name for name in saved if is_adapter_row(name)]
    assert len(rows) == 1 and all("lora_" in name for name in saved if name not in rows)
    processor = UnimodalProcessor.from_pretrained(merged, load_image_tokenizer=False)
    assert saved[rows[0]].shape[0] == len(processor.vocabulary.new_token_ids) == 18
    base = AutoModelForCausalLM.from_pretrained(merged)
    plain = PeftModel.from_pretrained(base, str(folder))  # an ordinary PEFT folder
    assert plain.peft_config["default"].base_model_name_or_path == str(merged)
    drawn = Unimodal.from_pretrained(merged, adapter=folder).draw("a red circle", seed=1)
    assert len(drawn) == 1


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_norms_are_trained_on_request(mode: str, settings: dict[str, Any], merged: Path) -> None:
    rates = {"norms_learning_rate": 1e-2}
    folder = train(recipe_of(settings, mode=mode, dtype="bfloat16", optimizer=rates))
    base, saved = weights(merged), weights(folder)
    norms = {name for name in base if name.endswith("norm.weight")}
    changed = {
        name for name in norms if (saved[f"base_model.model.{name}"] != base[name].float()).any()
    }
    assert changed == norms and len(norms) == 9
    drawn = Unimodal.from_pretrained(merged, adapter=folder).draw("a red circle", seed=1)
    assert len(drawn) == 1


def test_rows_first_leaves_everything_else_alone(settings: dict[str, Any], merged: Path) -> None:
    for mode in ("lora", "full"):
        recipe = recipe_of(
            settings,
            mode=mode,
            output_dir=f"{settings['output_dir']}-{mode}",
            optimizer={"rows_first_steps": 8, "weight_decay": 0.1},
        )
        saved = weights(train(recipe))
        if mode == "lora":
            changed = {name for name in saved if "lora_B" in name and bool(saved[name].any())}
            assert not changed
        else:
            base = weights(merged)
            changed = {name for name in saved if not torch.equal(saved[name], base[name])}
            assert changed == {"model.embed_tokens.weight"}
            moved = (saved["model.embed_tokens.weight"] != base["model.embed_tokens.weight"]).any(1)
            processor = UnimodalProcessor.from_pretrained(merged, load_image_tokenizer=False)
            assert set(torch.nonzero(moved).flatten().tolist()) <= set(
                processor.vocabulary.new_token_ids
            )


def test_full_tuning_writes_a_whole_folder(settings: dict[str, Any]) -> None:
    folder = train(recipe_of(settings, mode="full"))
    caption = Unimodal.from_pretrained(folder).draw("a red circle", n=2, seed=0)
    assert len(caption) == 2
    assert (folder / "image_tokenizer" / "model.safetensors").is_file()
    card = (folder / "README.md").read_text()
    assert "untrained" not in card and "Trained with `unimodal train` (all weights)." in card


def test_groups_have_their_learning_rates(merged: Path) -> None:
    processor = UnimodalProcessor.from_pretrained(merged, load_image_tokenizer=False)
    model = add_adapter(
        AutoModelForCausalLM.from_pretrained(merged), processor.vocabulary, LoraRecipe()
    )
    recipe = OptimizerRecipe(learning_rate=1e-3, rows_learning_rate=5e-3, weight_decay=0.1)
    rows, matrices = make_optimizer(model, recipe, is_adapter_row).param_groups
    assert (rows["lr"], rows["weight_decay"], len(rows["params"])) == (5e-3, 0.0, 1)
    assert (matrices["lr"], matrices["weight_decay"], len(matrices["params"])) == (1e-3, 0.1, 28)
    model = AutoModelForCausalLM.from_pretrained(merged)
    tables, hidden, norms = make_optimizer(model, recipe, table_names(model)).param_groups
    assert tables["params"][0] is model.get_input_embeddings().weight and norms["lr"] == 1e-3
    recipe = OptimizerRecipe(learning_rate=1e-3, norms_learning_rate=7e-3)
    assert make_optimizer(model, recipe, table_names(model)).param_groups[2]["lr"] == 7e-3
    assert all(p.ndim == 2 for p in hidden["params"]) and all(p.ndim == 1 for p in norms["params"])
    model.experts = torch.nn.Parameter(torch.ones(2, 3, 4))  # as transformers stacks them
    recipe = OptimizerRecipe(name="muon", weight_decay=0.1, norms_learning_rate=7e-3)
    *_, stacked, _ = make_optimizer(model, recipe, table_names(model)).param_groups
    assert stacked["params"] == [model.experts] and stacked["lr"] == recipe.learning_rate
    assert stacked["weight_decay"] == 0.1 and not stacked["muon"]


@pytest.mark.parametrize("found", ["n_gpu", "world_size"])
def test_several_devices_are_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, found, property(lambda self: 2))
    with pytest.raises(ConfigurationError, match="one device, found 2"):
        training_arguments("out", False, {"max_steps": 1})


def test_qlora_holds_the_base_in_4_bits(settings: dict[str, Any]) -> None:
    import bitsandbytes

    recipe = recipe_of(settings, mode="qlora", attention="eager", dtype="float32")
    model = load_model(Path(settings["model"]), recipe)
    linear = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(linear) == 14
    assert model.get_input_embeddings().weight.dtype == torch.float32


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "lorra"}, "mode must be one of lora, qlora, full"),
        ({"modus": "lora"}, "no field 'modus'; did you mean mode"),
        ({"training": {"max_step": 5}}, "max_step"),
        ({"training": {"max_steps": 0}}, "max_steps must be a positive"),
        ({"training": {"learning_rate": 1e-3}}, r"optimizer\.learning_rate"),
        ({"optimizer": {"learning_rate": "fast"}}, r"optimizer\.learning_rate must be float"),
        ({"optimizer": {"norms_learning_rate": 0.0}}, r"norms_learning_rate must be positive"),
        ({"mode": "full", "loss": {"text_kl": 1.0}}, "text_kl needs mode lora"),
        ({"lora": {"target_modules": ["nothing"]}}, r"lora\.target_modules"),
        ({"data": {"weights": {"drawing": 1}}}, "did you mean draw"),
        (
            {"data": {"curriculum": {"steps": 5, "weights": {"drawing": 1}}}},
            r"data\.curriculum\.weights has no field 'drawing'; did you mean draw",
        ),
        (
            {"data": {"curriculum": {"steps": 5, "weights": {"draw": -1}}}},
            r"data\.curriculum\.weights must not be negative",
        ),
        (
            {"data": {"curriculum": {"steps": 0, "weights": {"draw": 1}}}},
            r"data\.curriculum\.steps must be at least 1",
        ),
        ({"data": {"curriculum": {"weights": {"draw": 1}}}}, r"data\.curriculum lacks steps"),
        ({"data": {}}, "nothing to train on"),
    ],
)
def test_wrong_settings_are_refused(
    changes: dict[str, Any], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        train(recipe_of(settings, **changes))


def test_a_cache_of_another_tokenizer_is_refused(
    settings: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(cache, other)
    manifest = json.loads((other / "cache_manifest.json").read_text())
    (other / "cache_manifest.json").write_text(json.dumps({**manifest, "fingerprint": "f" * 64}))
    assert CodeCache(other).manifest.fingerprint == "f" * 64
    with pytest.raises(MismatchError, match="ffffffff"):
        train(recipe_of(settings, data={"caches": [str(other)]}))


def test_recipes_come_back_from_yaml(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(settings)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(LanguageModelRecipe, tmp_path / "recipe.yaml") == recipe
    changed = load_recipe(
        LanguageModelRecipe,
        tmp_path / "recipe.yaml",
        ["optimizer.learning_rate=1e-4", "data.weights.draw=7", "training.seed=3"],
    )
    assert changed.optimizer.learning_rate == 1e-4
    assert changed.data.weights["draw"] == 7.0 and changed.training["seed"] == 3
    assert recipe_to_dict(changed)["optimizer"]["betas"] == [0.9, 0.98]
    (tmp_path / "short.yaml").write_text("model: a\noutput_dir: b\n")
    one = load_recipe(LanguageModelRecipe, tmp_path / "short.yaml", ["data.weights.text=9"])
    assert one.data.weights == {**DataRecipe().weights, "text": 9.0}
    early = ["data.curriculum.steps=5", "data.curriculum.weights.text=1"]
    two = load_recipe(LanguageModelRecipe, tmp_path / "short.yaml", early)
    assert two.data.curriculum is not None and two.data.curriculum.weights == {"text": 1.0}
    with pytest.raises(ConfigurationError, match="no recipe at"):
        load_recipe(LanguageModelRecipe, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora", LanguageModelRecipe),
        ("qlora_hub", LanguageModelRecipe),
        ("full", LanguageModelRecipe),
        ("text_model", TextModelRecipe),
    ],
)
def test_example_recipes_are_valid(name: str, kind: type) -> None:
    load_recipe(kind, Path(recipes.__file__).parent / "recipes" / f"{name}.yaml")


# --- optimizer and format ---


@pytest.mark.parametrize("shape", [(2, 8, 24), (2, 24, 8), (1, 16, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(
        orthogonalise(matrices).flatten(1), (u @ v).flatten(1)
    )
    assert float(cosine.min()) > 0.95


@pytest.mark.parametrize("bf16", [False, True])
def test_muon_agrees_with_torchs(bf16: bool) -> None:
    start = torch.randn(12, 20)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    names = {"weight": ours}
    module = torch.nn.Module()
    module.weight = ours
    recipe = OptimizerRecipe(name="muon", learning_rate=0.02, weight_decay=0.1)
    optimizer = make_optimizer(module, recipe, lambda name: name not in names, bf16=bf16)
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        gradient = torch.randn(12, 20)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (
        float((ours - theirs).detach().norm() / moved.detach()) < 0.03
    )  # torch's works in bfloat16


def test_bf16_is_taken_where_it_is_faster() -> None:
    assert bf16_is_faster() in (True, False)
    a = torch.ones(512, 512)
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        one = a.to(dtype)
        one @ one
        start = time.perf_counter()
        for _ in range(3):
            one @ one
        seconds.append(time.perf_counter() - start)
    if max(seconds) > 3 * min(seconds):  # only a clear case can be checked on a busy machine
        assert bf16_is_faster() == (seconds[0] < seconds[1])
