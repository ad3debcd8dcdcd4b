"""The image tokenizer's trainer: it learns, it resumes exactly, and what it writes loads."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tokenizer_hf.errors import CheckpointError, ConfigurationError, DataError
from tokenizer_hf.image_processing_image_tokenizer import ImageTokenizerImageProcessor
from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
from tokenizer_hf.vocabulary import VocabularyExtension
from training import image_tokenizer
from training.image_tokenizer import (
    TokenizerRecipe,
    learning_rate,
    picture_indices,
    read_pictures,
    train_image_tokenizer,
)
from training.recipes import load_recipe, save_recipe
from unimodal import cli

PATCH = {
    "image_size": 16,
    "patch_local": True,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1],
    "codebook_size": 64,
    "codebook_dim": 8,
    "num_res_blocks": 1,
}
NESTED = {
    "image_size": 16,
    "encoder_type": "vit",
    "decoder_type": "vit",
    "token_layout": "nested_1d",
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_latent_tokens": 4,
    "codebook_size": 32,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """80 pictures of four coloured squares of 8 × 8, out of six colours."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    colours = np.array([[220, 30, 40], [20, 40, 210], [250, 250, 250], [15, 15, 15], [40, 165, 60],
                        [240, 215, 40]], dtype=np.uint8)  # fmt: skip
    for index in range(80):
        squares = colours[generator.integers(0, 6, (2, 2))]
        Image.fromarray(squares.repeat(8, 0).repeat(8, 1)).save(folder / f"{index:03d}.png")
    return folder


def make_recipe(pictures, tmp_path, **settings) -> TokenizerRecipe:
    usual = {
        "data": [str(pictures)],
        "output_dir": str(tmp_path / "run"),
        "held_out": 16,
        "tokenizer": PATCH,
        "max_steps": 8,
        "batch_size": 16,
        "warmup_steps": 2,
        "precision": "float32",
        "log_every": 2,
        "pictures_every": 4,
        "checkpoint_every": 3,
    }
    return TokenizerRecipe(**{**usual, **settings})


def test_it_learns_and_writes_a_folder_that_loads(pictures, tmp_path):
    recipe = make_recipe(pictures, tmp_path, max_steps=150, learning_rate=5e-3, ema_decay=0.9)
    folder = train_image_tokenizer(recipe)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["psnr"] > 30
    assert 6 <= metrics["codes_used"] <= 12
    assert 1 < metrics["perplexity"] <= metrics["codes_used"]
    assert metrics["held_out_pictures"] == 16 and metrics["pictures"] == 64

    model = ImageTokenizer.from_pretrained(folder)
    assert model.fingerprint() == metrics["fingerprint"]
    assert VocabularyExtension.load(folder).fingerprint == metrics["fingerprint"]
    processor = ImageTokenizerImageProcessor.from_pretrained(folder)
    original = Image.open(pictures / "000.png")
    codes = model.encode(processor([original])["pixel_values"])
    (painted,) = processor.postprocess(model.decode(codes))
    assert np.abs(np.asarray(painted).astype(int) - np.asarray(original)).mean() < 8

    assert load_recipe(TokenizerRecipe, folder / "recipe.yaml") == recipe
    sheets = sorted((folder / "training/pictures").iterdir())
    assert [sheet.name for sheet in sheets][:2] == ["step-000004.png", "step-000008.png"]
    assert Image.open(sheets[-1]).size == (8 * 16, 2 * 16)
    logs = EventAccumulator(str(folder / "training/tensorboard")).Reload()
    losses = [event.value for event in logs.Scalars("loss/l2")]
    assert losses[-1] < 0.1 * losses[0]
    assert logs.Scalars("codebook/used")[-1].value >= 6


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer": PATCH, "start": "principal_components"},
        {"tokenizer": NESTED},
        {"tokenizer": {**PATCH, "codebook_update": "gradient"}},
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(settings, pictures, tmp_path, monkeypatch):
    whole = make_recipe(pictures, tmp_path / "whole", **settings)
    parts = make_recipe(pictures, tmp_path / "parts", **settings)
    train_image_tokenizer(whole)

    steps = []
    train_step = image_tokenizer._Run._train_step

    def step_until_stopped(run):
        steps.append(run.step)
        if len(steps) in (5, 9):  # in step 4, then in step 6 after going on from 3 and from 6
            raise KeyboardInterrupt
        return train_step(run)

    monkeypatch.setattr(image_tokenizer._Run, "_train_step", step_until_stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_image_tokenizer(parts)
        with pytest.raises(CheckpointError):  # nothing half-trained loads
            ImageTokenizer.from_pretrained(parts.output_dir)
        torch.rand(3)  # a new process starts with other random numbers
    train_image_tokenizer(parts)
    assert steps == [0, 1, 2, 3, 4, 3, 4, 5, 6, 6, 7]

    one, other = (torch.load(f"{r.output_dir}/training/checkpoint.pt") for r in (whole, parts))
    for part in ("model", "averaged"):
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), name
    one_model, other_model = (ImageTokenizer.from_pretrained(r.output_dir) for r in (whole, parts))
    assert one_model.fingerprint() == other_model.fingerprint()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            one_model.state_dict().values(), other_model.state_dict().values(), strict=True
        )
    )


def test_a_finished_run_is_not_trained_again(pictures, tmp_path, monkeypatch):
    recipe = make_recipe(pictures, tmp_path)
    folder = train_image_tokenizer(recipe)
    first = ImageTokenizer.from_pretrained(folder).fingerprint()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["achieved_flops_per_second"] > 0
    metrics["seconds"] = 1234.5  # what it really took would be near 0 too
    (folder / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.setattr(image_tokenizer._Run, "_train_step", None)
    again = train_image_tokenizer(replace(recipe, checkpoint_every=1))
    assert ImageTokenizer.from_pretrained(again).fingerprint() == first
    assert json.loads((folder / "metrics.json").read_text()) == metrics


def test_another_recipe_or_other_data_do_not_resume(pictures, tmp_path):
    recipe = make_recipe(pictures, tmp_path, max_steps=3)
    train_image_tokenizer(recipe)
    with pytest.raises(ConfigurationError, match=r"learning_rate: now 0\.5, there 0\.001"):
        train_image_tokenizer(replace(recipe, learning_rate=0.5))
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    (other / "000.png").unlink()
    shutil.copy(pictures / "001.png", other / "000.png")
    with pytest.raises(ConfigurationError, match="pictures: now '80 with checksum"):
        train_image_tokenizer(replace(recipe, data=[str(other)], held_out=16))
    checkpoint = tmp_path / "run/training/checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged; remove it"):
        train_image_tokenizer(recipe)


def test_the_averaged_weights_are_saved_with_the_newest_codes(pictures, tmp_path):
    recipe = make_recipe(pictures, tmp_path, max_steps=40, ema_decay=0.99)
    model = ImageTokenizer.from_pretrained(train_image_tokenizer(recipe))
    state = torch.load(tmp_path / "run/training/checkpoint.pt")
    weight, codebook = model.decoder.paint.weight, model.quantizer.codebook
    assert not torch.equal(weight, state["model"]["decoder.paint.weight"])
    assert torch.equal(weight, state["averaged"]["decoder.paint.weight"])
    assert torch.equal(codebook, state["model"]["quantizer.codebook"])
    plain = make_recipe(pictures, tmp_path / "plain", max_steps=3, ema_decay=0.0)
    model = ImageTokenizer.from_pretrained(train_image_tokenizer(plain))
    state = torch.load(tmp_path / "plain/run/training/checkpoint.pt")["model"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_loss_weights_reach_the_gradient(pictures, tmp_path):
    recipe = make_recipe(
        pictures, tmp_path, max_steps=3, loss_weights={"l1": 0, "l2": 0, "commitment": 0}
    )
    train_image_tokenizer(replace(recipe, weight_decay=0.0, ema_decay=0.0))
    state = torch.load(tmp_path / "run/training/checkpoint.pt")["model"]
    torch.manual_seed(recipe.seed)
    start = ImageTokenizer.from_pretrained(recipe.output_dir).config
    torch.manual_seed(recipe.seed)
    fresh = ImageTokenizer(start).state_dict()
    assert all(
        torch.equal(tensor, state[name])
        for name, tensor in fresh.items()
        if not name.startswith("quantizer.")
    )


def test_principal_components_are_a_head_start(pictures, tmp_path):
    found = {}
    for start in ("random", "principal_components"):
        recipe = make_recipe(pictures, tmp_path / start, start=start, batch_size=32)
        folder = train_image_tokenizer(recipe)
        found[start] = json.loads((folder / "metrics.json").read_text())["psnr"]
    assert found["principal_components"] > 30 > found["random"]


def test_bfloat16_runs(pictures, tmp_path):
    recipe = make_recipe(pictures, tmp_path, max_steps=2, precision="bfloat16")
    ImageTokenizer.from_pretrained(train_image_tokenizer(recipe))


def test_every_picture_is_seen_once_a_pass_and_in_another_order():
    seen = [picture_indices(10, 4, seed=1, step=step) for step in range(5)]
    passes = np.concatenate(seen).reshape(2, 10)
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(10))
    assert not np.array_equal(passes[0], passes[1])
    assert not np.array_equal(seen[0], picture_indices(10, 4, seed=2, step=0))
    assert len(picture_indices(3, 8, seed=0, step=1)) == 8  # more than a pass in one batch


def test_the_learning_rate_warms_up_and_ends_at_nothing():
    recipe = TokenizerRecipe(data=["x"], output_dir="y", max_steps=100, warmup_steps=10)
    rates = [learning_rate(recipe, step) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(1e-3, rel=0.03) and rates.index(max(rates)) == 9
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[100] == pytest.approx(0)


def test_pictures_come_from_memory_or_from_a_file_alike(pictures, monkeypatch):
    processor = ImageTokenizerImageProcessor(size=16)
    in_memory = read_pictures([str(pictures)], processor)
    monkeypatch.setattr(image_tokenizer, "MEMORY_LIMIT_BYTES", 1000)
    in_file = read_pictures([str(pictures)], processor)
    assert isinstance(in_file, np.memmap) and not isinstance(in_memory, np.memmap)
    assert np.array_equal(in_memory, in_file)
    assert read_pictures([str(pictures)], processor, limit=5).shape == (5, 16, 16, 3)


def test_broken_pictures_are_reported_and_skipped(pictures, tmp_path, caplog):
    folder = tmp_path / "some"
    shutil.copytree(pictures, folder)
    (folder / "003.png").write_text("I am a text file")
    found = read_pictures([str(folder)], ImageTokenizerImageProcessor(size=16))
    assert len(found) == 79
    assert "003.png" in caplog.text
    for file in folder.iterdir():
        file.write_text("no picture")
    with pytest.raises(DataError):
        read_pictures([str(folder)], ImageTokenizerImageProcessor(size=16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": {"codebok_size": 3}}, "tokenizer has no field 'codebok_size'"),
        ({"tokenizer": {**PATCH, "image_size": "big"}}, "image_size|wrong type"),
        ({"image_processor": {"mode": "pad"}}, "image_processor has no field 'mode'"),
        ({"image_processor": {"size": 32}}, "image_processor.size is 32"),
        ({"loss_weights": {"lpips": 1}}, "loss_weights has 'lpips'"),
        ({"max_steps": 0}, "max_steps is 0; expected at least 1"),
        ({"data": []}, "data is empty"),
    ],
)
def test_recipes_that_cannot_be(settings, message, pictures, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        train_image_tokenizer(make_recipe(pictures, tmp_path, **settings))


def test_held_out_data_are_read_at_their_validation_split(pictures, tmp_path):
    both = tmp_path / "both"
    for split, count in (("train", 40), ("validation", 5)):
        (both / split).mkdir(parents=True)
        for file in sorted(pictures.iterdir())[:count]:
            shutil.copy(file, both / split)
    recipe = make_recipe(both, tmp_path, held_out_data=[str(both)], max_steps=1)
    metrics = json.loads((train_image_tokenizer(recipe) / "metrics.json").read_text())
    assert (metrics["pictures"], metrics["held_out_pictures"]) == (40, 5)


def test_what_is_held_out_comes_on_top_of_num_pictures(pictures, tmp_path):
    recipe = make_recipe(pictures, tmp_path, num_pictures=10, held_out=16, max_steps=1)
    metrics = json.loads((train_image_tokenizer(recipe) / "metrics.json").read_text())
    assert (metrics["pictures"], metrics["held_out_pictures"]) == (10, 16)
    assert recipe.count_pictures() == 10


def test_more_pictures_are_needed_than_are_held_out(pictures, tmp_path):
    with pytest.raises(DataError, match="80 pictures, of which 80 would be held out"):
        train_image_tokenizer(make_recipe(pictures, tmp_path, held_out=80))


def run_command(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["unimodal", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_the_commands_train_and_reconstruct(pictures, tmp_path, monkeypatch, capsys):
    recipe = make_recipe(pictures, tmp_path, tokenizer=NESTED)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    folder = tmp_path / "other"
    code, out, _ = run_command(
        monkeypatch, capsys, "train-tokenizer", "--config", tmp_path / "recipe.yaml",
        "--set", f"output_dir={folder}", "--set", "max_steps=2",
    )  # fmt: skip
    assert code == 0 and str(folder) in out and '"steps": 2' in out

    command = ["reconstruct", "-t", folder, "--out", tmp_path / "out"]
    two = [pictures / "000.png", pictures / "001.png"]
    code, out, err = run_command(monkeypatch, capsys, *command, *two, "--num-tokens", 2)
    assert code == 0, err
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines] == [str(tmp_path / f"out/00{i}.png") for i in range(2)]
    assert [len(line[2].split()) for line in lines] == [2, 2]
    sheet = np.asarray(Image.open(lines[0][0]))
    assert sheet.shape == (16, 32, 3)
    assert np.array_equal(sheet[:, :16], np.asarray(Image.open(two[0])))

    broken = tmp_path / "broken.png"
    broken.write_text("I am a text file")
    for arguments, message in (
        ([*command, broken], "broken.png' is not a picture"),
        (["reconstruct", "-t", tmp_path / "no", two[0]], "there is no folder"),
        ([*command, two[0], "--num-tokens", 9], "9 codes per picture came"),
        (["train-tokenizer", "--config", tmp_path / "no.yaml"], "no recipe at"),
        (
            ["train-tokenizer", "--config", tmp_path / "recipe.yaml", "--set", "batch=3"],
            "did you mean",
        ),
    ):
        code, _, err = run_command(monkeypatch, capsys, *arguments)
        assert code == 2
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err
