"""Quantizers against plain references, and the promises about state, dtype and batches."""

import itertools

import pytest
import torch
from torch import nn

from tokenizer_hf.quantizers.fsq import FiniteScalarQuantizer
from tokenizer_hf.quantizers.vq import VectorQuantizer


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_vq(**settings):
    return VectorQuantizer(**{"codebook_size": 32, "codebook_dim": 4, **settings})


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_vq_picks_the_nearest_code(distance):
    quantizer = make_vq(distance=distance).eval()
    latents = torch.randn(3, 50, 4)
    out = quantizer(latents)
    scaled = nn.functional.normalize(latents, dim=-1) if distance == "cosine" else latents
    expected = torch.cdist(scaled.double(), quantizer.code_vectors().double()).argmin(-1)
    assert torch.equal(out.codes, expected)
    assert torch.equal(out.vectors, quantizer.lookup(out.codes))
    assert torch.equal(quantizer.lookup(out.codes), quantizer.code_vectors()[out.codes])
    assert out.losses == {}


def test_a_vector_gets_the_same_code_in_any_batch():
    quantizer = make_vq(codebook_size=2048, codebook_dim=16).eval()
    latents = torch.randn(4, 25, 16)
    together = quantizer(latents).codes
    alone = [quantizer(latents[b : b + 1, n : n + 1]).codes for b in range(4) for n in range(25)]
    assert torch.equal(together.flatten(), torch.cat(alone).flatten())


def test_equally_near_codes_give_the_same_code_in_any_batch():
    quantizer = make_vq(codebook_size=64).eval()
    quantizer.codebook[32:] = quantizer.codebook[:32]  # every code twice: all choices are ties
    latents = torch.randn(300, 1, 4)
    together = quantizer(latents).codes
    alone = torch.cat([quantizer(one.unsqueeze(0)).codes for one in latents])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_vq_changes_state_only_in_a_training_step(update):
    quantizer = make_vq(codebook_update=update)
    before = state_of(quantizer)
    latents = torch.randn(2, 20, 4, requires_grad=True)
    quantizer.eval()
    quantizer(latents)
    quantizer.train()
    with torch.no_grad():
        quantizer(latents)
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(quantizer).items())
    quantizer(latents)
    assert not torch.equal(before["codebook"], quantizer.codebook)  # placed on the data


def test_ema_is_the_running_mean_of_the_textbook():
    quantizer = make_vq(revive_after=0, ema_decay=0.9)
    size, total = torch.zeros(32), torch.zeros(32, 4)
    for _ in range(5):
        latents = torch.randn(1, 200, 4)
        codes = quantizer(latents).codes[0]
        one_hot = nn.functional.one_hot(codes, 32).float()
        size = 0.9 * size + 0.1 * one_hot.sum(0)
        total = 0.9 * total + 0.1 * one_hot.t() @ latents[0]
    used = size > 0
    torch.testing.assert_close(quantizer.cluster_size, size)
    torch.testing.assert_close(quantizer.codebook[used], (total / size[:, None])[used])


def test_gradients_pass_straight_through_and_losses_pull_both_sides():
    quantizer = make_vq(codebook_update="gradient", revive_after=0, commitment_cost=0.5)
    latents = torch.randn(2, 10, 4, requires_grad=True)
    out = quantizer(latents)
    (gradient,) = torch.autograd.grad(out.vectors.sum(), latents, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(gradient))
    error = (latents - quantizer.lookup(out.codes)).square().mean()
    assert set(out.losses) == {"commitment", "codebook"}
    torch.testing.assert_close(out.losses["commitment"], 0.5 * error)
    torch.testing.assert_close(out.losses["codebook"], error)
    out.losses["codebook"].backward()
    assert latents.grad is None
    assert quantizer.codebook.grad.abs().sum() > 0


def test_a_codebook_finds_many_rare_points_within_a_few_steps():
    """1,300 points; half of each batch lies on four of them, the others are seen now and then."""
    points = torch.randn(1300, 16)
    quantizer = make_vq(codebook_size=2048, codebook_dim=16)
    for _ in range(60):
        rare = torch.randint(4, 1300, (128,))
        often = torch.randint(0, 4, (128,))
        quantizer(points[torch.cat([rare, often])].unsqueeze(0).requires_grad_())
    out = quantizer.eval()(points.unsqueeze(0))
    assert out.codes.unique().numel() >= 1290
    found = (out.vectors[0] - points).square().sum(-1) < 1e-6
    assert found.float().mean() > 0.99


def test_only_dead_codes_are_moved():
    quantizer = make_vq(revive_after=3, codebook_size=8)
    with torch.no_grad():
        quantizer.codebook[:] = torch.arange(8).float().unsqueeze(1) * 10
    quantizer.steps_unused.zero_()
    near = quantizer.codebook[:4].clone()
    for _ in range(3):
        quantizer(near.unsqueeze(0))
    assert torch.equal(quantizer.codebook[4:, 0], torch.tensor([40.0, 50.0, 60.0, 70.0]))
    assert quantizer.steps_unused.tolist() == [0, 0, 0, 0, 3, 3, 3, 3]
    new = torch.full((1, 4), 1000.0)
    quantizer(torch.cat([near, new]).unsqueeze(0))
    assert torch.equal(quantizer.codebook[:4], near)
    assert (quantizer.codebook[4:] == 1000).all(-1).sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_vq_is_float32_inside(dtype):
    quantizer = make_vq(codebook_size=512).eval()
    latents = torch.randn(1, 100, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(latents)
    assert out.vectors.dtype == torch.float32
    assert torch.equal(out.codes, quantizer(latents.float()).codes)


LEVELS = [[8, 5, 5, 5], [3, 4], [7], [4, 4, 4]]


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_codes_and_vectors_are_inverse(levels):
    quantizer = FiniteScalarQuantizer(levels)
    vectors = quantizer.code_vectors()
    assert vectors.shape == (quantizer.codebook_size, len(levels))
    assert vectors.unique(dim=0).shape == vectors.shape
    grids = [[(i - count // 2) / (count // 2) for i in range(count)] for count in levels]
    expected = [point[::-1] for point in itertools.product(*grids[::-1])]  # dimension 0 is fastest
    torch.testing.assert_close(vectors, torch.tensor(expected))
    codes = torch.arange(quantizer.codebook_size).view(1, -1)
    torch.testing.assert_close(quantizer.lookup(codes)[0], vectors)


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_rounds_as_in_the_paper(levels):
    quantizer = FiniteScalarQuantizer(levels)
    latents = torch.randn(4, 500, len(levels)) * 3
    out = quantizer(latents)
    for i, count in enumerate(levels):
        reach = (count - 1) * 0.999 / 2
        offset = 0.0 if count % 2 else 0.5
        shift = torch.tensor(offset / reach).atanh()
        bounded = torch.tanh(latents[..., i] + shift) * reach - offset
        torch.testing.assert_close(out.vectors[..., i], bounded.round() / (count // 2))
        assert out.vectors[..., i].unique().numel() == count  # every level is reached
    torch.testing.assert_close(quantizer.lookup(out.codes), out.vectors)
    assert out.codes.dtype == torch.int64
    assert out.codes.min() >= 0
    assert out.codes.max() < quantizer.codebook_size


def test_fsq_passes_gradients_and_ignores_autocast():
    quantizer = FiniteScalarQuantizer([8, 5])
    latents = torch.randn(1, 300, 2, requires_grad=True)
    quantizer(latents).vectors.sum().backward()
    assert (latents.grad > 0).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = quantizer(latents).codes
    assert torch.equal(under_autocast, quantizer(latents).codes)
