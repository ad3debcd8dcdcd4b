"""Image segments through vLLM's engine: one image is one request, or a guided pair of requests.

The front end's half of what serving/logits.py describes. An image segment is a request of its own
whose prompt ends in ``<|image_start|>`` and that can write nothing but the codes of one image.
Prefix caching makes the seam to the text before it nearly free.

The requests of a pair have to stand in every step of the engine together, and the engine knows
nothing of pairs. So each is sent in two parts, as one of vLLM's streaming-input sessions. The first
part is the prompt but for its last id: whenever it is admitted, and in however many chunks it is
read, the request then waits and keeps its place in the batch and its part of the cache. The last
ids of both are sent when both wait, early in a step of the engine. They need no admission and two
positions of the next step's budget, so they go in together.
"""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from vllm import SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.exceptions import VLLMServerError
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from tokenizer_hf.errors import ConfigurationError, MessageError, ServingError
from tokenizer_hf.vocabulary import ImageVocabulary
from unimodal.generation.candidates import Reading
from unimodal.generation.grammar import ImageSpanGrammar
from unimodal.serving.logits import CONDITIONAL, UNCONDITIONAL, Segment
from unimodal.serving.metrics import PAIRS, pair_restarted, waited
from unimodal.serving.vllm_private import api_process_count

MAX_IDLE_RESTARTS = 20
"""Restarts of a pair in a row that bring no new code, before the request is given up."""

HOLD_SECONDS = 10.0
"""How long a request waits in the engine for its partner; then both are withdrawn and sent again.
It keeps cache blocks that vLLM cannot take away, and what runs beside it may need just these."""

COMPANION_TOKENS = 32
"""Most tokens that a companion request writes, see :meth:`ImageSegments._early_in_a_step`."""

BURST_SECONDS = 0.0005
"""Outputs that come closer together than this are of one step."""

LONGEST_STEP_SECONDS = 0.2
"""A longer pause between outputs is taken for an idle engine."""


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


class _OutOfStep(Exception):
    """The two requests of a pair are not in the same step of the engine."""


class _Seats:
    """Room for pairs in one engine: places in its batch, tokens in its cache.

    All pairs that run fit into the engine together, so none waits for what another one keeps.
    """

    def __init__(self, pairs: int, tokens: float) -> None:
        self.pairs = pairs
        self.tokens = tokens
        self.load = 0
        """Pairs that run or wait for a seat."""
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def taken(self, tokens: int) -> AsyncIterator[None]:
        """Keep the room of one pair while the block runs; first come, first served."""
        self.load += 1
        try:
            async with self._turn:
                while self.pairs < 1 or self.tokens < tokens:
                    self._freed.clear()
                    await self._freed.wait()
                self.pairs -= 1
                self.tokens -= tokens
            try:
                yield
            finally:
                self.pairs += 1
                self.tokens += tokens
                self._freed.set()
        finally:
            self.load -= 1


class _Steps:
    """When the engine's steps begin, as far as the outputs of our own requests tell."""

    def __init__(self) -> None:
        self.running = 0
        """Requests of ours that get an output in every step."""
        self._began = self._last = time.monotonic()
        self._length = 0.0
        self._next = asyncio.Event()

    def tick(self) -> None:
        """Take note of an output. The outputs of one step come in one burst."""
        now = time.monotonic()
        if now - self._last > BURST_SECONDS:
            self._length = min(now - self._began, LONGEST_STEP_SECONDS)
            self._began = now
            self._next.set()
            self._next = asyncio.Event()
        self._last = now

    @property
    def early(self) -> bool:
        """Most of the present step is still to come."""
        return time.monotonic() - self._began < self._length / 3

    async def next(self) -> None:
        """Wait for the next step to begin, or for so long that there seems to be none."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_STEP_SECONDS):
                await self._next.wait()


@dataclass(frozen=True)
class _Engine:
    """One engine (there is one per data-parallel rank), as far as our own requests tell."""

    seats: _Seats
    steps: _Steps
    door: asyncio.Lock
    """Held by the pair that is being let in."""


@dataclass(frozen=True)
class _Call:
    """What the requests of one drawing have in common."""

    engine: _Engine
    options: dict[str, Any]
    """For ``EngineClient.generate``."""
    report: OnIds | None


class _Meeting:
    """Where the two requests of a pair wait for each other inside the engine."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        """Set once both are there: the rest of their prompts may follow."""
        self._waiting = self._entered = 0
        self._first, self._both, self._in = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def wait(self) -> None:
        """One of the two has been read and waits in the engine."""
        self._waiting += 1
        (self._first if self._waiting == 1 else self._both).set()

    def enter(self) -> None:
        """The rest of one of the two has been sent."""
        self._entered += 1
        if self._entered == 2:
            self._in.set()

    async def both_wait(self) -> None:
        """Wait until both wait, but not for ever once the first does.

        Raises:
            _OutOfStep: the other one did not come.
        """
        await self._first.wait()
        try:
            async with asyncio.timeout(HOLD_SECONDS):
                await self._both.wait()
        except TimeoutError as error:
            raise _OutOfStep from error

    async def open(self) -> None:
        """Let both send the rest, and wait until they have."""
        self.opened.set()
        await self._in.wait()


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
        self.block_size: int = config.cache_config.block_size
        self.cache_tokens = cache_tokens(config)
        """Tokens that the cache of one engine holds."""
        self.guidance_problem = guidance_problem(config)
        """Why this server cannot draw with guidance; None where it can."""
        self.candidates_problem = candidates_problem(config)
        """Why this server cannot judge candidates; None where it can."""
        self.pairs = 0
        """Guided drawings begun since the server started."""
        self.restarts = 0
        """Times that a pair fell out of step, since the server started."""
        # Each process of vLLM's front end has its own count, so each takes its share.
        share = api_process_count(config)
        self._engines = [
            _Engine(
                _Seats(max(1, max_num_seqs(config) // 2 // share), self.cache_tokens / share),
                _Steps(),
                asyncio.Lock(),
            )
            for _ in range(config.parallel_config.data_parallel_size)
        ]

    def check(
        self, prompt: Sequence[int], negative: Sequence[int] | None, settings: DrawSettings
    ) -> ImageSpanGrammar:
        """Say before anything runs whether an image can be drawn behind these prompts.

        Raises:
            ConfigurationError: the budget is not one of the image tokenizer, or guidance was asked
                for and this server cannot give it.
            MessageError: the image does not fit into the context behind the prompt, or a guided one
                not into the cache.
        """
        grammar = ImageSpanGrammar(self.vocabulary, max_codes=settings.budget, mode="image")
        if settings.guidance != 1 and self.guidance_problem:
            raise ConfigurationError(self.guidance_problem)
        if not prompt or (settings.guidance != 1 and negative is not None and not negative):
            raise MessageError("a prompt of an image has no ids, expected at least one")
        longest = max(len(prompt), len(negative or ()))
        if longest + grammar.max_span_ids > self.max_model_len:
            raise MessageError(
                f"the prompt has {longest} ids and the image takes up to {grammar.max_span_ids} "
                f"more, but this server's context is {self.max_model_len}; shorten the messages or "
                "start it with a larger --max-model-len"
            )
        if settings.guidance != 1 and self._pair_tokens(longest, grammar) > self.cache_tokens:
            raise MessageError(
                f"the prompt has {longest} ids and a guided image takes two such requests, but the "
                f"cache of this server holds {self.cache_tokens:.0f} tokens; shorten the messages, "
                "use guidance_scale 1, or start the server with a larger cache"
            )
        return grammar

    def _pair_tokens(self, longest: int, grammar: ImageSpanGrammar) -> int:
        """Cache of a pair with prompts of up to ``longest`` ids, in tokens of whole blocks."""
        blocks = math.ceil((longest + grammar.max_span_ids) / self.block_size)
        return 2 * blocks * self.block_size

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
            prompt: the ids that the image follows, without ``<|image_start|>``; not empty.
            negative: the unconditional prompt; used, and not empty, where guidance is not 1.
            settings: how.
            on_codes: called on the event loop with all code ids of the image that are final so far,
                each time there are more. A pair's are those that both requests agree on. Leave it
                out where nobody looks: an unguided request then reports once, at its end.
            lora_request: vLLM's adapter, if one was asked for.
            priority: vLLM's scheduling priority.

        Returns:
            The whole span: ``<|image_start|>``, code ids, ``<|image_end|>``. It is legal.

        Raises:
            ConfigurationError, MessageError: as :meth:`check`.
            ServingError: a pair fell out of step again and again (the server is overloaded), or the
                engine failed or broke the request off.
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
        rank = min(range(len(self._engines)), key=lambda rank: self._engines[rank].seats.load)
        if len(self._engines) > 1 and settings.guidance != 1:
            options["data_parallel_rank"] = rank
        call = _Call(self._engines[rank], options, on_codes and self._reporter(on_codes))
        most = grammar.max_span_ids - 2
        if settings.guidance == 1:
            written = await self._draw_alone([*prompt, start], segment, most, call)
        else:
            tokens = self._pair_tokens(max(len(prompt), len(negative)), grammar)
            began = time.monotonic()
            async with call.engine.seats.taken(tokens):
                waited(time.monotonic() - began)
                PAIRS.inc()
                self.pairs += 1
                prompts = ([*prompt, start], [*negative, start])
                written = await self._draw_pair(prompts, segment, most, call)
        span = [start, *written, *([] if written[-1:] == [end] else [end])]
        problem = grammar.check_span(span)
        if problem:
            raise ServingError(f"the engine broke an image off: {problem}; ask for it again")
        return span

    async def mean_log_likelihood(
        self, reading: Reading, *, lora_request: Any = None, priority: int = 0
    ) -> float:
        """Return log p(answer | what stands before it), in nats an id that counts.

        Args:
            reading: the conversation.
            lora_request, priority: as in :meth:`draw`.

        Raises:
            MessageError: a conversation that does not fit into the context.
            ServingError: the engine failed or broke the request off.
        """
        ids = reading.ids
        if len(ids) >= self.max_model_len:
            raise MessageError(
                f"judging a drawing takes {len(ids) + 1} ids, but this server's context is "
                f"{self.max_model_len}; shorten the prompt, or ask for one candidate"
            )
        options = {"lora_request": lora_request, "priority": priority}
        call = _Call(self._engines[0], options, None)
        params = self._params(1, kind=RequestOutputKind.FINAL_ONLY, prompt_logprobs=0)
        found: list[float] = []

        def take(output: Any) -> None:
            for position in range(len(ids) - reading.length, len(ids)):
                found.append(output.prompt_logprobs[position][ids[position]].logprob)

        await self._run(tokens_input(list(ids)), params, call, take)
        return sum(found) / reading.counted

    def _reporter(self, on_codes: OnIds) -> OnIds:
        """Return what takes ids so far and passes codes on, once each time there are more."""
        reported = 0
        controls = self.vocabulary.control_token_ids

        def report(ids: list[int]) -> None:
            nonlocal reported
            codes = [token_id for token_id in ids if token_id not in controls]
            if len(codes) > reported:
                reported = len(codes)
                on_codes(codes)

        return report

    async def _draw_alone(
        self,
        prompt: list[int],
        segment: Segment,
        max_tokens: int,
        call: _Call,
    ) -> list[int]:
        """Run one request to its end and return what it wrote."""
        written: list[int] = []

        def take(output: Any) -> None:
            written.extend(output.outputs[0].token_ids)
            if call.report:
                call.report(list(written))

        # Every output costs the API process time, so none on the way where nobody looks.
        kind = RequestOutputKind.DELTA if call.report else RequestOutputKind.FINAL_ONLY
        params = self._params(max_tokens, segment, kind)
        await self._run(tokens_input(prompt), params, call, take)
        return written

    async def _draw_pair(
        self,
        prompts: tuple[list[int], list[int]],
        segment: Segment,
        max_tokens: int,
        call: _Call,
    ) -> list[int]:
        """Run a pair, resumed behind the last common id as often as it falls out of step."""
        common: list[int] = []
        idle = 0
        while True:
            fresh = await self._run_pair(
                ([*prompts[0], *common], [*prompts[1], *common]),
                replace(segment, done=len(common), pair=uuid.uuid4().hex),
                max_tokens - len(common),
                replace(call, report=_behind(common, call.report)),
            )
            common += fresh
            if len(common) == max_tokens or common[-1:] == [self.vocabulary.end_token_id]:
                return common
            self.restarts += 1
            pair_restarted()
            idle = 0 if fresh else idle + 1
            if idle > MAX_IDLE_RESTARTS:
                raise ServingError(
                    f"a guided drawing fell out of step {idle} times in a row; the server is "
                    "overloaded: try again later, or with guidance_scale 1"
                )
            await asyncio.sleep(0.01 * idle)

    async def _run_pair(
        self,
        prompts: tuple[list[int], list[int]],
        segment: Segment,
        max_tokens: int,
        call: _Call,
    ) -> list[int]:
        """Run both requests until they are done or out of step; return the ids of both."""
        meeting = _Meeting()
        written: tuple[list[int], list[int]] = ([], [])

        def grown() -> None:
            if call.report:
                call.report(self._agreed(*written))

        halves = [
            self._run_half(prompt, half, max_tokens, call, meeting, ids, grown)
            for prompt, half, ids in zip(
                prompts,
                (replace(segment, role=CONDITIONAL), replace(segment, role=UNCONDITIONAL)),
                written,
                strict=True,
            )
        ]
        try:
            with suppress(_OutOfStep):
                await together([*halves, self._let_in(meeting, prompts[0][:1], call)])
        finally:
            call.engine.steps.running -= meeting.opened.is_set()
        return self._agreed(*written)

    async def _run_half(
        self,
        prompt: list[int],
        segment: Segment,
        max_tokens: int,
        call: _Call,
        meeting: _Meeting,
        written: list[int],
        grown: Callable[[], None],
    ) -> None:
        """Run one request of a pair, adding what it writes to ``written``.

        Raises:
            _OutOfStep: it stood in a step without its partner.
        """
        hold = self._params(1)
        held = False

        async def parts() -> AsyncIterator[StreamingInput]:
            yield StreamingInput(tokens_input(prompt[:-1]), hold)
            await meeting.opened.wait()
            params = self._params(max_tokens, segment)
            yield StreamingInput(tokens_input(prompt[-1:]), params)
            meeting.enter()

        def take(output: Any) -> None:
            nonlocal held
            ids = output.outputs[0].token_ids
            if not held:
                # The id behind the first part says that it has been read. vLLM drops it.
                held, ids = True, ids[1:]
                meeting.wait()
            written.extend(ids)
            if written[-1:] == [self.vocabulary.start_token_id]:
                raise _OutOfStep
            grown()

        await self._run(parts(), hold, call, take)

    async def _let_in(self, meeting: _Meeting, prompt: list[int], call: _Call) -> None:
        """Send the last ids of both requests of a pair so that the next step takes in both."""
        await meeting.both_wait()
        async with self._early_in_a_step(prompt, call):
            call.engine.steps.running += 1
            await meeting.open()

    @asynccontextmanager
    async def _early_in_a_step(self, prompt: list[int], call: _Call) -> AsyncIterator[None]:
        """Run the block, one at a time, while most of a step of the engine is still to come.

        A busy engine takes in what has arrived when its step is over. An idle one would start on
        the first of two requests alone, so a short companion request keeps it busy meanwhile.
        """
        steps = call.engine.steps
        async with call.engine.door:
            companion = None
            if not steps.running:
                params = self._params(COMPANION_TOKENS)
                run = self._run(tokens_input(prompt), params, call, lambda _output: None)
                companion = asyncio.ensure_future(run)
            try:
                if companion or not steps.early:
                    await steps.next()
                yield
            finally:
                if companion:
                    companion.cancel()
                    await asyncio.gather(companion, return_exceptions=True)

    def _params(
        self,
        max_tokens: int,
        segment: Segment | None = None,
        kind: RequestOutputKind = RequestOutputKind.DELTA,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        stop = [self.vocabulary.start_token_id, self.vocabulary.end_token_id]
        return SamplingParams(
            temperature=0.0,  # the code is drawn in logits.py, which leaves one id to choose from
            max_tokens=max_tokens,
            stop_token_ids=stop if segment else None,
            ignore_eos=True,
            detokenize=False,
            output_kind=kind,
            prompt_logprobs=prompt_logprobs,  # 0: of the prompt's own ids
            extra_args=segment.to_extra_args() if segment else None,
            skip_clone=True,  # made for one request and changed by nobody
        )

    async def _run(
        self,
        prompt: Any,
        params: SamplingParams,
        call: _Call,
        take: Callable[[Any], None],
    ) -> None:
        """Run one request to its end and hand over vLLM's outputs, piece by piece.

        Raises:
            ServingError: the engine failed, or somebody aborted the request.
        """
        request_id = f"image-{uuid.uuid4().hex}"
        try:
            # tokens_input, unlike a plain dictionary, takes no detour over the tokenizer threads.
            async with aclosing(
                self.engine.generate(prompt, params, request_id, **call.options)
            ) as outputs:
                async for output in outputs:
                    call.engine.steps.tick()
                    [piece] = output.outputs
                    if piece.finish_reason in ("abort", "error"):
                        raise ServingError(
                            f"the engine broke an image off ({piece.finish_reason}); ask for it "
                            "again"
                        )
                    take(output)
        except VLLMServerError as error:
            raise ServingError(
                f"the engine failed ({type(error).__name__}); try again later, and look into the "
                "server's log"
            ) from error

    def _agreed(self, first: list[int], second: list[int]) -> list[int]:
        """Return the ids that both requests wrote, up to the first difference or forced stop."""
        agreed = []
        for one, other in zip(first, second, strict=False):
            if one != other or one == self.vocabulary.start_token_id:
                break
            agreed.append(one)
        return agreed


def _behind(before: Sequence[int], report: OnIds | None) -> OnIds | None:
    """Return what reports the ids that are behind ``before`` together with it."""
    if report is None:
        return None
    first = list(before)
    return lambda ids: report([*first, *ids])


async def together(requests: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines side by side; if one fails or this is cancelled, cancel them all.

    Returns or raises when none of them runs any more.
    """
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    except Exception:
        current = asyncio.current_task()
        if current and current.cancelling():  # the failure of one came first and would hide it
            raise asyncio.CancelledError from None
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def max_num_seqs(config: Any) -> int:
    """Return how many requests one engine of this configuration runs at once."""
    scheduler = config.scheduler_config
    return int(getattr(scheduler, "max_num_active_seqs", None) or scheduler.max_num_seqs)


def cache_tokens(config: Any) -> float:
    """Return how many tokens the cache of one engine holds; infinity where vLLM does not say."""
    tokens = getattr(config.cache_config, "kv_cache_size_tokens", None) or math.inf
    return tokens - config.cache_config.block_size  # vLLM keeps one block for itself


def candidates_problem(config: Any) -> str | None:
    """Return why an engine of this configuration cannot judge candidates, or None."""
    if config.lora_config is None:
        return None
    return (
        "candidates are judged by log-probabilities of prompts, which vLLM cannot compute where "
        "adapters are loaded; merge the adapter (`unimodal merge-adapter`), or ask for one"
    )


def guidance_problem(config: Any) -> str | None:
    """Return why an engine of this configuration cannot guide, or None.

    Both requests of a pair have to fit into one step beside all others; else a pair could go on
    missing its partner for ever.
    """
    scheduler, rows = config.scheduler_config, max_num_seqs(config)
    budget = min(
        scheduler.max_num_batched_tokens,
        getattr(scheduler, "max_num_scheduled_tokens", None) or math.inf,
    )
    flags = []
    if rows < 2:
        flags.append(f"--max-num-seqs is {rows}, expected 2 or more")
    if budget < rows:
        flags.append(
            f"--max-num-batched-tokens is {budget}, expected {rows} or more (one id for every "
            "sequence)"
        )
    if not flags:
        return None
    return f"guidance needs other server flags: {'; '.join(flags)}. Or use guidance_scale 1"
