"""Which number format is fastest on this machine, for autocast while training and encoding.

bfloat16 is 2–3× faster than float32 on a CPU with AMX or AVX512-BF16 and on any recent GPU; on a
CPU without them (AVX2 only) PyTorch emulates it and a matrix product takes 40–60× *longer*. So the
default is measured, not assumed, and the answer is written into the run's resolved recipe, so that
a resumed run goes on in the same format.
"""

import time

import torch


def bf16_is_faster(device: str | torch.device = "cpu") -> bool:
    """Tell whether bfloat16 matrix products beat float32 on ``device``.

    On CUDA the driver is asked; on a CPU one 256³ product is timed in each format (a few
    milliseconds; the best of five, so that a busy machine does not turn the answer round).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _best_seconds(torch.bfloat16) < _best_seconds(torch.float32)


def _best_seconds(dtype: torch.dtype) -> float:
    left = torch.ones(256, 256, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return best
