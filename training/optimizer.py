"""Parameter groups, AdamW and Muon.

Muon: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), scaled to the size of AdamW's
steps as in Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982, §2.2), so that
both share one learning rate. Differences from ``torch.optim.Muon``: the Newton-Schulz iteration
runs in the weights' own format on a CPU (torch's is bfloat16 always, 40–60× slower on a CPU without
bfloat16 units), and weights of equal shape are orthogonalised in one batched product.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from training.recipes import OptimizerRecipe

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
MUON_MOMENTUM = 0.95


def make_optimizer(
    model: nn.Module,
    recipe: OptimizerRecipe,
    is_row: Callable[[str], bool],
    *,
    bf16: bool = False,
) -> torch.optim.Optimizer:
    """Make the optimizer of a run.

    Groups: rows (with ``rows_learning_rate``, never decayed), hidden 2-D weights (decayed; Muon's
    if asked), hidden weights of more dimensions, such as stacked experts (decayed, always
    AdamW's), everything else (norms, biases; with ``norms_learning_rate``, never decayed).

    Args:
        is_row: tells by its name whether a parameter holds rows of the embedding or the head.
        bf16: Muon makes its matrices orthogonal in bfloat16, as the run's matrix products are.
    """
    rows: list[nn.Parameter] = []
    by_ndim: dict[int, list[nn.Parameter]] = {1: [], 2: [], 3: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = rows if is_row(name) else by_ndim[min(max(parameter.ndim, 1), 3)]
            group.append(parameter)
    others, matrices, stacked = by_ndim.values()
    rows_rate = recipe.rows_learning_rate or 1.5 * recipe.learning_rate
    others_rate = recipe.norms_learning_rate or recipe.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": rows, "lr": rows_rate, "weight_decay": 0.0, "muon": False},
        {
            "params": matrices,
            "lr": recipe.learning_rate,
            "weight_decay": recipe.weight_decay,
            "muon": recipe.name == "muon",
        },
        {
            "params": stacked,
            "lr": recipe.learning_rate,
            "weight_decay": recipe.weight_decay,
            "muon": False,
        },
        {"params": others, "lr": others_rate, "weight_decay": 0.0, "muon": False},
    ]
    groups = [group for group in groups if group["params"]]
    return MuonAdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, bf16=bf16)


class MuonAdamW(torch.optim.AdamW):
    """AdamW (fused), and Muon for the groups that are marked ``muon``."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        bf16: bool = False,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True)
        self.muon_dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; a parameter without a gradient is left as it is."""
        groups = self.param_groups
        muon = [group for group in groups if group.get("muon")]
        for group in muon:
            self._muon_step(group)
        # AdamW's own step sees only its groups.
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _muon_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for shape, parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                state = self.state[parameter]
                if "momentum" not in state:
                    state["step"] = torch.zeros(())  # AdamW looks for it when a state is loaded
                    state["momentum"] = torch.zeros_like(parameter)
                gradient: Any = parameter.grad
                state["momentum"].lerp_(gradient, 1 - MUON_MOMENTUM)
                updates.append(gradient.lerp(state["momentum"], MUON_MOMENTUM))  # Nesterov
            directions = orthogonalise(torch.stack(updates).to(self.muon_dtype))
            rate = group["lr"] * 0.2 * max(shape) ** 0.5
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.to(parameter.dtype), alpha=-rate)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix near 1 by five Newton-Schulz steps.

    Args:
        matrices: (B, M, N), float32 or bfloat16.

    Returns:
        (B, M, N), the same format: U Vᵀ of each matrix's singular value decomposition, roughly
        (singular values lie between about 0.7 and 1.2).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
