"""What our logits processor costs in a step of vLLM's engine, beside a step of the model itself."""

import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from vllm import SamplingParams

from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.vocabulary import ImageVocabulary
from unimodal.generation.benchmark import circumstances
from unimodal.serving.logits import CONDITIONAL, UNCONDITIONAL, ImageLogitsProcessor, Segment
from unimodal.serving.vllm_private import BatchUpdate

TARGET = 0.05  # masking over model step that we promise, at batch 64
KINDS = {"images": "i", "pairs": "cu", "texts": "t", "mixed": "icut"}
"""What the rows of a batch are, over and over: image, conditional, unconditional, text."""


def measure_masking(
    folder: str,
    model: Any,
    vocabulary: ImageVocabulary,
    *,
    batch_sizes: Sequence[int] = (1, 16, 64),
    rounds: int = 31,
    temperature: float = 1.0,
    prompt_ids: int = 32,
) -> dict[str, Any]:
    """Time ``ImageLogitsProcessor.apply`` beside a decode step of the model at the same batch.

    Each round takes one decode step with transformers and one ``apply`` of each kind of batch on
    logits of the model's shape, so that a machine that gets slower slows all of them. The time of
    ``apply`` holds the drawing of the codes, which vLLM's sampler is spared.

    Args:
        folder: a merged model, where the processor reads the image vocabulary.
        model: the same model, loaded.
        vocabulary: its image vocabulary.
        batch_sizes: rows in a batch.
        rounds: counted rounds; five more before them are not.
        temperature: 0 is greedy.
        prompt_ids: length of the context that the decode steps look at.

    Returns:
        Plain JSON: the settings, the machine, and ``batches``: by batch size the median
        milliseconds of a ``step``, and for each kind those of ``apply``, the median of the rounds'
        ratios, and ``cpu_ratio``, the same of processor time, which other programs on the machine
        disturb less. A kind that does not fit into the batch is left out.

    Raises:
        ConfigurationError: fewer than one round.
    """
    if rounds < 1:
        raise ConfigurationError(f"{rounds} rounds came, expected at least 1")
    batches = []
    for size in batch_sizes:
        kinds = {name: kind for name, kind in KINDS.items() if len(kind) <= size}
        processors = {
            name: _processor(folder, vocabulary, model.device, kind, size, temperature)
            for name, kind in kinds.items()
        }
        decode = _Steps(model, size, prompt_ids, rounds + 5)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("step", *kinds)}
        for _ in range(rounds + 5):
            logits = _timed(times["step"], model.device, decode.take)
            for name, processor in processors.items():
                _timed(times[name], model.device, processor.apply, logits.float().clone())
        steps = times["step"][5:]
        entry: dict[str, Any] = {
            "batch": size,
            "step_ms": 1000 * statistics.median(wall for wall, _ in steps),
        }
        for name in kinds:
            pairs = list(zip(times[name][5:], steps, strict=True))
            entry[name] = {
                "apply_ms": 1000 * statistics.median(wall for (wall, _), _ in pairs),
                "ratio": statistics.median(one[0] / step[0] for one, step in pairs),
                "cpu_ratio": statistics.median(one[1] / step[1] for one, step in pairs),
            }
        batches.append(entry)
    return {
        "measure": "ImageLogitsProcessor.apply over a decode step, transformers backend",
        "temperature": temperature,
        "rounds": rounds,
        "context": prompt_ids,
        "vocabulary": vocabulary.vocab_size,
        "codes": [stop - first for first, stop in vocabulary.ranges],
        **circumstances(model),
        "target": {"batch": 64, "ratio": TARGET},
        "batches": batches,
    }


def _timed(
    times: list[tuple[float, float]], device: torch.device, call: Any, *arguments: Any
) -> Any:
    """Call, wait for the device, and add the seconds that it took, of the clock and of the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = call(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return result


class _Steps:
    """Decode steps of a batch: one id per row behind a context of random ids."""

    def __init__(self, model: Any, size: int, prompt_ids: int, room: int) -> None:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and prompt_ids + room > context:
            raise ConfigurationError(
                f"{room} rounds behind {prompt_ids} ids were asked for, but the model reads at "
                f"most {context} ids; take fewer rounds"
            )
        self.model = model
        self.cache = DynamicCache(config=model.config)
        generator = torch.Generator().manual_seed(0)
        top = model.config.get_text_config().vocab_size
        ids = torch.randint(top, (size, prompt_ids), generator=generator).to(model.device)
        self.ids = ids[:, :1]
        with torch.inference_mode():
            model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def take(self) -> Tensor:
        """Run one step and return its logits (B, V)."""
        with torch.inference_mode():
            output = self.model(
                self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        return output.logits[:, -1]


def _processor(
    folder: str,
    vocabulary: ImageVocabulary,
    device: torch.device,
    kind: str,
    size: int,
    temperature: float,
) -> ImageLogitsProcessor:
    """A processor in the middle of a batch of ``size`` rows, as vLLM's V1 runner would fill it."""
    config = SimpleNamespace(model_config=SimpleNamespace(model=folder, revision=None))
    processor = ImageLogitsProcessor(config, device)
    first = vocabulary.to_codes([first for first, _ in vocabulary.ranges])
    span = vocabulary.span(first * vocabulary.num_tokens)
    written = span[1 : len(span) // 2]
    added: list[tuple[int, SamplingParams, list[int], list[int]]] = []
    for row in range(size - size % len(kind)):
        role = {"c": CONDITIONAL, "u": UNCONDITIONAL}.get(kind[row % len(kind)])
        segment = Segment(
            min_codes=vocabulary.num_tokens,
            max_codes=vocabulary.num_tokens,
            temperature=temperature,
            top_k=0,
            seed=row // len(kind),
            guidance=3.0 if role else 1.0,
            pair=str(row // len(kind)) if role else None,
            role=role or CONDITIONAL,
        )
        text = kind[row % len(kind)] == "t"
        params = SamplingParams(extra_args=None if text else segment.to_extra_args())
        added.append((row, params, [], list(written)))
    processor.update_state(BatchUpdate(batch_size=size, removed=[], added=added, moved=[]))
    return processor
