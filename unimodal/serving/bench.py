"""What serving costs: a real vLLM server against transformers, in one run on one machine.

Each part answers some questions and is measured pairwise: the two things that are compared take
turns, so that a machine that gets slower slows both. ``bench_report.py`` makes the table and the
plot, and holds each figure against what issue 4 asks for.
"""

import json
import math
import os
import platform
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.files import atomic_write
from unimodal.pipeline import Unimodal
from unimodal.serving.bench_report import targets_json, write_report
from unimodal.serving.check import Server, running_server
from unimodal.serving.load import Hit, Shot, fire
from unimodal.serving.random_model import random_model
from unimodal.serving.traffic import (
    CAPTION_TOKENS,
    KINDS,
    WORDS,
    Ask,
    NaiveServer,
    make_asks,
    poisson_times,
)

PARTS = ("cells", "guidance", "arrivals", "preview", "text_cost", "startup")
PREVIEWS = 3
PREVIEW_CODES = 64
TEXT_TURNS, TEXT_BLOCK = 3, 12
"""Turns of each round of ``text_cost``, and requests to each server in a turn."""
RATES = (0.5, 1.0, 2.0)
"""Arrivals a second, as multiples of what the server can do with the same requests at once."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured, and how long."""

    seconds: float = 10.0
    """Of each cell, about; the number of requests is made of it."""
    concurrency: tuple[int, ...] = (1, 4, 16, 64)
    threads: int | None = None
    """Compute threads of vLLM and of transformers; None takes half of the cores."""
    rounds: int = 5
    """Of the comparisons in turn; starts are a costly one and take 3 at most."""
    max_batch: int = 128
    """Most rows in a step of vLLM and in a batch of transformers; a guided drawing takes two."""
    guidance: float = 3.0
    seed: int = 0
    vllm_args: tuple[str, ...] = ()
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        unknown = set(self.parts) - set(PARTS)
        if unknown or not self.parts:
            raise ConfigurationError(
                f"parts are {', '.join(self.parts) or 'missing'}; expected some of "
                f"{', '.join(PARTS)}"
            )
        if any(argument.startswith("--max-num-seqs") for argument in self.vllm_args):
            raise ConfigurationError("--max-num-seqs came; give --max-batch, for both sides")
        if self.guidance == 1:
            raise ConfigurationError("guidance is 1, which is off; give a number above 1")
        if min(self.seconds, self.rounds, *self.concurrency, self.threads or 1) <= 0:
            raise ConfigurationError("seconds, rounds, concurrency and threads; expected above 0")


def bench_serve(
    folder: str | Path | None,
    out: str | Path,
    settings: BenchSettings | None = None,
    *,
    random_codes: int = 16,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the bench; write ``serve.json``, ``serve.md`` and ``serve.png``.

    Args:
        folder: a merged model. None: a random one of the demo's size.
        out: a folder. What is measured is written after each part.
        settings: None for the defaults.
        random_codes: codes a picture of the random model.
        say: called with a line now and then.

    Returns:
        What serve.json holds; docs/serving_performance.md describes it.

    Raises:
        ServingError: a server did not start, or the load generator failed. Requests that fail are
            counted in the result.
        ConfigurationError: settings that cannot be right.
    """
    settings = settings or BenchSettings()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    is_random = folder is None
    if folder is None:
        folder = random_model(out / f"random{random_codes}", random_codes, WORDS)
    bench = _Bench(Path(folder), out, settings, say, is_random=is_random)
    for part in PARTS:
        if part in settings.parts:
            say(f"{part} ...")
            began = time.monotonic()
            bench.result[part] = getattr(bench, f"_{part}")()
            bench.result["part_seconds"][part] = round(time.monotonic() - began, 1)
            bench.result["targets"] = targets_json(bench.result)
            with atomic_write(out / "serve.json") as temporary:
                temporary.write_text(json.dumps(bench.result, indent=2) + "\n", encoding="utf-8")
            write_report(bench.result, out)
    bench.close()
    return bench.result


class _Bench:
    """The parts; what they share is started when it is first needed."""

    def __init__(
        self,
        folder: Path,
        out: Path,
        settings: BenchSettings,
        say: Callable[[str], None],
        *,
        is_random: bool,
    ) -> None:
        self.folder, self.out, self.settings, self.say = folder, out, settings, say
        cores = os.cpu_count() or 1
        self.threads = settings.threads or max(1, cores // 2)
        # vLLM ties its compute threads to cores; the load generator keeps off them if it can.
        bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", f"0-{self.threads - 1}")
        engine = _cores(bind)
        self.load_cores = tuple(core for core in range(cores) if core not in engine)
        # Arrivals may come faster than any server is: all wait, on both sides, and none is refused.
        self.environment = {"VLLM_CPU_OMP_THREADS_BIND": bind, "UNIMODAL_MAX_QUEUE": "1000000"}
        self.result: dict[str, Any] = {
            "bench": "unimodal bench serve",
            "settings": asdict(settings),
            "environment": _environment(bind, self.threads, self.load_cores),
            "model": {"folder": str(folder), "random": is_random},
            "part_seconds": {},
        }
        self._stack = ExitStack()
        self._server: Server | None = None
        self._model: Unimodal | None = None

    def close(self) -> None:
        """Stop the server."""
        self._stack.close()
        self._server = None

    # --- what the parts share ---------------------------------------------------------------------

    @property
    def server(self) -> Server:
        if self._server is None:
            self._server = self._stack.enter_context(self.start(self.folder))
        return self._server

    @property
    def model(self) -> Unimodal:
        if self._model is None:
            torch.set_num_threads(self.threads)
            self._model = Unimodal.from_pretrained(self.folder)
            self.result["model"] |= {
                "parameters": self._model.model.num_parameters(),
                "dtype": str(self._model.model.dtype).removeprefix("torch."),
                "codes": self._model.processor.vocabulary.num_tokens,
            }
        return self._model

    def start(self, folder: Path, *, plugin: bool = True, name: str = "server") -> Any:
        flags = ["--max-num-seqs", str(self.settings.max_batch), *self.settings.vllm_args]
        log = self.out / f"{name}.log"
        return running_server(folder, flags, log, plugin=plugin, environment=self.environment)

    def asks(self, kind: str, number: int, *, seed: int = 0, **options: Any) -> list[Ask]:
        """Requests of one kind; another ``seed`` gives others."""
        processor = self.model.processor
        return make_asks(
            kind,
            number,
            self.settings.seed + 1000 * seed,
            image_size=2 * processor.image_processor.size,
            guidance=self.settings.guidance,
            **options,
        )

    def naive(self, *, by_kind: bool = False) -> NaiveServer:
        return NaiveServer(self.model, self.settings.max_batch, by_kind=by_kind)

    def fire(self, asks: Sequence[Ask], concurrency: int | None = None, **options: Any) -> Any:
        times = options.pop("times", [None] * len(asks))
        shots = [ask.shot(self.server.url, at) for ask, at in zip(asks, times, strict=True)]
        return fire(shots, concurrency, self.load_cores)

    # --- the parts --------------------------------------------------------------------------------

    def _cells(self) -> list[dict[str, Any]]:
        """Each kind of request at each concurrency: the server, then transformers."""
        naive, cells = self.naive(), []
        for kind in (*KINDS, "previews"):
            for concurrency in self.settings.concurrency:
                options: dict[str, Any] = {"varied": kind == "mixed", "budgets": self._budgets()}
                if kind == "previews":
                    options = {"previews": PREVIEWS}
                drawn = "drawings" if kind == "previews" else kind
                warm = self.asks(drawn, concurrency, seed=1, **options)
                warmed = summary(self.fire(warm, concurrency))["seconds"]
                number = concurrency * min(max(int(self.settings.seconds / warmed), 2), 100)
                asks = self.asks(drawn, number, **options)
                before = self._tokenizer_seconds()
                ours = summary(self.fire(asks, concurrency))
                ours["image_tokenizer_share"] = _share(
                    before, self._tokenizer_seconds(), ours["seconds"]
                )
                ours["memory_bytes"] = memory_bytes(self.server.pid)
                cell = {"kind": kind, "concurrency": concurrency}
                cells.append({**cell, "system": "vllm", **ours})
                if kind != "previews":
                    with stopped(self.server):
                        naive.closed_loop(warm, concurrency)
                        naive.image_tokenizer_seconds = 0.0
                        theirs = summary(naive.closed_loop(asks, concurrency))
                    theirs["image_tokenizer_share"] = (
                        naive.image_tokenizer_seconds / theirs["seconds"]
                    )
                    theirs["memory_bytes"] = memory_bytes(os.getpid()) - ours["memory_bytes"]
                    cells.append({**cell, "system": "transformers", **theirs})
                self.say(f"  {kind} × {concurrency}: {_told(cells, kind, concurrency)}")
        return cells

    def _guidance(self) -> dict[str, Any]:
        """Guided against unguided drawings at the largest concurrency, in turn."""
        concurrency = max(self.settings.concurrency)
        rates: dict[str, list[float]] = {"drawings": [], "guided": []}
        failed = 0
        for turn in range(self.settings.rounds + 1):
            for kind in list(rates)[:: -1 if turn % 2 else 1]:
                found = summary(self.fire(self.asks(kind, 3 * concurrency, seed=turn), concurrency))
                failed += found["errors"]
                if turn:  # the first turn warms up
                    rates[kind].append(found["images_per_second"])
        ratios = [
            guided / plain for guided, plain in zip(rates["guided"], rates["drawings"], strict=True)
        ]
        return {
            "concurrency": concurrency,
            "guidance": self.settings.guidance,
            "errors": failed,
            "unguided_images_per_second": statistics.median(rates["drawings"]),
            "guided_images_per_second": statistics.median(rates["guided"]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }

    def _arrivals(self) -> dict[str, Any]:
        """Mixed requests of all lengths that arrive when they like: ours, FIFO, FIFO by kind."""
        options = {"varied": True, "budgets": self._budgets()}
        most = max(self.settings.concurrency)
        self.fire(self.asks("mixed", most, seed=2, **options), most)
        capacity = summary(self.fire(self.asks("mixed", 3 * most, seed=3, **options), most))
        runs = []
        for share in RATES:
            rate = share * capacity["requests_per_second"]
            number = max(12, round(2 * rate * self.settings.seconds))
            asks = self.asks("mixed", number, seed=4, **options)
            times = poisson_times(rate, number, self.settings.seed)
            offered = sum(ask.draws for ask in asks) / times[-1]
            hits = {"vllm": self.fire(asks, times=times)}
            with stopped(self.server):
                hits["transformers_fifo"] = self.naive().open_loop(asks, times)
                by_kind = self.naive(by_kind=True)
                hits["transformers_fifo_by_kind"] = by_kind.open_loop(asks, times)
            for system, answers in hits.items():
                found = summary(answers)
                runs.append(
                    {
                        "system": system,
                        "rate": rate,
                        "offered_images_per_second": offered,
                        **found,
                    }
                )
                self.say(f"  {rate:.1f} a second, {system}: {_line(found)}")
        return {"capacity_requests_per_second": capacity["requests_per_second"], "runs": runs}

    def _preview(self) -> dict[str, Any]:
        """When the first preview of a 64-code picture comes, as a share of the whole time."""
        result: dict[str, Any] = {"partial_images": PREVIEWS, "runs": []}
        with ExitStack() as stack:
            if self.model.processor.vocabulary.num_tokens >= PREVIEW_CODES:
                url, codes = self.server.url, self.model.processor.vocabulary.num_tokens
            else:
                codes = PREVIEW_CODES
                folder = random_model(self.out / f"random{codes}", codes, WORDS)
                url = stack.enter_context(self.start(folder, name="preview")).url
                result["model"] = f"random, {codes} codes"
            for kind in ("drawings", "guided"):
                for concurrency in (1, 16):
                    number = concurrency * max(4, self.settings.rounds)
                    asks = self.asks(kind, number + concurrency, seed=5, previews=PREVIEWS)
                    shots = [ask.shot(url) for ask in asks]
                    fire(shots[:concurrency], concurrency, self.load_cores)
                    hits = fire(shots[concurrency:], concurrency, self.load_cores, niceness=0)
                    shares = [(hit.preview - hit.sent) / hit.seconds for hit in hits if hit.preview]
                    result["runs"].append(
                        {
                            "kind": kind,
                            "concurrency": concurrency,
                            "codes": codes,
                            "first_preview_share": statistics.median(shares) if shares else None,
                            **summary(hits),
                        }
                    )
        return result

    def _text_cost(self) -> dict[str, Any]:
        """Text requests to our server and to the same vLLM without our plugin, in turn.

        The one that is not asked is stopped: for a second after its last step it would go on
        looking for the next one, on the other's core.
        """
        runs: list[dict[str, Any]] = []
        ours = self.server
        with self.start(self.folder, plugin=False, name="plain") as plain:
            for modalities in (None, ["text"]):
                pairs: list[tuple[Hit, Hit]] = []
                for turn in range(TEXT_TURNS * self.settings.rounds):
                    bodies = [_text_body(turn, index, modalities) for index in range(TEXT_BLOCK)]
                    servers = [(ours, plain), (plain, ours)][turn % 2]
                    blocks = {}
                    for asked, other in (servers, servers[::-1]):
                        with stopped(other):
                            blocks[asked.pid] = fire(
                                [
                                    Shot(url=f"{asked.url}/v1/chat/completions", body=body)
                                    for body in bodies
                                ],
                                1,
                                self.load_cores,
                            )
                    # The first answers of a block wake the processes up.
                    pairs += list(zip(blocks[ours.pid], blocks[plain.pid], strict=True))[2:]
                runs.append({"modalities": modalities, **paired(pairs)})
        return {"tokens": CAPTION_TOKENS, "runs": runs}

    def _startup(self) -> dict[str, Any]:
        """Seconds until the server is ready, with and without our plugin, in turn."""
        self.close()
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(min(3, self.settings.rounds) + 1):
            for plugin in (True, False)[:: -1 if turn % 2 else 1]:
                with self.start(self.folder, plugin=plugin, name="startup") as server:
                    if turn:  # the first turn fills the file cache
                        seconds[plugin].append(server.start_seconds)
        return {
            "with_plugin_seconds": seconds[True],
            "without_plugin_seconds": seconds[False],
            "difference_seconds": statistics.median(seconds[True])
            - statistics.median(seconds[False]),
        }

    # --- looking at the server --------------------------------------------------------------------

    def _budgets(self) -> list[int | None]:
        """Budgets of mixed drawings: three lengths, where the image tokenizer is nested."""
        vocabulary = self.model.processor.vocabulary
        least, most = vocabulary.min_tokens, vocabulary.num_tokens
        return [None] if least == most else [least, (least + most) // 2, most]

    def _tokenizer_seconds(self) -> float | None:
        """Seconds that the server's image tokenizer has worked; None where it does not tell."""
        text = self.server.get("/metrics")
        found = [metric(text, f"unimodal:{name}_seconds_sum") for name in ("encode", "decode")]
        return None if None in found else sum(found)  # type: ignore[arg-type]


def _share(before: float | None, after: float | None, seconds: float) -> float | None:
    return None if before is None or after is None else (after - before) / seconds


def summary(hits: Sequence[Hit]) -> dict[str, Any]:
    """The figures of some requests. Those that failed count as errors and in nothing else.

    Rates are over the time from the first request's sending to the last one's end.
    """
    good = [hit for hit in hits if hit.error is None]
    errors = [hit.error for hit in hits if hit.error is not None]
    result: dict[str, Any] = {"requests": len(hits), "errors": len(errors)}
    if errors:
        result["first_error"] = errors[0]
    seconds = max(hit.done for hit in hits) - min(hit.sent for hit in hits)
    latencies = sorted(hit.seconds for hit in good)
    previews = [hit.preview - hit.sent for hit in good if hit.preview is not None]
    return result | {
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "images_per_second": sum(hit.images for hit in good) / seconds,
        "tokens_per_second": sum(hit.tokens for hit in good) / seconds,
        "p50_seconds": _quantile(latencies, 0.5),
        "p95_seconds": _quantile(latencies, 0.95),
        "first_preview_seconds": statistics.median(previews) if previews else None,
    }


def paired(pairs: Sequence[tuple[Hit, Hit]]) -> dict[str, Any]:
    """Compare ours with the plain server's answer to the same request, pair by pair.

    Pairs in which our answer holds an image are left out and counted as ``drawn``: the model chose
    to draw, so that was no text request.
    """
    good = [
        pair
        for pair in pairs
        if pair[0].error is None and pair[1].error is None and not pair[0].images
    ]
    errors = [hit.error for pair in pairs for hit in pair if hit.error is not None]
    result: dict[str, Any] = {
        "pairs": len(good),
        "errors": len(errors),
        "drawn": sum(bool(ours.images) for ours, _ in pairs),
    }
    if errors:
        result["first_error"] = errors[0]
    if not good:
        return result
    ours, plain = (sorted(pair[side].seconds for pair in good) for side in (0, 1))
    return result | {
        "p50_seconds": _quantile(ours, 0.5),
        "plain_p50_seconds": _quantile(plain, 0.5),
        "cost": _quantile(ours, 0.5) / _quantile(plain, 0.5) - 1,
        "paired_cost": statistics.median(a.seconds / b.seconds for a, b in good) - 1,
        "equal_lengths": all(a.tokens == b.tokens for a, b in good),
    }


def metric(text: str, name: str) -> float | None:
    """The sum of a Prometheus metric over its labels; None where it is not in the text."""
    lines = [line for line in text.splitlines() if line.partition("{")[0].split(" ")[0] == name]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines) if lines else None


def memory_bytes(pid: int) -> int:
    """Memory of a process and all below it; a page that several share is split among them."""
    total = 0
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        try:
            info = one.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        total += getattr(info, "pss", info.uss)
    return total


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Let a server's processes stand still while the block runs."""
    os.killpg(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(server.pid, signal.SIGCONT)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    if not ordered:
        return float("nan")
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


def _text_body(turn: int, index: int, modalities: list[str] | None) -> dict[str, Any]:
    words = random.Random(f"{turn} {index}").choices(WORDS.split(), k=12)
    body: dict[str, Any] = {
        # The demo's models answer these words with words; others draw or write as they like.
        "messages": [{"role": "user", "content": f"draw in words {' '.join(words)}"}],
        "temperature": 0,
        "max_tokens": CAPTION_TOKENS,
        "ignore_eos": True,
    }
    return body if modalities is None else {**body, "modalities": modalities}


def _cores(bind: str) -> set[int]:
    """The cores of a VLLM_CPU_OMP_THREADS_BIND like "0-2,5|6"; none for its words."""
    cores: set[int] = set()
    for part in bind.replace("|", ",").split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            cores |= set(range(int(first), int(last or first) + 1))
    return cores


def _environment(bind: str, threads: int, load_cores: Sequence[int]) -> dict[str, Any]:
    import importlib

    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "vllm_cores": bind,
        "transformers_threads": threads,
        "load_generator_cores": list(load_cores),
        "load_average": os.getloadavg()[0],
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": {
            name: str(importlib.import_module(name).__version__)
            for name in ("torch", "transformers", "vllm")
        },
    }


def _line(found: Mapping[str, Any]) -> str:
    told = (
        f"{found['images_per_second']:.2f} images/s, {found['tokens_per_second']:.0f} tokens/s, "
        f"p50 {found['p50_seconds']:.2f} s, p95 {found['p95_seconds']:.2f} s"
    )
    return told + (f", {found['errors']} ERRORS" if found["errors"] else "")


def _told(cells: Sequence[Mapping[str, Any]], kind: str, concurrency: int) -> str:
    return " | ".join(
        f"{cell['system']} {_line(cell)}"
        for cell in cells
        if (cell["kind"], cell["concurrency"]) == (kind, concurrency)
    )
