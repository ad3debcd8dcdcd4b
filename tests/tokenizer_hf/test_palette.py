"""The palette bodies and the product quantizer: what a patch shows, its colour and its ground."""

import copy
import random

import numpy as np
import pytest
import torch

from eval.reconstruction import agreements
from eval.shapes.render import render
from eval.shapes.scene import sample_scene
from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
from tokenizer_hf.decoders.palette import PaletteDecoder
from tokenizer_hf.encoders.palette import PaletteEncoder
from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
from tokenizer_hf.quantizers.product import ProductQuantizer

PALETTE = {
    "encoder_type": "palette",
    "decoder_type": "palette",
    "patch_size": 16,
    "quantizer_type": "product",
    "product_sizes": [48, 10, 4],
    "revive_after": 5,
}


def scenes(count, held_out, seed=0, level="board"):
    rng = random.Random(seed)
    return [sample_scene(rng, level, None, held_out) for _ in range(count)]


def pixels(pictures):
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(
    scope="module",
    params=[([48, 10, 4], "patch"), ([48, 48], "patch"), ([48, 48], "picture")],
    ids=["colours", "pairs", "one-ground"],
)
def tokenizer(request):
    """A palette tokenizer whose codebooks were placed on scenes without HELD_OUT pairs."""
    torch.manual_seed(0)
    sizes, ground = request.param
    settings = {**PALETTE, "product_sizes": sizes, "palette_ground": ground}
    model = ImageTokenizer(ImageTokenizerConfig(**settings)).train()
    pictures = pixels([render(scene) for scene in scenes(1500, "exclude")])
    for batch in pictures.split(100):
        model(batch)
    return model.eval()


def test_two_colours_and_a_mask_are_found_and_painted_again():
    torch.manual_seed(0)
    encoder, decoder = PaletteEncoder(3, 8), PaletteDecoder(3, 8, (1, 1))
    figure, ground = torch.tensor([0.9, -0.5, 0.1]), torch.tensor([-0.2, 0.4, -0.8])
    mask = torch.zeros(8, 8)
    mask[2:5, 3:7] = 1
    mask[2, 3] = 0.5  # a soft edge
    picture = ground[:, None, None] + mask * (figure - ground)[:, None, None]
    latents = encoder(picture[None])
    assert latents.shape == (1, 1, 70)
    found_mask, found_figure, found_ground = latents[0, 0].split([64, 3, 3])
    torch.testing.assert_close(found_figure, figure, atol=1e-5, rtol=0)
    torch.testing.assert_close(found_ground, ground, atol=1e-5, rtol=0)
    torch.testing.assert_close(found_mask.view(8, 8), mask, atol=1e-5, rtol=0)
    torch.testing.assert_close(decoder(latents)[0], picture, atol=1e-5, rtol=0)


def test_a_patch_of_one_colour_has_an_empty_mask():
    plain = torch.full((1, 3, 8, 8), 0.3) + 0.01 * torch.rand(1, 3, 8, 8)
    latents = PaletteEncoder(3, 8)(plain)[0, 0]
    assert not latents[:67].any()
    torch.testing.assert_close(latents[67:], plain.mean((0, 2, 3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("ground", ["patch", "picture"])
def test_a_picture_is_painted_again_as_it_was(ground):
    pictures = pixels([render(scene) for scene in scenes(20, "any", seed=3, level="free")])
    painted = PaletteDecoder(3, 8, (8, 8))(PaletteEncoder(3, 8, ground)(pictures))
    assert (painted - pictures).abs().mean() < 0.01
    assert (painted - pictures).square().mean(dim=(1, 2, 3)).max() < 1e-3


def test_on_one_ground_a_mask_is_what_a_thing_covers():
    ground, figure = torch.tensor([-0.2, 0.4, -0.8]), torch.tensor([0.9, -0.5, 0.1])
    covered = torch.zeros(40, 40)
    covered[9:28, 11:29] = 1  # patch 12 is full of it; of patch 13, most of the border is
    covered[9:28, 29] = 0.5
    picture = ground[:, None, None] + covered * (figure - ground)[:, None, None]
    latents = PaletteEncoder(3, 8, "picture")(picture[None])[0]
    masks, figures, grounds = latents.split([64, 3, 3], -1)
    wanted = covered.unflatten(0, (5, 8)).unflatten(2, (5, 8)).transpose(1, 2).reshape(25, 64)
    torch.testing.assert_close(masks, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(grounds, ground.expand(25, 3), atol=1e-5, rtol=0)
    seen = wanted.sum(-1) > 0
    expected = torch.where(seen[:, None], figure, 0.0)
    torch.testing.assert_close(figures, expected, atol=1e-5, rtol=0)
    by_patch = PaletteEncoder(3, 8)(picture[None])[0]
    assert not by_patch[12, :64].any()  # the full patch is its own ground
    torch.testing.assert_close(by_patch[13, 64:67], ground, atol=1e-5, rtol=0)  # inside out


def test_a_soft_edge_alone_gets_the_colour_of_its_thing():
    ground, figure = torch.tensor([0.9, 0.9, 0.9]), torch.tensor([0.7, -0.7, -0.6])
    covered = torch.zeros(8, 24)
    covered[2:6, 2:16] = 1
    covered[2:6, 16] = 0.4  # of the third patch, no pixel has the thing's own colour
    picture = ground[:, None, None] + covered * (figure - ground)[:, None, None]
    third = PaletteEncoder(3, 8, "picture")(picture[None])[0, 2]
    torch.testing.assert_close(third[64:67], figure, atol=1e-5, rtol=0)
    torch.testing.assert_close(third[:64].view(8, 8), covered[:, 16:], atol=1e-5, rtol=0)
    alone = PaletteEncoder(3, 8)(picture[None])[0, 2]
    torch.testing.assert_close(alone[64:67], ground + 0.4 * (figure - ground), atol=1e-5, rtol=0)


def test_where_two_things_touch_the_larger_is_laid_on_the_picture_s_ground():
    """From one thing's colour to the other's is the direction from the background to the one; seen
    from the other, the one would be a colour that is half as far from the background."""
    ground, one, other = torch.tensor([[0.0, 0.0, 0.0], [0.5, -0.4, 0.3], [-0.4, 0.32, -0.24]])
    picture = ground[:, None, None].expand(3, 16, 24).clone()
    picture[:, :8, 8:19] = one[:, None, None]  # patch 1, and three columns of patch 2
    picture[:, :8, 19:] = other[:, None, None]
    latents = PaletteEncoder(3, 8, "picture")(picture[None])[0]
    masks, figures, grounds = latents.split([64, 3, 3], -1)
    torch.testing.assert_close(grounds, ground.expand(6, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(figures[1:3], torch.stack((one, other)), atol=1e-5, rtol=0)
    torch.testing.assert_close(masks[1], torch.ones(64), atol=1e-5, rtol=0)
    covered = (torch.arange(8) >= 3).float().repeat(8)
    torch.testing.assert_close(masks[2], covered, atol=1e-5, rtol=0)


def test_combinations_that_training_never_saw_survive(tokenizer):
    for held_out in ("exclude", "only"):
        unseen = scenes(100, held_out, seed=1)
        codes = tokenizer.encode(pixels([render(scene) for scene in unseen]))
        assert codes.shape == (100, 16)
        painted = tokenizer.image_processor.postprocess(tokenizer.decode(codes))
        assert sum(agreements(painted, unseen)) >= 99


def test_save_and_load_keep_the_codes(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = ImageTokenizer.from_pretrained(tmp_path)
    pictures = pixels([render(scene) for scene in scenes(20, "any", seed=2)])
    assert torch.equal(again.encode(pictures), tokenizer.encode(pictures))
    assert again.fingerprint() == tokenizer.fingerprint()


def test_the_ground_is_part_of_what_a_code_means(tokenizer):
    other = copy.deepcopy(tokenizer)
    mine = tokenizer.config.palette_ground
    other.config.palette_ground = "patch" if mine == "picture" else "picture"
    assert other.fingerprint() != tokenizer.fingerprint()


def test_a_product_code_is_the_mixed_radix_number_of_its_parts():
    torch.manual_seed(0)
    quantizer = ProductQuantizer([4, 3], [2, 5]).eval()
    latents = torch.randn(2, 30, 7)
    out = quantizer(latents)
    first, second = (
        part(piece).codes
        for part, piece in zip(quantizer.parts, latents.split([2, 5], -1), strict=True)
    )
    assert torch.equal(out.codes, first + 4 * second)
    assert torch.equal(out.vectors, quantizer.lookup(out.codes))
    assert torch.equal(quantizer.code_vectors()[out.codes], out.vectors)
    assert out.losses == {}


@pytest.mark.parametrize(
    ("settings", "radices"),
    [
        ({"quantizer_type": "vq", "codebook_size": 7}, [7]),
        ({"quantizer_type": "fsq", "fsq_levels": [3, 4]}, [3, 4]),
        (PALETTE, [48, 10, 4]),
    ],
)
def test_factors_of_a_code(settings, radices):
    config = ImageTokenizerConfig(**settings)
    assert config.code_radices == radices
    factors = config.code_factors()
    assert factors.shape == (config.codebook_size, len(radices))
    firsts = np.cumsum([0, *radices[:-1]])
    digits = factors - firsts
    assert ((digits >= 0) & (digits < radices)).all()
    places = np.cumprod([1, *radices[:-1]])
    assert (digits @ places == np.arange(config.codebook_size)).all()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"decoder_type": "conv"}, "palette bodies need each other"),
        ({"quantizer_type": "fsq"}, "vq or product"),
        ({"product_sizes": [8]}, "three parts.* or two"),
        ({"palette_ground": "sky"}, "palette_ground is 'sky'; expected one of patch, picture"),
        ({"product_sizes": [8, 0, 8]}, "at least 1 code"),
        ({"patch_size": 24}, "not a multiple"),
        (
            {"encoder_type": "conv", "decoder_type": "conv", "codebook_dim": 16},
            "cannot be cut into 3 equal parts",
        ),
    ],
)
def test_settings_that_cannot_be_right(change, expected):
    with pytest.raises(ConfigurationError, match=expected):
        ImageTokenizerConfig(**{**PALETTE, **change})
