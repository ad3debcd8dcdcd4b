"""The contrastive term of an image tokenizer's training: it learns, resumes, leaves no trace."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
from tokenizer_hf.errors import ConfigurationError, DataError
from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
from training import image_tokenizer
from training.caption_alignment import CaptionAlignment, collect_words, words_of
from training.image_tokenizer import TokenizerRecipe, train_image_tokenizer

COLOURS = {"red": (220, 30, 40), "blue": (20, 40, 210), "white": (250, 250, 250),
           "black": (15, 15, 15), "green": (40, 165, 60), "yellow": (240, 215, 40)}  # fmt: skip
CONV = {
    "image_size": 16,
    "base_channels": 16,
    "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1,
    "codebook_size": 64,
    "codebook_dim": 8,
}
PATCH = {**CONV, "patch_local": True}
VIT = {
    "image_size": 16,
    "encoder_type": "vit",
    "decoder_type": "vit",
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "codebook_size": 64,
    "codebook_dim": 8,
}
TOKENIZERS = {
    "conv, FSQ": {**CONV, "quantizer_type": "fsq", "fsq_levels": [5, 5, 5, 5]},
    "patch-local, VQ": PATCH,
    "patch-local, gradient, cosine": {**PATCH, "codebook_update": "gradient", "distance": "cosine"},
    "patch-local, product": {**PATCH, "quantizer_type": "product", "product_sizes": [12, 12]},
    "ViT, VQ": VIT,
    "ViT, nested": {**VIT, "token_layout": "nested_1d", "num_latent_tokens": 4},
}
PALETTE = {
    "image_size": 16,
    "encoder_type": "palette",
    "decoder_type": "palette",
    "patch_size": 8,
    "quantizer_type": "product",
    "product_sizes": [4, 6, 6],
}


def write_squares(folder: Path, count: int) -> Path:
    """An imagefolder of four coloured squares each, with two captions of four colours' names."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines = []
    for index in range(count):
        names = [list(COLOURS)[i] for i in generator.integers(0, 6, 4)]
        squares = np.array([COLOURS[name] for name in names], dtype=np.uint8).reshape(2, 2, 3)
        Image.fromarray(squares.repeat(8, 0).repeat(8, 1)).save(folder / f"{index:03d}.png")
        text = ", ".join(names)
        captions = [f"{text}.", f"Squares: {text}"]
        lines.append(json.dumps({"file_name": f"{index:03d}.png", "captions": captions}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("captioned") / "squares", 160)


def make_recipe(squares, tmp_path, **settings) -> TokenizerRecipe:
    usual = {
        "data": [str(squares)],
        "output_dir": str(tmp_path / "run"),
        "held_out": 32,
        "tokenizer": PATCH,
        "max_steps": 6,
        "batch_size": 32,
        "warmup_steps": 2,
        "loss_weights": {"contrastive": 1.0},
        "precision": "float32",
        "log_every": 5,
        "pictures_every": 1000,
        "checkpoint_every": 3,
    }
    return TokenizerRecipe(**{**usual, **settings})


def metrics_of(recipe: TokenizerRecipe) -> dict:
    return json.loads((train_image_tokenizer(recipe) / "metrics.json").read_text())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_held_out_pictures_find_their_captions(name, squares, tmp_path):
    recipe = make_recipe(
        squares, tmp_path, tokenizer=TOKENIZERS[name], max_steps=60, learning_rate=5e-3,
        ema_decay=0.9,
    )  # fmt: skip
    metrics = metrics_of(recipe)
    assert metrics["held_out_captions"] == 32
    assert 1 / 32 <= metrics["caption_retrieval_chance"] < 0.05
    assert metrics["caption_retrieval"] > 4 * metrics["caption_retrieval_chance"]
    logs = EventAccumulator(f"{recipe.output_dir}/training/tensorboard").Reload()
    losses = [event.value for event in logs.Scalars("loss/contrastive")]
    assert losses[-1] < 0.7 * losses[0]
    assert len(losses) == len(logs.Scalars("loss/l1"))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_gradient_reaches_the_whole_encoder_and_nothing_else(name):
    torch.manual_seed(0)
    model = ImageTokenizer(ImageTokenizerConfig(**TOKENIZERS[name])).train()
    with torch.no_grad():  # blocks start at zero, where a first gradient is zero too
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    out = model(torch.rand(4, 3, 16, 16) * 2 - 1)
    alignment = CaptionAlignment(["red", "blue", "green"], model.config.codebook_dim)
    alignment(out.code_vectors, ["red", "blue", "green", "red blue"]).backward()
    for part, reached in ((model.encoder, True), (model.pre_quant, True), (alignment, True),
                          (model.decoder, False), (model.post_quant, False),
                          (model.quantizer, False)):  # fmt: skip
        gradients = [p.grad is not None and p.grad.any() for p in part.parameters()]
        assert all(gradients) if reached else not any(gradients)


def test_the_saved_folder_is_an_ordinary_one(squares, tmp_path):
    on, off = make_recipe(squares, tmp_path / "on"), make_recipe(squares, tmp_path / "off")
    folders = [train_image_tokenizer(recipe) for recipe in (on, replace(off, loss_weights={}))]
    files = [sorted(file.name for file in folder.iterdir()) for folder in folders]
    assert files[0] == files[1]
    with_term, without = (ImageTokenizer.from_pretrained(folder) for folder in folders)
    assert list(with_term.state_dict()) == list(without.state_dict())
    assert (folders[0] / "config.json").read_bytes() == (folders[1] / "config.json").read_bytes()
    assert with_term.fingerprint() != without.fingerprint()


def test_weight_0_is_the_training_without_the_term(squares, tmp_path):
    found = []
    for name, weights in (("none", {}), ("zero", {"contrastive": 0.0})):
        recipe = make_recipe(squares, tmp_path / name, loss_weights=weights)
        metrics = metrics_of(recipe)
        state = torch.load(f"{recipe.output_dir}/training/checkpoint.pt")
        assert sorted(state) == ["averaged", "identity", "model", "optimizer", "step"]
        assert "captions" not in state["identity"]
        assert not [key for key in metrics if "caption" in key]
        found.append(metrics["fingerprint"])
    assert found[0] == found[1]


def test_the_term_does_not_change_the_start(squares, tmp_path, monkeypatch):
    starts = []
    train = image_tokenizer._Run.train

    def remember(run):
        starts.append({name: value.clone() for name, value in run.model.state_dict().items()})
        return train(run)

    monkeypatch.setattr(image_tokenizer._Run, "train", remember)
    for name, weights in (("on", {"contrastive": 1.0}), ("off", {})):
        train_image_tokenizer(
            make_recipe(squares, tmp_path / name, max_steps=1, loss_weights=weights)
        )
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


@pytest.mark.parametrize("name", ["patch-local, VQ", "ViT, nested"])
def test_a_resumed_run_equals_the_uninterrupted_one(name, squares, tmp_path, monkeypatch):
    settings = {"tokenizer": TOKENIZERS[name], "ema_decay": 0.5}
    whole = make_recipe(squares, tmp_path / "whole", **settings)
    parts = make_recipe(squares, tmp_path / "parts", **settings)
    train_image_tokenizer(whole)
    train_step = image_tokenizer._Run._train_step
    steps = []

    def step_until_stopped(run):
        steps.append(run.step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return train_step(run)

    monkeypatch.setattr(image_tokenizer._Run, "_train_step", step_until_stopped)
    with pytest.raises(KeyboardInterrupt):
        train_image_tokenizer(parts)
    torch.rand(3)  # a new process starts with other random numbers
    train_image_tokenizer(parts)
    assert steps == [0, 1, 2, 3, 4, 3, 4, 5]

    one, other = (torch.load(f"{r.output_dir}/training/checkpoint.pt") for r in (whole, parts))
    for part in ("model", "averaged", "alignment", "averaged_alignment"):
        assert one[part].keys() == other[part].keys() and one[part]
        for key, tensor in one[part].items():
            assert torch.equal(tensor, other[part][key]), (part, key)
    temperature = one["alignment"]["log_temperature"]
    assert temperature != CaptionAlignment(["a"], 8).log_temperature  # it is learnt
    assert temperature != one["averaged_alignment"]["log_temperature"]
    ours, theirs = (metrics_of(recipe) for recipe in (whole, parts))
    for key in ("fingerprint", "caption_retrieval"):
        assert ours[key] == theirs[key]


def test_other_captions_do_not_resume(squares, tmp_path):
    folder = write_squares(tmp_path / "squares", 160)
    recipe = make_recipe(folder, tmp_path)
    train_image_tokenizer(recipe)
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace("yellow", "amber"))
    with pytest.raises(ConfigurationError, match="captions: now 'checksum"):
        train_image_tokenizer(recipe)


def test_captions_of_a_step_follow_the_seed_and_the_step_alone(squares, tmp_path, monkeypatch):
    seen: list[list[str]] = []
    forward = CaptionAlignment.forward

    def remember(alignment, vectors, captions):
        seen.append(list(captions))
        return forward(alignment, vectors, captions)

    monkeypatch.setattr(CaptionAlignment, "forward", remember)
    found = [
        metrics_of(make_recipe(squares, tmp_path / str(number), seed=seed))["fingerprint"]
        for number, seed in enumerate((3, 3, 4))
    ]
    assert found[0] == found[1] != found[2]
    assert seen[:6] == seen[6:12] and seen[:6] != seen[12:]
    long = [caption.startswith("Squares") for step in seen[:6] for caption in step]
    assert 0.35 < np.mean(long) < 0.65  # each of a picture's captions has its turn


def test_parquet_and_held_out_data_give_their_captions_too(squares, tmp_path):
    lines = [json.loads(line) for line in (squares / "metadata.jsonl").read_text().splitlines()]
    table = {
        "image": [{"bytes": (squares / line["file_name"]).read_bytes()} for line in lines],
        "captions": [line["captions"] for line in lines],
    }
    pq.write_table(pa.table(table), tmp_path / "squares.parquet")
    one = metrics_of(make_recipe(squares, tmp_path / "folder"))
    other = metrics_of(make_recipe(tmp_path / "squares.parquet", tmp_path / "parquet"))
    assert one["fingerprint"] == other["fingerprint"]
    measured = make_recipe(
        squares, tmp_path / "held", held_out_data=[str(tmp_path / "squares.parquet")], held_out=20
    )
    assert metrics_of(measured)["held_out_captions"] == 20


def test_pictures_without_a_caption_learn_by_reconstruction_alone(squares, tmp_path, caplog):
    folder = write_squares(tmp_path / "some", 60)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    for index in range(0, 60, 2):
        lines[index] = json.dumps({"file_name": f"{index:03d}.png", "captions": ["", "?!"]})
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    recipe = make_recipe(folder, tmp_path, held_out_data=[str(squares)])
    assert metrics_of(recipe)["pictures"] == 60
    assert "30 of 60 pictures have no caption" in caplog.text


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"data": "bare"}, DataError, "of the 128 pictures of .*bare, 0 have a caption"),
        ({"held_out_data": "bare"}, DataError, "of the 32 pictures of .*bare, 0 have a caption"),
        ({"tokenizer": PALETTE}, ConfigurationError, "a palette encoder has no weights"),
        ({"batch_size": 1}, ConfigurationError, "batch_size is 1, expected at least 2"),
        (
            {"loss_weights": {"contrastive": -1}},
            ConfigurationError,
            "contrastive is -1; expected at least 0",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, kind, message, squares, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in squares.glob("*.png"):
        (bare / file.name).symlink_to(file)
    settings = {k: [str(bare)] if v == "bare" else v for k, v in settings.items()}
    with pytest.raises(kind, match=message):
        train_image_tokenizer(make_recipe(squares, tmp_path, **settings))
    assert not (tmp_path / "run/training/checkpoint.pt").exists()


# --- the module by itself -------------------------------------------------------------------------

VECTORS = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(1))
TEXTS = ["a red ring", "two stars", "A red star!", "ring", "a ring"]


def made() -> CaptionAlignment:
    torch.manual_seed(0)
    return CaptionAlignment(collect_words(TEXTS), 3)


def test_words_are_lower_case_and_the_most_frequent_come_first():
    assert words_of("A red-hot RING, 2 Éclairs!") == ["a", "red", "hot", "ring", "2", "éclairs"]
    assert words_of(" ...? ") == []
    assert collect_words(["a ring", "b Ring", "RING, b"]) == ["ring", "b", "a"]


def test_the_loss_is_the_symmetric_cross_entropy_of_clip():
    alignment = made()
    bags = [[alignment.index[word] for word in words_of(text)] for text in TEXTS]
    words = torch.stack([alignment.word_embeddings.weight[bag].mean(0) for bag in bags])
    captions = functional.normalize(alignment.project_words(words), dim=1)
    pictures = functional.normalize(alignment.project_codes(VECTORS.mean(1)), dim=1)
    logits = pictures @ captions.T / 0.07
    own = torch.arange(5)
    expected = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(alignment(VECTORS, TEXTS), expected)
    found = int((logits.argmax(1) == own).sum())
    assert alignment.retrieve(VECTORS, TEXTS) == (found, 1.0, 5)


def test_captions_of_the_same_words_are_no_negatives():
    alignment = made()
    same = ["a red ring", "Ring, red: a"]
    assert alignment(VECTORS[:2], same) == 0
    assert alignment.retrieve(VECTORS[:2], same) == (2, 2.0, 2)
    three = alignment._logits(VECTORS[:3], [alignment.ids_of(t) for t in [*same, "two stars"]])
    assert (three == -torch.inf).nonzero().tolist() == [[0, 1], [1, 0]]
    assert alignment(VECTORS[:3], [*same, "two stars"]).isfinite()


def test_pictures_without_a_known_word_are_left_out():
    alignment = made()
    captions = ["a red ring", "", "two stars", "unknown", "ring"]
    torch.testing.assert_close(
        alignment(VECTORS, captions),
        alignment(VECTORS[[0, 2, 4]], ["a red ring", "stars two", "ring"]),
    )
    assert alignment.retrieve(VECTORS, captions)[2] == 3
    for texts in (["", "", "", "", ""], ["ring", "", "", "", ""]):
        assert alignment(VECTORS, texts) == 0
        assert alignment.retrieve(VECTORS, texts)[2] == sum(map(bool, texts))


def test_the_temperature_stays_above_its_least():
    alignment = made()
    with torch.no_grad():
        alignment.log_temperature.fill_(-20.0)
    assert alignment(VECTORS, TEXTS).isfinite()
    assert alignment.log_temperature.item() == pytest.approx(math.log(0.01))
    assert made().log_temperature.item() == pytest.approx(math.log(0.07))
