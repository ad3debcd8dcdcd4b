"""What guidance costs: the same drawings with and without it, in turn, in one run."""

import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from tokenizer_hf.errors import ConfigurationError
from unimodal.generation.sampling import SamplingSettings, generate

TARGETS = {1: 1.4, 16: 2.05}  # guided over unguided seconds that we promise, by batch size
PROMPTS = tuple(
    f"a large {colour} {shape} on a white background"
    for shape in ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
    for colour in ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "pink")
)


def measure_guidance(
    model: Any,
    processor: Any,
    *,
    batch_sizes: Sequence[int] = (1, 16),
    rounds: int = 15,
    guidance: float = 3.0,
    prompts: Sequence[str] = PROMPTS,
) -> dict[str, Any]:
    """Time guided against unguided drawing on the transformers backend.

    Each round draws the same pictures (same prompts, same seeds) once each way, and the next round
    the other way first, so that a machine that gets slower slows both. One round each way before
    that is not counted. Only ids are drawn; decoding them to pixels costs the same either way.

    Args:
        model, processor: a merged model.
        batch_sizes: pictures drawn at once.
        rounds: counted pairs per batch size.
        guidance: above 1.
        prompts: what to draw, one after another; equal prompts would be read once.

    Returns:
        Plain JSON: the settings, the machine, and ``batches``, one entry per batch size with
        ``unguided_seconds`` and ``guided_seconds`` (medians of wall time), ``ratio`` (the median of
        the rounds' own ratios, with quartiles ``low`` and ``high``), ``cpu_ratio`` (the same of
        processor time, which other programs on the machine disturb less) and ``target``, None
        where we promise nothing.

    Raises:
        ConfigurationError: guidance 1, which runs no unconditional rows, or fewer than 2 rounds.
    """
    if guidance == 1:
        raise ConfigurationError("guidance is 1, which is off; give a number above 1")
    if rounds < 2:
        raise ConfigurationError(f"{rounds} rounds came, expected at least 2 to take a median of")
    rows = [_draw_ids(processor, prompt) for prompt in prompts]
    negative = _draw_ids(processor, "")
    batches = []
    for size in batch_sizes:
        batch = [rows[index % len(rows)] for index in range(size)]

        def seconds(scale: float, batch: list[list[int]] = batch) -> tuple[float, float]:
            wall, cpu = time.perf_counter(), time.process_time()
            generate(
                model,
                processor,
                batch,
                SamplingSettings(guidance=scale, seed=0),
                mode="image",
                negative_prompts=[negative] * len(batch),
            )
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            return time.perf_counter() - wall, time.process_time() - cpu

        seconds(1.0), seconds(guidance)
        pairs = []
        for index in range(rounds):
            if index % 2:
                guided, unguided = seconds(guidance), seconds(1.0)
            else:
                unguided, guided = seconds(1.0), seconds(guidance)
            pairs.append((unguided, guided))
        ratios = [guided[0] / unguided[0] for unguided, guided in pairs]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        batches.append(
            {
                "batch": size,
                "unguided_seconds": statistics.median(unguided[0] for unguided, _ in pairs),
                "guided_seconds": statistics.median(guided[0] for _, guided in pairs),
                "ratio": ratio,
                "low": low,
                "high": high,
                "cpu_ratio": statistics.median(guided[1] / plain[1] for plain, guided in pairs),
                "target": TARGETS.get(size),
            }
        )
    return {
        "measure": "guided over unguided drawing, transformers backend",
        "guidance": guidance,
        "rounds": rounds,
        "prompt_ids": statistics.median(map(len, rows)),
        "negative_prompt_ids": len(negative),
        "codes": processor.vocabulary.num_tokens,
        **circumstances(model),
        "batches": batches,
    }


def circumstances(model: Any) -> dict[str, Any]:
    """What a timing was made with: the model's size and format, the machine, the versions."""
    return {
        "num_parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _draw_ids(processor: Any, prompt: str) -> list[int]:
    messages = processor.draw_messages(prompt)
    return processor.render(messages, add_generation_prompt=True).input_ids
