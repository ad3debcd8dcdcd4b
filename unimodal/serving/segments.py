"""Image segments through vLLM's engine: one image is one request, or a guided pair of requests.

The front end's half of what serving/logits.py describes. An image segment is a request of its own
whose prompt ends in ``<|image_start|>`` and that can write nothing but the codes of one image.
Prefix caching makes the seam to the text before it nearly free.
"""

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from tokenizer_hf.errors import ConfigurationError, MessageError, ServingError
from tokenizer_hf.vocabulary import ImageVocabulary
from unimodal.generation.grammar import ImageSpanGrammar
from unimodal.serving.logits import CONDITIONAL, UNCONDITIONAL, Segment

MAX_IDLE_RESTARTS = 20
"""Restarts of a pair in a row that bring no new code, before the request is given up."""

COMPANION_TOKENS = 32
"""Most tokens that a companion request writes, see :meth:`ImageSegments._stepping_engine`."""


T = TypeVar("T")

OnIds = Callable[[list[int]], None]
"""Takes all ids that there are so far, each time there are more."""


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """How one image is drawn."""

    temperature: float
    top_k: int
    guidance: float
    budget: int | None
    seed: int


class ImageSegments:
    """Draws images through an engine.

    Args:
        engine_client: vLLM's ``EngineClient``.
        vocabulary: of the served model.
    """

    def __init__(self, engine_client: Any, vocabulary: ImageVocabulary) -> None:
        self.engine = engine_client
        self.vocabulary = vocabulary
        config = engine_client.vllm_config
        self.max_model_len: int = config.model_config.max_model_len
        self.guidance_problem = guidance_problem(config)
        """Why this server cannot draw with guidance; None where it can."""
        self.pairs = 0
        """Guided drawings begun since the server started."""
        self.restarts = 0
        """Times that a pair fell out of step, since the server started."""
        self._running = 0
        """Requests of ours that are in the engine."""
        self._seats = asyncio.Semaphore(max(1, config.scheduler_config.max_num_seqs // 2))
        self._ranks = itertools.cycle(range(config.parallel_config.data_parallel_size))
        self._many_ranks = config.parallel_config.data_parallel_size > 1

    def check(
        self, prompt: Sequence[int], negative: Sequence[int] | None, settings: DrawSettings
    ) -> ImageSpanGrammar:
        """Say before anything runs whether an image can be drawn behind these prompts.

        Raises:
            ConfigurationError: the budget is not one of the image tokenizer, or guidance was asked
                for and this server cannot give it.
            MessageError: the image does not fit into the context behind the prompt.
        """
        grammar = ImageSpanGrammar(self.vocabulary, max_codes=settings.budget, mode="image")
        if settings.guidance != 1 and self.guidance_problem:
            raise ConfigurationError(self.guidance_problem)
        longest = max(len(prompt), len(negative or ()))
        if longest + grammar.max_span_ids > self.max_model_len:
            raise MessageError(
                f"the prompt has {longest} ids and the image takes up to {grammar.max_span_ids} "
                f"more, but this server's context is {self.max_model_len}; shorten the messages or "
                "start it with a larger --max-model-len"
            )
        return grammar

    async def draw(
        self,
        prompt: Sequence[int],
        negative: Sequence[int],
        settings: DrawSettings,
        *,
        on_codes: OnIds | None = None,
        lora_request: Any = None,
        priority: int = 0,
    ) -> list[int]:
        """Draw one image.

        Cancelling the task that awaits this aborts what runs in the engine.

        Args:
            prompt: the ids that the image follows, without ``<|image_start|>``.
            negative: the unconditional prompt; used where guidance is not 1.
            settings: how.
            on_codes: called on the event loop with all code ids of the image that are final so far,
                each time there are more. A pair's are those that both requests agree on. Leave it
                out where nobody looks: the engine then reports once, at the end.
            lora_request: vLLM's adapter, if one was asked for.
            priority: vLLM's scheduling priority.

        Returns:
            The whole span: ``<|image_start|>``, code ids, ``<|image_end|>``. It is legal.

        Raises:
            ConfigurationError, MessageError: as :meth:`check`.
            ServingError: a pair fell out of step again and again (the server is overloaded), or the
                engine broke the request off.
        """
        grammar = self.check(prompt, negative, settings)
        start, end = self.vocabulary.start_token_id, self.vocabulary.end_token_id
        segment = Segment(
            min_codes=grammar.min_codes or 0,
            max_codes=grammar.max_codes or 0,
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=settings.seed,
            guidance=settings.guidance,
        )
        options = {"lora_request": lora_request, "priority": priority}
        most = grammar.max_span_ids - 2
        report = on_codes and self._reporter(on_codes)
        if settings.guidance == 1:
            written = await self._run([*prompt, start], segment, most, options, report)
        else:
            async with self._seats:
                self.pairs += 1
                prompts = ([*prompt, start], [*negative, start])
                written = await self._run_pair(prompts, segment, most, options, report)
        span = [start, *written, *([] if written[-1:] == [end] else [end])]
        problem = grammar.check_span(span)
        if problem:
            raise ServingError(f"the engine broke an image off: {problem}; ask for it again")
        return span

    def _reporter(self, on_codes: OnIds) -> OnIds:
        """Return what takes ids so far and passes codes on, once each time there are more."""
        reported = 0

        def report(ids: list[int]) -> None:
            nonlocal reported
            codes = ids[:-1] if ids[-1:] == [self.vocabulary.end_token_id] else ids
            if len(codes) > reported:
                reported = len(codes)
                on_codes(codes)

        return report

    async def _run(
        self,
        prompt: list[int],
        segment: Segment,
        max_tokens: int,
        options: dict[str, Any],
        report: OnIds | None = None,
    ) -> list[int]:
        """Run one request to its end and return what it wrote."""
        params = SamplingParams(
            temperature=0.0,  # the code is drawn in logits.py, which leaves one id to choose from
            max_tokens=max_tokens,
            stop_token_ids=[self.vocabulary.start_token_id, self.vocabulary.end_token_id],
            ignore_eos=True,
            detokenize=False,
            # Every output costs the API process time, so none on the way where nobody looks.
            output_kind=RequestOutputKind.DELTA if report else RequestOutputKind.FINAL_ONLY,
            extra_args=segment.to_extra_args(),
        )
        request_id = f"image-{uuid.uuid4().hex}"
        written: list[int] = []
        self._running += 1
        try:
            # tokens_input, unlike a plain dictionary, takes no detour over the tokenizer threads:
            # the two requests of a pair leave here together.
            async for output in self.engine.generate(
                tokens_input(prompt), params, request_id, **options
            ):
                written.extend(output.outputs[0].token_ids)
                if report:
                    report(list(written))
        finally:
            self._running -= 1
        return written

    async def _run_pair(
        self,
        prompts: tuple[list[int], list[int]],
        segment: Segment,
        max_tokens: int,
        options: dict[str, Any],
        report: OnIds | None,
    ) -> list[int]:
        """Run a pair, resumed behind the last common id as often as it falls out of step."""
        common: list[int] = []
        idle = 0
        if self._many_ranks:
            options = dict(options, data_parallel_rank=next(self._ranks))
        while True:
            rest = replace(segment, done=len(common), pair=uuid.uuid4().hex)
            reports = self._reports_of_halves(common, report)
            room = max_tokens - len(common)
            halves = [
                ([*prompt, *common], replace(rest, role=role), room, options, report_half)
                for prompt, role, report_half in zip(
                    prompts, (CONDITIONAL, UNCONDITIONAL), reports, strict=True
                )
            ]
            if idle or not self._running:
                async with self._stepping_engine(prompts[0][:1], options):
                    written = await together(self._run(*half) for half in halves)
            else:
                written = await together(self._run(*half) for half in halves)
            fresh = self._agreed(*written)
            common += fresh
            if len(common) == max_tokens or common[-1:] == [self.vocabulary.end_token_id]:
                return common
            self.restarts += 1
            idle = 0 if fresh else idle + 1
            if idle > MAX_IDLE_RESTARTS:
                raise ServingError(
                    f"a guided drawing fell out of step {idle} times in a row; the server is "
                    "overloaded: try again later, or with guidance_scale 1"
                )
            await asyncio.sleep(0.01 * idle)

    def _reports_of_halves(
        self, common: Sequence[int], report: OnIds | None
    ) -> tuple[OnIds | None, OnIds | None]:
        """Return what takes the ids of either request of a pair and reports those of both."""
        if report is None:
            return None, None
        before = list(common)
        so_far: list[list[int]] = [[], []]

        def take(half: int, ids: list[int]) -> None:
            so_far[half] = ids
            report([*before, *self._agreed(*so_far)])

        return partial(take, 0), partial(take, 1)

    @asynccontextmanager
    async def _stepping_engine(
        self, prompt: list[int], options: dict[str, Any]
    ) -> AsyncIterator[None]:
        """Keep the engine busy with a short companion request.

        An idle engine starts a step as soon as one request is there, so of a pair it would see the
        first alone, every time. A busy one takes in all that arrived when its step is over.
        """
        params = SamplingParams(
            temperature=0.0,
            max_tokens=COMPANION_TOKENS,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        request_id = f"companion-{uuid.uuid4().hex}"
        companion = self.engine.generate(tokens_input(prompt), params, request_id, **options)
        try:
            await anext(companion)
            yield
        finally:
            await companion.aclose()

    def _agreed(self, first: list[int], second: list[int]) -> list[int]:
        """Return the ids that both requests wrote, up to the first difference or forced stop."""
        agreed = []
        for one, other in zip(first, second, strict=False):
            if one != other or one == self.vocabulary.start_token_id:
                break
            agreed.append(one)
        return agreed


async def together(requests: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines side by side; if one fails or this is cancelled, cancel them all."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def guidance_problem(config: Any) -> str | None:
    """Return why an engine of this configuration cannot guide, or None.

    Both prompts of a pair have to fit into one step once their full blocks are cached; else a pair
    could go on missing its partner for ever.
    """
    scheduler, block = config.scheduler_config, config.cache_config.block_size
    needed = 2 * block + scheduler.max_num_seqs
    flags = []
    if scheduler.max_num_seqs < 2:
        flags.append(f"--max-num-seqs is {scheduler.max_num_seqs}, expected 2 or more")
    if scheduler.max_num_batched_tokens < needed:
        flags.append(
            f"--max-num-batched-tokens is {scheduler.max_num_batched_tokens}, expected {needed} or "
            "more (two blocks and one id for every sequence)"
        )
    if not config.cache_config.enable_prefix_caching:
        flags.append("prefix caching is off, expected it on: leave out --no-enable-prefix-caching")
    if not flags:
        return None
    return f"guidance needs other server flags: {'; '.join(flags)}. Or use guidance_scale 1"
