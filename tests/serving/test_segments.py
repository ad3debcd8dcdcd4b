"""Image segments and guided pairs in real engines, against transformers' guided loop, id by id.

Three engines in turn, each an in-process ``AsyncLLM`` with a tiny random model in float32: one with
vLLM's usual flags, one whose steps hold hardly any tokens, and one whose cache holds hardly any
blocks. What the engine did (preempted, still runs) is read from vLLM's own metrics.
"""

import asyncio
import itertools
import os
import random
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.toy import nested_image_tokenizer, save_llm
from tokenizer_hf.errors import ConfigurationError, MessageError, ServingError
from unimodal.generation.sampling import SamplingSettings, generate
from unimodal.merge import merge
from unimodal.pipeline import Unimodal

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

LEAST, MOST = 2, 24
GUIDANCE = 3.0
TEXTS = [
    f"{count} {size} {colour} {shape}{' on a white background' * (index % 3)}"
    for index, (count, size, colour, shape) in enumerate(
        (count, size, colour, shape)
        for count in ("a", "two")
        for size in ("large", "small")
        for colour in ("red", "blue", "green")
        for shape in ("circle", "square", "star", "heart")
    )
]  # 48
FLAGS: dict[str, dict[str, Any]] = {
    "normal": {"max_num_seqs": 64},
    # A step holds four tokens: every prompt is read in many chunks, and two pairs fill the batch.
    "tiny": {"max_num_seqs": 4, "max_num_batched_tokens": 4},
    "starved": {
        "max_num_seqs": 16,
        "max_model_len": 160,
        "block_size": 32,
        "num_gpu_blocks_override": 16,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("segments")
    # vLLM's CPU kernels want heads of 32 at least.
    llm = save_llm(base / "llm", "qwen3", head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    nested_image_tokenizer(num_latent_tokens=MOST, codebook_size=64).save_pretrained(base / "it")
    return merge(llm, base / "it", base / "toy", vocab_mode="base")


@pytest.fixture(scope="module")
def model(folder: Path) -> Unimodal:
    return Unimodal.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def prompts(model: Unimodal) -> list[list[int]]:
    return [prompt_ids(model, text) for text in TEXTS]


@pytest.fixture(scope="module")
def negative(model: Unimodal) -> list[int]:
    return prompt_ids(model, "")


@pytest.fixture(scope="module")
def greedy(model: Unimodal, prompts: list[list[int]], negative: list[int]) -> list[list[int]]:
    """What transformers draws with guidance, without randomness."""
    settings = SamplingSettings(image_temperature=0, guidance=GUIDANCE)
    return drawn_by_transformers(model, prompts, negative, settings)


class Engine:
    """An engine, its event loop and our side of it."""

    def __init__(self, folder: Path, flags: dict[str, Any], model: Unimodal) -> None:
        from unimodal.serving.segments import ImageSegments

        self.loop = asyncio.new_event_loop()
        self.client = self.run(start(folder, flags))
        self.request_ids: list[str] = []
        self.segments = ImageSegments(self, model.processor.vocabulary)

    @property
    def vllm_config(self) -> Any:
        return self.client.vllm_config

    def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> Any:
        """Go on to the engine; the test learns the request's name."""
        self.request_ids.append(request_id)
        return self.client.generate(prompt, params, request_id, **options)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def draw(
        self, prompt: list[int], negative: list[int], seed: int = 0, **changes: Any
    ) -> Coroutine[Any, Any, list[int]]:
        from unimodal.serving.segments import DrawSettings

        on_codes = changes.pop("on_codes", None)
        values = {"temperature": 0.0, "top_k": 0, "guidance": GUIDANCE, "budget": None}
        settings = DrawSettings(**{**values, **changes}, seed=seed)
        return self.segments.draw(prompt, negative, settings, on_codes=on_codes)

    async def write(self, prompt: list[int], num_tokens: int) -> list[int]:
        """A text request, greedy, of exactly so many ids, as vLLM's own handlers send it."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        async for output in self.client.generate(tokens_input(prompt), params, random_name()):
            ids = list(output.outputs[0].token_ids)
        return ids

    async def close(self) -> None:
        """Shut the engine down and let its tasks on the loop end."""
        self.client.shutdown()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def settles(self, seconds: float = 2.0) -> bool:
        """Say whether vLLM runs no request any more within that time."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if metric("vllm:num_requests_running") == 0 == metric("vllm:num_requests_waiting"):
                return True
            await asyncio.sleep(0.05)
        return False


async def start(folder: Path, flags: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    processor = "unimodal.serving.logits:ImageLogitsProcessor"
    values = {"dtype": "float32", "enforce_eager": True, "logits_processors": [processor]}
    return AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **values, **flags))


class Engines:
    """Starts engines as they are asked for; one lives at a time."""

    def __init__(self, folder: Path, model: Unimodal) -> None:
        self.folder, self.model = folder, model
        self.name, self.live = "", None

    def get(self, name: str) -> Engine:
        if name != self.name:
            self.stop()
            self.name, self.live = name, Engine(self.folder, FLAGS[name], self.model)
        assert self.live is not None
        return self.live

    def stop(self) -> None:
        if self.live is not None:
            self.live.run(self.live.close())
            self.live.loop.close()
        self.name, self.live = "", None


@pytest.fixture(scope="module")
def engines(folder: Path, model: Unimodal) -> Iterator[Engines]:
    it = Engines(folder, model)
    yield it
    it.stop()


@pytest.fixture
def engine(request: pytest.FixtureRequest, engines: Engines) -> Engine:
    return engines.get(request.param)


def on(name: str) -> Any:
    """Run a test on this engine. Tests of one engine stand together, so that it starts once."""
    return pytest.mark.parametrize("engine", [name], indirect=True)


def prompt_ids(model: Unimodal, text: str) -> list[int]:
    processor = model.processor
    return processor.render(processor.draw_messages(text), add_generation_prompt=True).input_ids


def drawn_by_transformers(
    model: Unimodal,
    prompts: Sequence[list[int]],
    negative: list[int],
    settings: SamplingSettings,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    return generate(
        model.model,
        model.processor,
        prompts,
        settings,
        mode="image",
        negative_prompts=[negative] * len(prompts),
        seeds=seeds,
    )


def random_name() -> str:
    return f"text-{random.getrandbits(64):x}"


def metric(name: str) -> float:
    """Sum a metric of vLLM over its labels."""
    from prometheus_client import REGISTRY

    return sum(
        sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == name
    )


async def at_once(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    return list(await asyncio.gather(*work))


@on("normal")
def test_guided_ids_equal_those_of_transformers(
    engine: Engine, prompts: list[list[int]], negative: list[int], greedy: list[list[int]]
) -> None:
    drawn = engine.run(at_once([engine.draw(prompt, negative) for prompt in prompts[:32]]))
    assert drawn == greedy[:32]
    assert len({tuple(span) for span in drawn}) > 8


@on("normal")
def test_guided_ids_are_the_same_beside_captions_texts_and_unguided_drawings(
    engine: Engine,
    model: Unimodal,
    prompts: list[list[int]],
    negative: list[int],
    greedy: list[list[int]],
) -> None:
    vocabulary = model.processor.vocabulary
    plain = drawn_by_transformers(
        model, prompts[:8], negative, SamplingSettings(image_temperature=0)
    )
    captions = [[*prompt, *span, *negative] for prompt, span in zip(prompts, plain, strict=False)]
    expected = [engine.run(engine.write(caption, 30)) for caption in captions]

    async def later(work: Coroutine[Any, Any, Any], seconds: float) -> Any:
        await asyncio.sleep(seconds)
        return await work

    work: list[Coroutine[Any, Any, Any]] = [
        later(engine.draw(prompt, negative), 0.01 * index)
        for index, prompt in enumerate(prompts[:32])
    ]
    work += [
        later(engine.draw(prompt, negative, guidance=1.0), 0.03 * index)
        for index, prompt in enumerate(prompts[:8])
    ]
    work += [later(engine.write(ids, 30), 0.03 * index) for index, ids in enumerate(captions)]
    results = engine.run(at_once(work))
    assert results[:32] == greedy[:32]
    assert results[32:40] == plain
    assert results[40:] == expected
    assert not {i for ids in expected for i in ids} & set(vocabulary.new_token_ids)


@on("normal")
def test_each_pair_is_the_same_alone_and_among_48(
    engine: Engine,
    model: Unimodal,
    prompts: list[list[int]],
    negative: list[int],
    greedy: list[list[int]],
) -> None:
    settings = {"temperature": 1.0, "top_k": 40}

    async def one_by_one(**changes: Any) -> list[list[int]]:
        return [
            await engine.draw(prompt, negative, seed, **changes)
            for seed, prompt in enumerate(prompts)
        ]

    def among(**changes: Any) -> list[list[int]]:
        work = [engine.draw(prompt, negative, i, **changes) for i, prompt in enumerate(prompts)]
        return engine.run(at_once(work))

    assert len(prompts) == 48
    assert engine.run(one_by_one()) == among() == greedy
    sampled = engine.run(one_by_one(**settings))
    assert among(**settings) == sampled
    expected = drawn_by_transformers(
        model,
        prompts,
        negative,
        SamplingSettings(image_temperature=1.0, image_top_k=40, guidance=GUIDANCE),
        seeds=range(48),
    )
    assert sampled == expected != greedy


@on("normal")
@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_codes_are_reported_as_they_come(
    engine: Engine, prompts: list[list[int]], negative: list[int], guidance: float
) -> None:
    lists: list[list[int]] = []
    span = engine.run(engine.draw(prompts[0], negative, guidance=guidance, on_codes=lists.append))
    assert lists[-1] == span[1:-1]
    assert len(lists) > len(span) // 2
    for one, other in itertools.pairwise(lists):
        assert len(one) < len(other) and other[: len(one)] == one


class Stop(Exception):
    """Raised by a test inside a callback."""


@on("normal")
@pytest.mark.parametrize("partner", [0, 1])
def test_an_abort_of_one_partner_ends_the_other(
    engine: Engine, prompts: list[list[int]], negative: list[int], partner: int
) -> None:
    async def aborted() -> bool:
        engine.request_ids.clear()
        begun = asyncio.Event()
        drawing = asyncio.ensure_future(
            engine.draw(prompts[0], negative, on_codes=lambda _codes: begun.set())
        )
        await begun.wait()
        await engine.client.abort(engine.request_ids[partner])
        with pytest.raises(ServingError, match="broke an image off"):
            await drawing
        return await engine.settles()

    assert engine.run(aborted())
    assert_serves_on(engine, prompts, negative)


@on("normal")
def test_a_caller_that_leaves_or_fails_takes_both_requests_along(
    engine: Engine, prompts: list[list[int]], negative: list[int]
) -> None:
    def fail(codes: list[int]) -> None:
        raise Stop

    async def left() -> bool:
        begun = asyncio.Event()
        drawings = [
            asyncio.ensure_future(
                engine.draw(prompt, negative, on_codes=lambda _codes: begun.set())
            )
            for prompt in prompts
        ]
        await begun.wait()
        stopped = [drawing.cancel() for drawing in drawings]  # False: it was over already
        ends = await asyncio.gather(*drawings, return_exceptions=True)
        assert any(stopped)
        assert [type(end) is asyncio.CancelledError for end in ends] == stopped
        with pytest.raises(Stop):
            await engine.draw(prompts[0], negative, on_codes=fail)
        return await engine.settles()

    assert engine.run(left())
    assert_serves_on(engine, prompts, negative)


def assert_serves_on(engine: Engine, prompts: list[list[int]], negative: list[int]) -> None:
    """All seats are free again: as many pairs as there are seats for run at once."""
    [rank] = engine.segments._engines
    assert rank.seats.pairs == 32
    assert rank.seats.tokens == engine.segments.cache_tokens
    assert rank.seats.load == rank.steps.running == 0
    spans = engine.run(at_once([engine.draw(prompt, negative) for prompt in prompts[:33]]))
    assert len(spans) == 33


@on("tiny")
def test_guided_ids_equal_those_of_transformers_where_prompts_are_read_in_chunks(
    engine: Engine, prompts: list[list[int]], negative: list[int], greedy: list[list[int]]
) -> None:
    assert engine.vllm_config.scheduler_config.max_num_batched_tokens * 5 < min(map(len, prompts))
    drawn = engine.run(at_once([engine.draw(prompt, negative) for prompt in prompts[:32]]))
    assert drawn == greedy[:32]


@on("tiny")
def test_a_pair_waits_for_its_second_seat_inside_the_engine(
    engine: Engine, prompts: list[list[int]], negative: list[int], greedy: list[list[int]]
) -> None:
    """Three of four seats are taken: the first request is admitted long before the second."""
    before = engine.segments.restarts

    async def late() -> tuple[list[int], bool]:
        texts = [asyncio.ensure_future(engine.write(prompts[n], 60 + 40 * n)) for n in range(3)]
        await asyncio.sleep(0.05)
        span = await engine.draw(prompts[0], negative)
        still = not texts[2].done()
        await at_once(texts)
        return span, still

    span, still = engine.run(late())
    assert span == greedy[0]
    assert still
    # One is left to chance: the two last ids may fall into different steps on a busy machine.
    assert engine.segments.restarts <= before + 1


@on("tiny")
def test_a_pair_that_waits_too_long_for_its_second_seat_is_sent_again(
    engine: Engine,
    prompts: list[list[int]],
    negative: list[int],
    greedy: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from unimodal.serving import segments

    monkeypatch.setattr(segments, "HOLD_SECONDS", 0.05)
    before = engine.segments.restarts

    async def late() -> list[int]:
        texts = [asyncio.ensure_future(engine.write(prompts[n], 250)) for n in range(3)]
        await asyncio.sleep(0.05)
        span = await engine.draw(prompts[0], negative)
        await at_once(texts)
        return span

    assert engine.run(late()) == greedy[0]
    assert engine.segments.restarts > before


@on("starved")
def test_guided_ids_equal_those_of_transformers_through_preemptions(
    engine: Engine, prompts: list[list[int]], negative: list[int], greedy: list[list[int]]
) -> None:
    before = metric("vllm:num_preemptions_total")
    reports: list[list[list[int]]] = [[] for _ in range(32)]

    async def draw(index: int) -> list[int]:
        await asyncio.sleep(index * 0.01)
        return await engine.draw(prompts[index], negative, on_codes=reports[index].append)

    async def texts() -> None:
        for index in range(12):
            await at_once([engine.write(prompts[index + more], 90) for more in range(6)])

    async def both() -> list[list[int]]:
        beside = asyncio.ensure_future(texts())
        drawn = await at_once([draw(index) for index in range(32)])
        beside.cancel()
        return drawn

    drawn = engine.run(both())
    assert drawn == greedy[:32]
    assert metric("vllm:num_preemptions_total") > before
    assert engine.segments.restarts > 0  # else no preemption hit a pair
    for span, lists in zip(drawn, reports, strict=True):
        assert lists[-1] == span[1:-1]
        for one, other in itertools.pairwise(lists):
            assert len(one) < len(other) and other[: len(one)] == one


@on("starved")
def test_the_unconditional_prompt_is_shared_through_the_prefix_cache(
    engine: Engine, prompts: list[list[int]], negative: list[int]
) -> None:
    shared = (negative * 10)[:100]
    engine.run(engine.draw(prompts[0], shared))
    before = metric("vllm:prefix_cache_hits_total")
    engine.run(at_once([engine.draw(prompt, shared) for prompt in prompts[1:5]]))
    whole_blocks = 96
    assert metric("vllm:prefix_cache_hits_total") >= before + 4 * whole_blocks


@on("starved")
def test_what_the_engine_can_never_hold_is_refused(
    engine: Engine, prompts: list[list[int]], negative: list[int]
) -> None:
    long = (prompts[0] * 20)[:140]
    with pytest.raises(MessageError, match="context"):
        engine.run(engine.draw(long, negative))
    with pytest.raises(ConfigurationError, match="2 to 24"):
        engine.run(engine.draw(prompts[0], negative, budget=1))


@on("starved")
def test_a_dead_engine_is_a_clean_error(
    engine: Engine, prompts: list[list[int]], negative: list[int]
) -> None:
    """The last test of the file: the engine is killed while pairs and single drawings run."""

    async def killed() -> list[Any]:
        begun = asyncio.Event()
        work = [
            engine.draw(prompt, negative, on_codes=lambda _codes: begun.set(), guidance=scale)
            for prompt in prompts[:8]
            for scale in (1.0, GUIDANCE)
        ]
        drawings = [asyncio.ensure_future(one) for one in work]
        await begun.wait()
        # Our own engine is a child; that of the server which other tests share is a grandchild.
        for process in psutil.Process().children():
            with suppress(psutil.Error):  # a zombie has no command line
                if "EngineCore" in "".join(process.cmdline()):
                    process.kill()
        return list(await asyncio.wait_for(asyncio.gather(*drawings, return_exceptions=True), 60))

    ends = engine.run(killed())
    assert {type(end) for end in ends if not isinstance(end, list)} == {ServingError}
    with pytest.raises(ServingError, match="engine failed"):
        engine.run(engine.draw(prompts[0], negative))
    [rank] = engine.segments._engines
    assert (rank.seats.pairs, rank.seats.load, rank.steps.running) == (8, 0, 0)
