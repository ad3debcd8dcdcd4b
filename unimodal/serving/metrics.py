"""What the server tells about itself: Prometheus metrics beside vLLM's, and a log line per request.

The metrics are ``prometheus_client``'s own, in its default registry, so vLLM's ``/metrics`` shows
them; with several API servers vLLM sets ``PROMETHEUS_MULTIPROC_DIR`` before it starts them, and
``/metrics`` of any of them sums over all. The names begin with ``unimodal:``.

A :class:`RequestRecord` follows one HTTP request through the tasks that work for it (a context
variable, which tasks and threads inherit) and becomes one line of JSON. It holds no text of users.
"""

import json
import logging
import logging.handlers
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

IMAGES_IN = Counter("unimodal:images_in", "Images that came with requests.", ["kind"])
IMAGES_OUT = Counter("unimodal:images_out", "Images that were drawn and decoded.")
IMAGE_TOKENS = Counter("unimodal:image_tokens", "Image token ids that were drawn.")
PAIRS = Counter("unimodal:pairs", "Guided drawings that were begun.")
PAIR_RESTARTS = Counter("unimodal:pair_restarts", "Times that a guided pair fell out of step.")
REQUESTS = Counter("unimodal:requests", "HTTP requests that were answered.", ["route", "status"])
ABANDONED = Counter(
    "unimodal:requests_abandoned", "Requests that ended early, by cause.", ["cause"]
)
QUEUE = Gauge(
    "unimodal:queue_depth",
    "HTTP requests admitted and not answered yet.",
    multiprocess_mode="livesum",
)
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ENCODE_SECONDS = Histogram(
    "unimodal:encode_seconds", "Encoding the images of one request.", buckets=_BUCKETS
)
DECODE_SECONDS = Histogram(
    "unimodal:decode_seconds", "Decoding one image or preview.", buckets=_BUCKETS
)

ENCODED, WITH_CODES = "encoded", "codes"
"""Kinds of images that come in: pictures, and images that bring the codes they were drawn with."""

CLIENT_LEFT, TIMED_OUT, SLOW_READER = "client_left", "timed_out", "slow_reader"
SHUT_DOWN = "shut_down"
"""Causes of requests that end early."""

_logger = logging.getLogger("unimodal.requests")


@dataclass
class RequestRecord:
    """What is known of one HTTP request."""

    id: str
    route: str
    model: str | None = None
    stream: bool = False
    prompt_tokens: int | None = None
    """None where vLLM rendered the prompt itself."""
    image_tokens: int = 0
    """Image token ids drawn for the answer."""
    images_in: int = 0
    images_out: int = 0
    restarts: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("queue", "fetch", "encode", "decode"), 0.0)
    )
    """Where the time went. "queue" is the longest that a drawing waited for its turn."""
    began: float = field(default_factory=time.monotonic)
    prompt_ready: float | None = None
    """When the prompt was there."""

    def line(self, status: int, ended: str | None) -> str:
        """Return the log line: one JSON object.

        Args:
            status: of the answer.
            ended: why it ended before its time, or None.
        """
        now = time.monotonic()
        # From the prompt to the end of the answer, waiting included, decoding not.
        engine = max(0.0, now - (self.prompt_ready or self.began) - self.seconds["decode"])
        seconds = {**self.seconds, "engine": engine, "total": now - self.began}
        values: dict[str, Any] = {
            "time": round(time.time(), 3),
            "id": self.id,
            "route": self.route,
            "status": status,
            "ended": ended,
            "model": self.model,
            "stream": self.stream,
            "prompt_tokens": self.prompt_tokens,
            "image_tokens": self.image_tokens,
            "images_in": self.images_in,
            "images_out": self.images_out,
            "restarts": self.restarts,
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
        }
        return json.dumps(values)


_current: ContextVar[RequestRecord | None] = ContextVar("unimodal_request", default=None)


@contextmanager
def recording(record: RequestRecord) -> Iterator[RequestRecord]:
    """Make ``record`` the one that the functions below write to, in this task and its children."""
    token = _current.set(record)
    try:
        yield record
    finally:
        _current.reset(token)


def current() -> RequestRecord:
    """Return the record of the request that this task works for; a loose one outside of any."""
    return _current.get() or RequestRecord("", "")


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Add the time that the block takes to ``seconds[what]``."""
    began = time.monotonic()
    try:
        yield
    finally:
        current().seconds[what] += time.monotonic() - began


def prompt_is_ready(num_tokens: int) -> None:
    """Note the ids of the request's prompt; the first one counts, later ones are unconditional."""
    record = current()
    if record.prompt_tokens is None:
        record.prompt_tokens = num_tokens
        record.prompt_ready = time.monotonic()


def waited(seconds: float) -> None:
    """Note that a drawing of the request waited for its turn."""
    queue = current().seconds
    queue["queue"] = max(queue["queue"], seconds)


def came_in(num_pictures: int, num_with_codes: int) -> None:
    """Count the images of a request."""
    current().images_in += num_pictures + num_with_codes
    IMAGES_IN.labels(ENCODED).inc(num_pictures)
    IMAGES_IN.labels(WITH_CODES).inc(num_with_codes)


def went_out(num_images: int, num_tokens: int) -> None:
    """Count images of an answer and their token ids, start and end ids included."""
    record = current()
    record.images_out += num_images
    record.image_tokens += num_tokens
    IMAGES_OUT.inc(num_images)
    IMAGE_TOKENS.inc(num_tokens)


def pair_restarted() -> None:
    """Count a guided pair that fell out of step."""
    current().restarts += 1
    PAIR_RESTARTS.inc()


def log_requests_to(target: str) -> None:
    """Say where the log lines go: ``-`` for standard error, ``off``, or a file to append to.

    A file that is moved away (logrotate) is opened anew.
    """
    for old in list(_logger.handlers):
        _logger.removeHandler(old)
    _logger.propagate = False
    _logger.setLevel(logging.CRITICAL + 1 if target == "off" else logging.INFO)
    if target == "off":
        return
    handler: logging.Handler = (
        logging.StreamHandler(sys.stderr)
        if target == "-"
        else logging.handlers.WatchedFileHandler(target, encoding="utf-8", delay=True)
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    _logger.addHandler(handler)


def finish(record: RequestRecord, status: int, ended: str | None) -> None:
    """Count an answered request and write its log line."""
    REQUESTS.labels(record.route, str(status)).inc()
    if ended is not None:
        ABANDONED.labels(ended).inc()
    _logger.info("%s", record.line(status, ended))
