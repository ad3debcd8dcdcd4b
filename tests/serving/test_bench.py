"""`unimodal bench serve`: figures, table and plot on recorded samples; one small real run."""

import copy
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.toy import toy_merged_folder
from tokenizer_hf.errors import ConfigurationError
from unimodal.pipeline import Unimodal
from unimodal.serving import bench
from unimodal.serving.bench_report import Target, table, targets, targets_json, write_report
from unimodal.serving.load import Hit, fire
from unimodal.serving.traffic import (
    Ask,
    NaiveServer,
    make_asks,
    poisson_times,
)


def hit(sent: float, done: float, **values: Any) -> Hit:
    return Hit(sent=sent, done=done, **values)


def cell(kind: str, concurrency: int, system: str, rate: float) -> dict[str, Any]:
    return {
        "kind": kind,
        "concurrency": concurrency,
        "system": system,
        "requests": 10,
        "errors": 0,
        "seconds": 2.0,
        "requests_per_second": rate,
        "images_per_second": rate,
        "tokens_per_second": 18 * rate,
        "p50_seconds": concurrency / rate,
        "p95_seconds": 1.2 * concurrency / rate,
        "first_preview_seconds": None,
        "image_tokenizer_share": 0.03,
        "memory_bytes": 2_500_000_000,
    }


def run(system: str, rate: float, images: float, p95: float, errors: int = 0) -> dict[str, Any]:
    return {
        **cell("mixed", 1, system, images),
        "rate": rate,
        "offered_images_per_second": 2 * rate / 3,
        "p95_seconds": p95,
        "errors": errors,
    }


RESULT: dict[str, Any] = {
    "settings": {"max_batch": 128, "guidance": 3.0, "seed": 0},
    "environment": {
        "versions": {"vllm": "0.32.0"},
        "cores": 2,
        "load_average": 0.1,
        "vllm_cores": "0-0",
        "transformers_threads": 1,
        "load_generator_cores": [1],
    },
    "model": {
        "folder": "runs/demo/model",
        "random": False,
        "parameters": 1_200_000,
        "codes": 16,
        "dtype": "float32",
    },
    "cells": [
        cell(kind, concurrency, system, rate * math.sqrt(concurrency))
        for kind, rate in (("captions", 9), ("drawings", 10), ("guided", 6), ("mixed", 8))
        for concurrency in (1, 4, 16, 64)
        for system in ("vllm", "transformers")
    ],
    "guidance": {"concurrency": 64, "ratio": 0.47, "ratios": [0.47, 0.44, 0.49]},
    "text_cost": {
        "runs": [
            {
                "modalities": None,
                "pairs": 90,
                "errors": 0,
                "drawn": 3,
                "cost": 0.021,
                "paired_cost": 0.018,
            },
            {
                "modalities": ["text"],
                "pairs": 90,
                "errors": 1,
                "drawn": 0,
                "cost": 0.01,
                "paired_cost": 0.01,
            },
        ]
    },
    "arrivals": {
        "runs": [
            run("vllm", 10, 6.0, 0.5),
            run("transformers_fifo", 10, 5.0, 3.0),
            run("transformers_fifo_by_kind", 10, 5.5, 1.0),
            run("vllm", 20, 12.0, 8.0),
            run("transformers_fifo", 20, 4.0, 20.0),
            run("transformers_fifo_by_kind", 20, 8.0, 7.0),
        ]
    },
    "preview": {
        "model": "random, 64 codes",
        "runs": [
            {
                **cell("drawings", concurrency, "vllm", 3),
                "codes": 64,
                "first_preview_share": share,
                "first_preview_seconds": 0.1,
            }
            for concurrency, share in ((1, 0.27), (16, 0.4))
        ],
    },
    "startup": {
        "with_plugin_seconds": [15.0, 16.5, 15.5],
        "without_plugin_seconds": [13.0, 12.0, 12.5],
        "difference_seconds": 3.0,
    },
}


def test_each_figure_is_held_against_its_bound() -> None:
    found = {target.name: target for target in targets(RESULT)}
    values = {name: target.value for name, target in found.items()}
    met = {name: target.met for name, target in found.items()}
    guided = "guided by unguided images/s at saturation"
    assert (values[guided], met[guided]) == (0.47, True)
    text = "plugin's cost on a text request's p50"
    assert values[text] == pytest.approx(2.1)
    assert met[text] is True
    assert met[f"{text}, modalities ['text']"] is None  # one request failed: no figure
    arrivals = "Poisson arrivals: {} by that of transformers' FIFO batching"
    assert values[arrivals.format("images/s")] == pytest.approx(3.0)  # at the highest rate
    assert "1.50 × that of a FIFO that looks" in found[arrivals.format("images/s")].note
    assert values[arrivals.format("p95")] == pytest.approx(0.4)
    assert met[arrivals.format("p95")] is True
    preview = "first preview of a 64-code image, drawings"
    assert values[preview] == pytest.approx(27)
    assert met["start-up to ready, with by without the plugin"] is True
    assert len(found) == 7
    json.dumps(targets_json(RESULT))


def test_a_figure_of_failed_requests_is_no_figure() -> None:
    result = copy.deepcopy(RESULT)
    result["arrivals"]["runs"][3]["errors"] = 1
    met = [target.met for target in targets(result) if target.name.startswith("Poisson")]
    assert met == [None] * 2
    assert Target("x", float("nan"), 1, True).met is None


def test_the_table_says_what_was_measured(tmp_path: Path) -> None:
    text = table(RESULT)
    assert "| guided by unguided images/s at saturation | 0.47 × | ≥ 0.45 × | yes |" in text
    slow = {**RESULT["guidance"], "ratio": 0.4}
    assert "| 0.4 × | ≥ 0.45 × | **no** |" in table({**RESULT, "guidance": slow})
    assert "| drawings | 64 | unimodal serve | 80.00 | 1440 |" in text
    assert "random weights" not in text
    assert "**random weights**" in table({**RESULT, "model": {**RESULT["model"], "random": True}})
    write_report(RESULT, tmp_path)
    assert (tmp_path / "serve.md").read_text(encoding="utf-8") == text
    with Image.open(tmp_path / "serve.png") as plot:
        assert plot.size == (1600, 1000)
        assert len(plot.convert("RGB").getcolors(1 << 20)) > 100
    head = {key: RESULT[key] for key in ("settings", "environment", "model", "arrivals")}
    write_report(head, tmp_path)  # what is there after one part


def test_the_figures_of_some_requests() -> None:
    hits = [hit(0, 1 + index, tokens=10, images=1) for index in range(19)]
    found = bench.summary([*hits, hit(0, 40, error="503: full")])
    assert (found["requests"], found["errors"], found["first_error"]) == (20, 1, "503: full")
    assert found["images_per_second"] == pytest.approx(19 / 40)
    assert found["tokens_per_second"] == pytest.approx(190 / 40)
    assert (found["p50_seconds"], found["p95_seconds"]) == (10, 19)
    assert found["first_preview_seconds"] is None
    assert math.isnan(bench.summary([hit(0, 1, error="x")])["p50_seconds"])
    preview = bench.summary([hit(1, 3, preview=1.5), hit(2, 4, preview=2.25), hit(2, 3)])
    assert preview["first_preview_seconds"] == pytest.approx(0.375)


def test_two_servers_are_compared_pair_by_pair() -> None:
    pairs = [(hit(0, 1.02 * slow, tokens=4), hit(0, slow, tokens=4)) for slow in (1, 2, 5, 9)]
    found = bench.paired([*pairs, (hit(0, 9, images=1), hit(0, 1))])
    assert (found["pairs"], found["drawn"]) == (4, 1)
    assert found["cost"] == pytest.approx(0.02)
    assert found["paired_cost"] == pytest.approx(0.02)
    assert found["equal_lengths"]
    assert bench.paired([(hit(0, 1, error="x"), hit(0, 1))])["pairs"] == 0


def test_metrics_are_read_over_all_labels() -> None:
    text = '# HELP a:b_sum x\na:b_sum{w="1"} 2.5\na:b_sum{w="2"} 1\na:b_sum_x 9\na:c 4\n'
    assert bench.metric(text, "a:b_sum") == 3.5
    assert bench.metric(text, "a:c") == 4
    assert bench.metric(text, "a:d") is None
    assert bench._cores("0-2,5|7") == {0, 1, 2, 5, 7}
    assert bench._cores("auto") == set()


@pytest.mark.parametrize(
    "settings",
    [{"parts": ("cell",)}, {"guidance": 1}, {"seconds": 0}, {"vllm_args": ("--max-num-seqs=4",)}],
)
def test_settings_that_cannot_be_right(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        bench.BenchSettings(**settings)


def test_requests_are_the_same_for_the_same_seed() -> None:
    options = {"image_size": 16, "varied": True, "budgets": [2, 4]}
    asks = make_asks("mixed", 60, 0, **options)
    assert asks == make_asks("mixed", 60, 0, **options)
    assert asks != make_asks("mixed", 60, 1, **options)
    drawn = [ask for ask in asks if ask.draws]
    assert 20 < len(drawn) < 55
    assert {ask.guidance for ask in drawn} == {1.0, 3.0}
    assert {ask.budget for ask in drawn} == {2, 4}
    assert len({len(ask.prompt.split()) for ask in drawn}) > 10
    assert {ask.tokens for ask in asks if not ask.draws} == {8, 16, 32, 64}
    assert len({ask.picture for ask in asks if not ask.draws}) == 60 - len(drawn)
    times = poisson_times(10, 2000, 0)
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] == pytest.approx(200, rel=0.1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Unimodal:
    return Unimodal.from_pretrained(toy_merged_folder(tmp_path_factory.mktemp("toy"), nested=True))


def test_the_naive_server_takes_what_fits_together(toy: Unimodal) -> None:
    kinds = [(1.0, None), (1.0, None), (3.0, None), (1.0, None), (1.0, 3), (3.0, None)]
    asks = [Ask(prompt="a", guidance=guidance, budget=budget) for guidance, budget in kinds]

    def batches(**options: Any) -> list[list[int]]:
        server = NaiveServer(toy, **options)
        server._queue.extend((index, ask, 0.0) for index, ask in enumerate(asks))
        taken = []
        while server._queue:
            taken.append([index for index, _, _ in server._take()])
        return taken

    assert batches(max_rows=8) == [[0, 1], [2], [3], [4], [5]]
    assert batches(max_rows=8, by_kind=True) == [[0, 1, 3], [2, 5], [4]]
    assert batches(max_rows=2, by_kind=True) == [[0, 1], [2], [3], [4], [5]]


def test_the_naive_server_answers_every_request_at_its_length(toy: Unimodal) -> None:
    asks = make_asks("mixed", 18, 0, image_size=16, varied=True, budgets=[None, 3])
    asks = [ask if ask.draws else Ask(picture=ask.picture, question="x", tokens=5) for ask in asks]
    server = NaiveServer(toy, 8)
    for hits in (server.closed_loop(asks, 4), server.open_loop(asks, poisson_times(200, 18, 0))):
        assert [one.images for one in hits] == [int(ask.draws) for ask in asks]
        for ask, one in zip(asks, hits, strict=True):
            # Nested: 2 to 6 codes or the budget, and the start and the end.
            assert 4 <= one.tokens <= 8 - 3 * bool(ask.budget) if ask.draws else one.tokens == 5
            assert one.done > one.sent >= 0
    assert server.image_tokenizer_seconds > 0


def test_the_load_generator_reports_what_fails() -> None:
    asks = [Ask(prompt="a")] * 3
    hits = fire([ask.shot("http://127.0.0.1:1") for ask in asks], concurrency=2)
    assert len(hits) == 3
    assert all("Connect" in (one.error or "") for one in hits)


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_small_bench_of_a_real_server(tmp_path: Path) -> None:
    from tests.toy import nested_image_tokenizer, save_llm
    from unimodal.merge import merge
    from unimodal.serving.bench import BenchSettings, bench_serve

    llm = save_llm(
        tmp_path / "llm", "qwen3", head_dim=32, num_attention_heads=2, num_key_value_heads=1
    )
    nested_image_tokenizer().save_pretrained(tmp_path / "it")
    folder = merge(llm, tmp_path / "it", tmp_path / "toy")
    settings = BenchSettings(
        seconds=0.1, concurrency=(2,), rounds=1, max_batch=16, parts=("cells", "arrivals")
    )
    result = bench_serve(folder, tmp_path / "out", settings, say=lambda _: None)
    assert len(result["cells"]) == 9  # four kinds on both sides, previews on ours
    for found in [*result["cells"], *result["arrivals"]["runs"]]:
        assert found["errors"] == 0, found
        assert found["tokens_per_second"] > 0
        assert found["p95_seconds"] >= found["p50_seconds"] > 0
        assert (found["images_per_second"] > 0) == (found.get("kind") != "captions")
    assert all(found["memory_bytes"] > 50e6 for found in result["cells"])
    assert all(0 < found["image_tokenizer_share"] < 1 for found in result["cells"])
    shown = [found["first_preview_seconds"] for found in result["cells"]]
    assert [preview is not None for preview in shown] == [False] * 8 + [True]
    written = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert written == json.loads(json.dumps(result))
    for name in ("serve.md", "serve.png", "server.log"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
