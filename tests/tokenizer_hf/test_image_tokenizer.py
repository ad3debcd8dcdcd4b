"""The image tokenizer: codes, prefixes, precision, and folders that load or say why not."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel

from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
from tokenizer_hf.errors import CheckpointError, CodeError, ConfigurationError
from tokenizer_hf.image_processing_image_tokenizer import ImageTokenizerImageProcessor
from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
from tokenizer_hf.vocabulary import VocabularyExtension

VIT = {
    "encoder_type": "vit",
    "decoder_type": "vit",
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_latent_tokens": 6,
}
KINDS = {
    "conv-vq": {},
    "conv-fsq": {"quantizer_type": "fsq", "fsq_levels": [4, 3, 3]},
    "conv-cosine-gradient": {"distance": "cosine", "codebook_update": "gradient"},
    "patch": {"patch_local": True},
    "vit-2d": {**VIT, "token_layout": "2d"},
    "vit-1d": {**VIT, "token_layout": "1d"},
    "vit-nested": {**VIT, "token_layout": "nested_1d", "min_tokens": 2},
    "vit-conv": {**VIT, "token_layout": "2d", "decoder_type": "conv"},
}


def make(kind: str = "conv-vq", **settings) -> ImageTokenizer:
    torch.manual_seed(0)
    size = {
        "image_size": 32,
        "base_channels": 8,
        "channel_multiplier": [1, 2, 2],
        "codebook_size": 48,
    }
    config = ImageTokenizerConfig(**{**size, **KINDS[kind], **settings})
    model = ImageTokenizer(config)
    model.train()
    model(pictures())  # places a VQ codebook on the data
    return model.eval()


def pictures(count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode(kind):
    model = make(kind)
    config = model.config
    codes = model.encode(pictures())
    assert codes.shape == (6, config.num_tokens)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < config.codebook_size
    assert codes.unique().numel() > 1
    if config.grid:
        assert config.grid == (4, 4) and config.num_tokens == 16
    painted = model.decode(codes)
    assert painted.shape == (6, 3, 32, 32)
    assert painted.dtype == torch.float32
    assert painted.abs().max() <= 1
    assert torch.equal(painted, model.decode(model.encode(pictures())))
    torch.testing.assert_close(painted, model(pictures()).reconstruction.clamp(-1, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_same_alone_and_in_a_batch(kind):
    model = make(kind)
    many = pictures(33)
    alone = torch.cat([model.encode(picture.unsqueeze(0)) for picture in many])
    assert torch.equal(model.encode(many), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode_never_change_the_model(kind):
    model = make(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode)
        model.decode(model.encode(pictures()))
        assert model.training is mode
    model.eval()(pictures()).loss.backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_in_every_part(kind):
    model = make(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    first = None
    for _ in range(30):
        out = model(pictures(), num_tokens=model.config.num_tokens)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        first = first or out.losses["l2"].item()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert silent == []
    assert model.eval()(pictures()).losses["l2"].item() < 0.8 * first


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_begins_as_laid_out(kind):
    """Residual blocks are the identity, all other layers keep the variance of what comes in."""
    model = make(kind)
    for name, module in model.named_modules():
        if type(module).__name__ in ("ConvBlock", "PatchBlock", "TransformerBlock"):
            weight = next(p for p in module.parameters() if p.ndim > 1)
            shape = (2, weight.shape[1], 4, 4) if weight.ndim == 4 else (2, 5, weight.shape[1])
            x = torch.randn(shape)
            assert torch.equal(module(x), x), name
        elif type(module) in (torch.nn.Linear, torch.nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.2), name
            assert not module.bias.any()


def test_a_patch_local_code_sees_and_paints_its_own_patch_only():
    model = make("patch")
    changed = pictures(1)
    changed[:, :, 8:16, 16:24] *= -1  # row 1, column 2
    before, after = model.encode(pictures(1)), model.encode(changed)
    assert (before != after).nonzero().tolist() == [[0, 6]]
    differs = (model.decode(before) != model.decode(after)).any(1)[0]
    assert differs[8:16, 16:24].any()
    differs[8:16, 16:24] = False
    assert not differs.any()


def test_principal_components_start_as_an_exact_autoencoder():
    model = make("patch", base_channels=96, codebook_dim=192).train()  # 8 × 8 × 3 values a patch
    model.start_from_principal_components(pictures(40))
    latents = model._latents(pictures())
    torch.testing.assert_close(model._pixels(latents), pictures(), atol=1e-4, rtol=0)
    of_all = model._latents(pictures(40)).flatten(0, 1)
    torch.testing.assert_close(of_all.mean(0), torch.zeros(192), atol=1e-3, rtol=0)
    assert of_all.var(0, correction=0).sum().item() == pytest.approx(192, rel=1e-3)
    with pytest.raises(ConfigurationError, match="patch_local bodies only"):
        make().start_from_principal_components(pictures())
    with pytest.raises(ConfigurationError, match="codebook_dim is 64"):
        make("patch", codebook_dim=64).start_from_principal_components(pictures())


def test_prefixes_of_a_nested_tokenizer():
    model = make("vit-nested")
    codes = model.encode(pictures())
    for length in range(2, 7):
        assert torch.equal(model.encode(pictures(), num_tokens=length), codes[:, :length])
        assert model.decode(codes[:, :length]).shape == (6, 3, 32, 32)
        forward = model(pictures(), num_tokens=length)
        torch.testing.assert_close(
            model.decode(codes[:, :length]), forward.reconstruction.clamp(-1, 1)
        )
    with pytest.raises(CodeError, match="1 codes per picture came; this tokenizer uses 2 to 6"):
        model.decode(codes[:, :1])
    with pytest.raises(CodeError, match="2 to 6"):
        model.encode(pictures(), num_tokens=7)
    model.train()
    lengths = {model(pictures(1)).codes.shape[1] for _ in range(80)}
    assert lengths == {2, 3, 4, 5, 6}


def test_wrong_inputs_are_refused_with_what_came_and_what_was_expected():
    model = make()
    codes = model.encode(pictures())
    with pytest.raises(CodeError, match="15 codes per picture came; this tokenizer uses 16"):
        model.decode(codes[:, :15])
    with pytest.raises(CodeError, match="to 48 came; expected 0 to 47"):
        model.decode(torch.full((1, 16), 48))
    with pytest.raises(CodeError, match="-1"):
        model.decode(torch.full((1, 16), -1))
    with pytest.raises(CodeError, match="integers"):
        model.decode(codes.float())
    with pytest.raises(CodeError, match=r"\(1, 3, 16, 16\) came; expected \(batch, 3, 32, 32\)"):
        model.encode(torch.zeros(1, 3, 16, 16))
    assert model.decode(codes[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder_type": "mlp"}, "encoder_type is 'mlp'; expected one of conv, vit"),
        ({"token_layout": "1d"}, "needs encoder_type and decoder_type 'vit'"),
        ({"image_size": 60}, "not a multiple of 16"),
        ({"fsq_levels": [1, 5]}, "at least 3"),
        ({"ema_decay": 1.0}, "below 1"),
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"channel_multiplier": []}, "channel_multiplier"),
        ({**VIT, "token_layout": "nested_1d", "min_tokens": 7}, "min_tokens 7 exceeds"),
        ({**VIT, "num_attention_heads": 5}, "not a multiple of num_attention_heads"),
        ({**VIT, "decoder_type": "conv"}, "paints cells of 16; make them equal"),
    ],
)
def test_configurations_that_cannot_be(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ImageTokenizerConfig(**settings)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model = make(kind)
    model.image_processor = ImageTokenizerImageProcessor(size=32, resize_mode="pad")
    model.save_pretrained(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= names
    assert not any(name.startswith(".") for name in names)
    again = ImageTokenizer.from_pretrained(tmp_path)
    for name in ImageTokenizerConfig.__annotations__:
        assert getattr(again.config, name) == getattr(model.config, name), name
    assert torch.equal(again.encode(pictures()), model.encode(pictures()))
    assert torch.equal(
        again.decode(again.encode(pictures())), model.decode(model.encode(pictures()))
    )
    assert torch.equal(again.code_vectors(), model.code_vectors())
    assert again.fingerprint() == model.fingerprint()
    extension = VocabularyExtension.load(tmp_path)
    assert extension == VocabularyExtension.from_image_tokenizer(again)
    assert again.image_processor.resize_mode == "pad"
    assert not again.training


def test_the_fingerprint_covers_weights_and_meaning_only(tmp_path):
    model = make()
    fingerprint = model.fingerprint()
    model.config.commitment_cost = 3.0
    model.quantizer.cluster_size += 1
    assert model.fingerprint() == fingerprint
    with torch.no_grad():
        model.decoder.layers[-2].bias += 0.1
    assert model.fingerprint() != fingerprint
    assert make(num_res_blocks=1).fingerprint() != fingerprint
    assert make("conv-fsq").fingerprint() != make("conv-fsq", fsq_levels=[3, 4, 3]).fingerprint()


def test_a_bfloat16_copy_keeps_the_fingerprint_and_quantizes_in_float32(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "float32")
    half = ImageTokenizer.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    assert half.decoder.layers[-2].weight.dtype == torch.bfloat16
    assert half.quantizer.codebook.dtype == torch.float32
    assert half.fingerprint() == model.fingerprint()
    assert half.decode(half.encode(pictures())).dtype == torch.float32
    half.save_pretrained(tmp_path / "bfloat16")
    back = ImageTokenizer.from_pretrained(tmp_path / "bfloat16", dtype=torch.float32)
    assert back.fingerprint() == model.fingerprint()
    assert torch.equal(back.code_vectors(), model.code_vectors())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_and_channels_last(kind):
    model = make(kind).to(memory_format=torch.channels_last).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(pictures().contiguous(memory_format=torch.channels_last))
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(
        parameter.grad.isfinite().all()
        for parameter in model.parameters()
        if parameter.grad is not None
    )


def test_auto_classes_load_the_folder_after_a_bare_import(tmp_path):
    """Here transformers was imported first; in the new process the package is."""
    model = make()
    model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).fingerprint() == model.fingerprint()
    program = (
        "import tokenizer_hf, sys\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers import AutoConfig, AutoImageProcessor, AutoModel\n"
        f"folder = {str(tmp_path)!r}\n"
        "print(type(AutoConfig.from_pretrained(folder)).__name__,\n"
        "      AutoModel.from_pretrained(folder).fingerprint(),\n"
        "      type(AutoImageProcessor.from_pretrained(folder)).__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    expected = ["ImageTokenizerConfig", model.fingerprint(), "ImageTokenizerImageProcessor"]
    assert run.stdout.split() == expected, run.stderr


def test_importing_the_package_loads_nothing_heavy():
    program = (
        "import sys, tokenizer_hf; print(*{'torch', 'transformers', 'PIL'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == ""


def damaged_folders(folder):
    """What can be wrong with a folder, and what the error has to say about it."""
    weights = folder / "model.safetensors"

    def foreign():
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))

    def other_size():
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "base_channels": 16}))

    def more_blocks():
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_res_blocks": 3}))

    def pickle_only():
        torch.save(make().state_dict(), folder / "pytorch_model.bin")
        weights.unlink()

    return {
        "no config": ((folder / "config.json").unlink, "has no config.json"),
        "torn config": (lambda: (folder / "config.json").write_text('{"model_'), "is damaged"),
        "foreign": (foreign, "a model of type 'llama'; expected 'unimodal_image_tokenizer'"),
        "no weights": (weights.unlink, "has no model.safetensors"),
        "pickle only": (pickle_only, "pytorch_model.bin is a pickle, which is never loaded"),
        "torn weights": (
            lambda: weights.write_bytes(weights.read_bytes()[:-100]),
            "cannot be loaded",
        ),
        "text as weights": (lambda: weights.write_text("hello"), "cannot be loaded"),
        "empty weights": (lambda: weights.write_bytes(b""), "cannot be loaded"),
        "other size": (other_size, "do not fit its config.json|cannot be loaded"),
        "more blocks": (more_blocks, "missing keys"),
    }


@pytest.mark.parametrize("damage", damaged_folders(Path()))
def test_folders_that_cannot_be_loaded(damage, tmp_path):
    make().save_pretrained(tmp_path)
    harm, message = damaged_folders(tmp_path)[damage]
    harm()
    with pytest.raises(CheckpointError, match=message) as caught:
        ImageTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        ImageTokenizer.from_pretrained(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        ImageTokenizer.from_pretrained(tmp_path / "file")


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    model = make()
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = make("conv-fsq")

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ImageTokenizerImageProcessor, "to_json_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    other.save_pretrained(tmp_path)
    assert ImageTokenizer.from_pretrained(tmp_path).fingerprint() == other.fingerprint()
    assert (tmp_path / "README.md").read_text() == "mine"


def test_push_to_hub_sends_the_whole_folder(monkeypatch):
    """Only the network is replaced; what would be uploaded has to load."""
    sent = {}

    class Hub:
        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **_):
            with tempfile.TemporaryDirectory() as folder:
                for operation in operations:
                    shutil.copy(operation.path_or_fileobj, Path(folder, operation.path_in_repo))
                sent["fingerprint"] = ImageTokenizer.from_pretrained(folder).fingerprint()
                sent["names"] = {file.name for file in Path(folder).iterdir()}
            sent["repo_id"] = repo_id

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard("a card")
    )
    model = make()
    model.push_to_hub("me/tokenizer")
    assert sent["repo_id"] == "me/tokenizer"
    assert sent["fingerprint"] == model.fingerprint()
    assert sent["names"] == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "vocabulary_extension.json",
    }
