"""The logits processor by itself. Nothing here starts an engine; test_server.py does.

The V1 interface is driven as vLLM's batch does, with its own ``BatchUpdate``. The V2 interface is
driven with vLLM's own ``LogitsContext`` filled by hand: the runner that fills it needs a GPU, so
what is tested is our side of the interface, not the runner.
"""

import types
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams

from tests.toy import toy_extension
from tokenizer_hf.errors import ConfigurationError
from tokenizer_hf.vocabulary import VocabularyExtension
from unimodal.serving.logits import (
    CERTAIN,
    CONDITIONAL,
    START_BEFORE_KEY,
    UNCONDITIONAL,
    ImageLogitsProcessor,
    Segment,
    load_vocabulary,
)
from unimodal.serving.vllm_private import (
    BatchUpdate,
    LogitsContext,
    LogitsProcessorV1,
    LogitsProcessorV2,
    MoveDirectionality,
)

pytestmark = pytest.mark.vllm

FIXED = toy_extension(codebook_size=8, num_tokens=4).bind(100)
NESTED = VocabularyExtension(
    codebook_size=8, num_tokens=6, min_tokens=2, nested=True, fingerprint="0" * 64
).bind(100)
TWO_BOOKS = toy_extension(codebook_size=8, num_codebooks=2, num_tokens=4).bind(100)


def write_folder(folder: Any, vocabulary: Any) -> Any:
    import json

    values = {"image_vocabulary": vocabulary.to_dict()}
    (folder / "processor_config.json").write_text(json.dumps(values))
    model_config = types.SimpleNamespace(model=str(folder), revision=None)
    return types.SimpleNamespace(model_config=model_config, speculative_config=None)


def v1(tmp_path: Any, vocabulary: Any = FIXED) -> ImageLogitsProcessor:
    return ImageLogitsProcessor(write_folder(tmp_path, vocabulary), torch.device("cpu"), False)


def v2(tmp_path: Any, prompt_lengths: list[int], vocabulary: Any = FIXED) -> ImageLogitsProcessor:
    states: Any = types.SimpleNamespace(
        prompt_len=types.SimpleNamespace(np=np.array(prompt_lengths))
    )
    return ImageLogitsProcessor(write_folder(tmp_path, vocabulary), states)


def context(slots: list[int], lengths: list[int]) -> Any:
    empty: Any = torch.empty(0)
    return LogitsContext(empty, empty, np.array(slots), empty, empty, empty, np.array(lengths))


def segment(**changes: Any) -> dict[str, Any]:
    values = {"min_codes": 4, "max_codes": 4, "temperature": 0.0, "top_k": 0, "seed": 0}
    return Segment(**{**values, **changes}).to_extra_args()


def params(extra_args: dict[str, Any] | None = None) -> SamplingParams:
    return SamplingParams(extra_args=extra_args)


def update(*, removed: Any = (), added: Any = (), moved: Any = ()) -> BatchUpdate:
    return BatchUpdate(batch_size=8, removed=removed, added=added, moved=moved)


def finite(row: torch.Tensor) -> list[int]:
    return row.isfinite().nonzero()[:, 0].tolist()


def drawn(row: torch.Tensor) -> list[int]:
    """The ids of a row that vLLM's greedy sampler must take; one, where an image is drawn."""
    ids = (row == CERTAIN).nonzero()[:, 0].tolist()
    assert ids in ([], [int(row.argmax())])
    return ids


def test_is_a_subclass_of_both_interfaces() -> None:
    assert issubclass(ImageLogitsProcessor, LogitsProcessorV1)
    assert issubclass(ImageLogitsProcessor, LogitsProcessorV2)


def test_a_text_row_keeps_text_ids_only(tmp_path: Any) -> None:
    processor = v1(tmp_path)
    processor.update_state(update(added=[(0, params(), [], [])]))
    logits = torch.randn(2, FIXED.rows)
    before = logits.clone()
    processor.apply(logits)
    for row in range(2):
        assert finite(logits[row]) == list(range(100))
    assert torch.equal(logits[:, :100], before[:, :100])


def opening(before: Any, stop: int = FIXED.start_token_id) -> SamplingParams:
    return SamplingParams(extra_args={START_BEFORE_KEY: before}, stop_token_ids=[stop])


def test_a_text_row_may_start_an_image_where_it_is_opened_and_stops_there(tmp_path: Any) -> None:
    processor = v1(tmp_path)
    text, start, outputs = list(range(100)), FIXED.start_token_id, []
    rows = [
        (0, params(), [], []),
        (1, opening(2), [], outputs),
        (2, opening(2, stop=7), [], []),  # would not stop there
        (3, params(segment()), [], []),
    ]
    processor.update_state(update(added=rows))
    for expected in ([*text, start], [*text, start], text):
        logits = torch.randn(4, FIXED.rows)
        processor.apply(logits)
        assert [finite(logits[row]) for row in range(3)] == [text, expected, text]
        assert drawn(logits[3])
        outputs.append(5)
    processor.update_state(update(removed=[1, 3]))
    logits = torch.randn(2, FIXED.rows)
    processor.apply(logits)
    assert finite(logits[1]) == text


def test_an_opened_row_of_the_v2_interface_counts_by_lengths(tmp_path: Any) -> None:
    processor = v2(tmp_path, [5, 9])
    processor.add_request(0, params())
    processor.add_request(1, opening(2))
    text = list(range(100))
    for length, open_still in ((4, True), (9, True), (10, True), (11, False)):
        logits = torch.randn(2, FIXED.rows)
        processor.apply(logits, context([1, 0], [length, 6]))
        assert finite(logits[0]) == [*text, *([FIXED.start_token_id] if open_still else [])]
        assert finite(logits[1]) == text


@pytest.mark.parametrize("before", [True, "3", 1.5, [2]])
def test_an_opening_that_is_no_integer_is_refused(before: Any) -> None:
    with pytest.raises(ConfigurationError, match="integer"):
        ImageLogitsProcessor.validate_params(opening(before))


def test_an_image_row_draws_the_likeliest_code_of_its_codebook(tmp_path: Any) -> None:
    processor = v1(tmp_path, TWO_BOOKS)
    output: list[int] = []
    processor.update_state(update(added=[(0, params(segment()), [], output)]))
    for position in range(8):
        logits = torch.randn(1, TWO_BOOKS.rows)
        first, stop = TWO_BOOKS.ranges[position % 2]
        best = first + int(logits[0, first:stop].argmax())
        processor.apply(logits)
        assert drawn(logits[0]) == [best]
        output.append(best)
    assert TWO_BOOKS.to_codes(output)


def test_an_image_row_writes_the_ends_of_its_rows(tmp_path: Any) -> None:
    vocabulary = toy_extension(codebook_size=8, num_tokens=4, row_length=2, row_ends=1).bind(100)
    processor = v1(tmp_path, vocabulary)
    output: list[int] = []
    processor.update_state(update(added=[(0, params(segment(temperature=1.0)), [], output)]))
    for _ in range(6):
        logits = torch.randn(2, vocabulary.rows)
        processor.apply(logits)
        output += drawn(logits[0])
        assert vocabulary.row_end_token_id not in finite(logits[1])  # text
    assert output[2] == vocabulary.row_end_token_id and output[5] == vocabulary.end_token_id
    assert vocabulary.span(vocabulary.to_codes(output[:5]))[1:] == output


def test_a_nested_span_may_end_between_its_lengths(tmp_path: Any) -> None:
    processor = v1(tmp_path, NESTED)
    end = NESTED.end_token_id
    for done, expected in ((0, False), (1, False), (2, True), (5, True), (6, True)):
        processor.update_state(
            update(added=[(0, params(segment(min_codes=2, max_codes=6, done=done)), [], [])])
        )
        logits = torch.zeros(1, NESTED.rows)
        logits[0, end] = 9.0
        processor.apply(logits)
        assert (drawn(logits[0]) == [end]) == expected


def test_a_length_beyond_the_tokenizer_is_cut(tmp_path: Any) -> None:
    processor = v1(tmp_path, NESTED)
    wild = segment(min_codes=1, max_codes=999, done=6)
    processor.update_state(update(added=[(0, params(wild), [], [])]))
    logits = torch.zeros(1, NESTED.rows)
    processor.apply(logits)
    assert drawn(logits[0]) == [NESTED.end_token_id]


def test_rows_are_followed_through_removals_swaps_and_moves(tmp_path: Any) -> None:
    processor = v1(tmp_path)
    processor.update_state(
        update(
            added=[
                (0, params(segment()), [], []),
                (1, params(), [], []),
                (2, params(segment()), [], []),
            ]
        )
    )
    processor.update_state(update(moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert drawing_rows(processor, 3) == [1, 2]
    processor.update_state(update(removed=[1], moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL)]))
    assert drawing_rows(processor, 2) == [1]
    processor.update_state(update(added=[(1, params(), [], [])]))
    assert drawing_rows(processor, 2) == []


def drawing_rows(processor: ImageLogitsProcessor, count: int) -> list[int]:
    logits = torch.zeros(count, FIXED.rows)
    processor.apply(logits)
    return [row for row in range(count) if drawn(logits[row])]


def pair(scale: float = 3.0, **changes: Any) -> tuple[SamplingParams, SamplingParams]:
    roles = (CONDITIONAL, UNCONDITIONAL)
    c, u = (params(segment(pair="p", role=role, guidance=scale, **changes)) for role in roles)
    return c, u


def test_a_pair_in_step_gets_the_id_of_the_mixed_logits(tmp_path: Any) -> None:
    processor = v1(tmp_path)
    c, u = pair()
    processor.update_state(
        update(added=[(0, c, [], [103]), (1, params(), [], []), (2, u, [], [103])])
    )
    logits = torch.randn(3, FIXED.rows)
    first, stop = FIXED.ranges[0]
    mixed = logits[2] + 3.0 * (logits[0] - logits[2])
    best = first + int(mixed[first:stop].argmax())
    text = logits[1, :100].clone()
    processor.apply(logits)
    assert drawn(logits[0]) == drawn(logits[2]) == [best]
    assert torch.equal(logits[1, :100], text)


@pytest.mark.parametrize("others", [[], [(1, 1)]])
def test_a_row_without_its_partner_is_stopped(tmp_path: Any, others: list[Any]) -> None:
    processor = v1(tmp_path)
    c, u = pair()
    added: list[Any] = [(0, c, [], [])]
    added += [(row, u, [], [102] * ahead) for row, ahead in others]
    processor.update_state(update(added=added))
    logits = torch.randn(1 + len(others), FIXED.rows)
    processor.apply(logits)
    for row in logits:
        assert drawn(row) == [FIXED.start_token_id]


def test_a_restarted_row_draws_what_it_would_have_drawn(tmp_path: Any) -> None:
    processor = v1(tmp_path)
    logits = torch.randn(1, FIXED.rows)
    ids = []
    for done, output in ((0, [102, 103]), (2, [])):
        extra = segment(done=done, temperature=1.0, seed=11)
        processor.update_state(update(added=[(0, params(extra), [], output)]))
        ids.append(drawn(processor.apply(logits.clone())[0]))
    assert ids[0] == ids[1] != []
    seeds = set()
    for seed in range(40):
        extra = segment(temperature=1.0, seed=seed)
        processor.update_state(update(added=[(0, params(extra), [], [])]))
        seeds.update(drawn(processor.apply(logits.clone())[0]))
    assert len(seeds) > 2


def test_v2_interface_with_hand_made_contexts(tmp_path: Any) -> None:
    processor = v2(tmp_path, prompt_lengths=[5, 9, 4, 7])
    c, u = pair()
    for slot, request in enumerate((c, u, params(segment()), params())):
        assert processor.add_request(slot, request)
    logits = torch.randn(4, FIXED.rows)
    first, stop = FIXED.ranges[0]
    # Rows of slots 1, 3, 0, 2; both of the pair have written one id, slot 2 none.
    mixed = logits[0] + 3.0 * (logits[2] - logits[0])
    best = first + int(mixed[first:stop].argmax())
    single = first + int(logits[3, first:stop].argmax())
    processor.apply(logits, context([1, 3, 0, 2], [10, 20, 6, 4]))
    assert drawn(logits[0]) == drawn(logits[2]) == [best]
    assert finite(logits[1]) == list(range(100))
    assert drawn(logits[3]) == [single]


def test_v2_interface_stops_a_pair_out_of_step_and_reuses_slots(tmp_path: Any) -> None:
    processor = v2(tmp_path, prompt_lengths=[5, 9])
    for slot, request in enumerate(pair()):
        processor.add_request(slot, request)
    logits = torch.randn(2, FIXED.rows)
    processor.apply(logits, context([0, 1], [6, 9]))
    assert drawn(logits[0]) == drawn(logits[1]) == [FIXED.start_token_id]
    processor.add_request(0, params())
    logits = torch.randn(1, FIXED.rows)
    processor.apply(logits, context([0], [6]))
    assert finite(logits[0]) == list(range(100))


def test_v2_interface_ignores_a_prompt_that_is_still_being_read(tmp_path: Any) -> None:
    processor = v2(tmp_path, prompt_lengths=[50])
    processor.add_request(0, params(segment()))
    logits = torch.randn(1, FIXED.rows)
    processor.apply(logits, context([0], [32]))
    assert drawn(logits[0]) == [FIXED.start_token_id]


@pytest.mark.parametrize(
    "value",
    [
        "image",
        {"min_codes": 4},
        {**segment()["unimodal"], "temperature": "hot"},
        {**segment()["unimodal"], "max_codes": 2**63},
        {**segment()["unimodal"], "role": "third"},
        {**segment()["unimodal"], "surprise": 1},
    ],
)
def test_extra_arguments_that_are_no_segment_are_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected an image segment"):
        ImageLogitsProcessor.validate_params(params({"unimodal": value}))


def test_a_segment_survives_the_way_to_the_engine() -> None:
    first = Segment(min_codes=2, max_codes=6, temperature=1.0, top_k=5, seed=3, pair="p")
    assert Segment.from_extra_args(first.to_extra_args()) == first
    assert Segment.from_extra_args(None) is None
    assert Segment.from_extra_args({"other": 1}) is None


def test_speculative_decoding_and_foreign_folders_are_refused(tmp_path: Any) -> None:
    config = write_folder(tmp_path, FIXED)
    config.speculative_config = object()
    with pytest.raises(ConfigurationError, match="speculative"):
        ImageLogitsProcessor(config, torch.device("cpu"), False)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ConfigurationError, match="unimodal merge"):
        load_vocabulary(str(tmp_path))


def test_bench_masking_prints_and_writes_ratios_of_every_kind(tmp_path: Any) -> None:
    import json

    from typer.testing import CliRunner

    from tests.toy import toy_merged_folder
    from unimodal.cli import app

    folder, out = toy_merged_folder(tmp_path), tmp_path / "deep" / "bench.json"
    command = ["bench", "masking", "--model", str(folder), "--out", str(out), "--rounds", "3"]
    done = CliRunner().invoke(app, [*command, "--batch", "1", "--batch", "6"])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert json.loads(done.stdout) == result
    one, six = result["batches"]
    assert set(one) == {"batch", "step_ms", "images", "texts"}
    assert set(six) == {"batch", "step_ms", "images", "pairs", "texts", "mixed"}
    for kind in ("images", "pairs", "texts", "mixed"):
        assert min(six[kind][name] for name in ("apply_ms", "ratio", "cpu_ratio")) > 0
