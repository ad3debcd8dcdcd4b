"""A short soak of the shared server; the long one is ``unimodal bench soak``."""

import asyncio
import json
from importlib.util import find_spec
from typing import Any

import pytest

from unimodal.serving.check import Server
from unimodal.serving.soak import MIX, sent_events, soak, summary

RESULT: dict[str, Any] = {
    "requests": 10,
    "seconds": 3.0,
    "concurrency": 2,
    "num_errors": 0,
    "malformed_images": 0,
    "images": 4,
    "pairs": 100,
    "restarts": 5,
    "running_at_end": 0.0,
    "still_after_seconds": 0.1,
    "memory": {"first_mib": 100.0, "last_mib": 104.0, "growth": 0.04},
}


def test_the_summary_names_what_is_wrong() -> None:
    assert summary(RESULT).startswith("ok: 10 requests")
    for change, text in (
        ({"num_errors": 2}, "2 errors"),
        ({"malformed_images": 1}, "1 malformed"),
        ({"restarts": 6}, "6.0% of the pairs restarted"),
        ({"running_at_end": 3.0}, "3 requests still run"),
        ({"memory": {**RESULT["memory"], "growth": 0.06}}, "memory grew by 6.0%"),
    ):
        assert summary({**RESULT, **change}).startswith(text)


def test_events_end_at_line_feeds_only() -> None:
    text = "a\x85b\u2028c\x0bd"
    event = json.dumps({"content": text}, ensure_ascii=False)
    body = f": ping\n\ndata: {event}\n\ndata: [DONE]\n\n".encode()
    first, last = sent_events(body)
    assert json.loads(first) == {"content": text} and last == b"[DONE]"


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_hundred_mixed_requests(server: Server) -> None:
    result = asyncio.run(soak(server, 120, 12))
    assert result["errors"] == []
    assert result["malformed_images"] == result["running_at_end"] == 0
    assert result["still_after_seconds"] < 2
    assert set(result["kinds"]) == set(MIX) and sum(result["kinds"].values()) == 120
    assert result["images"] > 40 and result["pairs"] > 20
    assert len(result["memory"]["by_process_mib"]) >= 2
