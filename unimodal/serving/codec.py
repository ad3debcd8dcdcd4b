"""The image tokenizer as a service of the event loop: calls that meet are done in one batch.

The tokenizer runs on one thread of its own, so that the event loop never waits for it and two
requests never compute side by side. A call that finds the thread idle begins at once; those that
come while it is busy are done together when it is free. Nothing waits for company. The codes of a
picture do not depend on its company; a decoded value may be rounded the other way (1 of 255).
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

from unimodal.messages import Message, with_codes
from unimodal.processing_unimodal import IMAGES_PER_BATCH, UnimodalProcessor

Took = Callable[[float], None]


def default_threads() -> int:
    """Compute threads of the image tokenizer: a quarter of the cores, for the engine needs them."""
    return max(1, (os.cpu_count() or 1) // 4)


class ImageCodec:
    """Encodes and decodes pictures for many requests at once.

    Args:
        processor: of the served model, with its image tokenizer.
        num_threads: compute threads; None for :func:`default_threads`. It is torch's setting for
            the whole process, where nothing else of a server computes with torch.
        encode_took: called with the seconds that a call took: its share of those of its batch.
            Waiting, opening and resizing are not among them.
        decode_took: the same for decoding, previews included.
    """

    def __init__(
        self,
        processor: UnimodalProcessor,
        num_threads: int | None = None,
        *,
        encode_took: Took | None = None,
        decode_took: Took | None = None,
    ) -> None:
        self.processor = processor
        self._worker = ThreadPoolExecutor(
            1,
            thread_name_prefix="image-tokenizer",
            initializer=torch.set_num_threads,
            initargs=(num_threads or default_threads(),),
        )
        self._encode = _Batches(
            self._worker, lambda all: processor.encode_images(all).tolist(), encode_took
        )
        self._decode = _Batches(self._worker, processor.decode_codes, decode_took)
        self._preview = _Batches(
            self._worker,
            lambda all: [processor.decode_beginning(codes) for codes in all],
            decode_took,
        )

    async def encode(self, sources: Sequence[Any]) -> list[Any]:
        """Encode pictures.

        Args:
            sources: what ``open_image`` takes.

        Returns:
            The codes of each: a list (L,), or (L, G) with several codebooks.

        Raises:
            ImageError: a picture that cannot be read. It is told to its own request only.
        """
        if not sources:
            return []
        # Pillow opens and resizes outside Python's lock, so a large file holds nobody up.
        fitted = await asyncio.to_thread(
            lambda: [self.processor.image_processor.fit(source) for source in sources]
        )
        return await self._encode(fitted)

    async def encode_messages(self, messages: Sequence[Message]) -> list[Message]:
        """Return a conversation with its pictures as codes, for ``UnimodalProcessor.render``.

        Raises:
            MessageError, ImageError: pictures that cannot be read.
        """
        if not _has_pictures(messages):
            return list(messages)
        sources: list[Any] = []

        def collect(found: list[Any]) -> list[Any]:
            sources.extend(found)
            return found  # stands where the codes will

        [filled] = await asyncio.to_thread(with_codes, [messages], collect)
        codes = await self.encode(sources)
        found = {id(source): code for source, code in zip(sources, codes, strict=True)}
        for message in filled:
            if not isinstance(message["content"], str):
                for part in message["content"]:
                    if id(part.get("codes")) in found:
                        part["codes"] = found[id(part["codes"])]
        return filled

    async def decode(self, codes: Sequence[Any]) -> list[Image.Image]:
        """Decode pictures.

        Args:
            codes: of each picture, (L,) or (L, G); lengths may differ.

        Raises:
            CodeError: a length or a code that the image tokenizer does not have.
        """
        return await self._decode(codes)

    async def decode_beginning(self, codes: Sequence[Any]) -> Image.Image | None:
        """Decode a preview; see :meth:`UnimodalProcessor.decode_beginning`."""
        [image] = await self._preview([codes])
        return image

    def close(self) -> None:
        """End the thread once its batch is done."""
        self._worker.shutdown(wait=False, cancel_futures=True)


def _has_pictures(messages: Sequence[Message]) -> bool:
    """Whether there is anything to encode; messages of no known shape are for others to refuse."""
    return any(
        isinstance(part, dict) and part.get("type") != "text" and part.get("codes") is None
        for message in messages
        if isinstance(message, dict) and isinstance(message.get("content"), list | tuple)
        for part in message["content"]
    )


class _Batches:
    """Does on a worker thread, in one go, the calls that came while it was busy.

    Args:
        worker: a pool of one thread.
        function: maps a list of items to a list of results, one for each.
        took: called with each call's share of the seconds of its batch.
    """

    def __init__(
        self,
        worker: ThreadPoolExecutor,
        function: Callable[[list[Any]], list[Any]],
        took: Took | None,
    ) -> None:
        self.worker = worker
        self.function = function
        self.took = took
        self._waiting: list[tuple[list[Any], asyncio.Future[list[Any]]]] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, items: Sequence[Any]) -> list[Any]:
        if not items:
            return []
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((list(items), future))
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Run batches until nothing waits. Not cancelled when a caller is."""
        try:
            while batch := self._next_batch():
                await self._run(batch)
        finally:
            self._task = None
            for _, future in self._waiting:  # not empty only where the server is going down
                future.cancel()
            self._waiting.clear()

    def _next_batch(self) -> list[tuple[list[Any], "asyncio.Future[list[Any]]"]]:
        """Take the oldest calls that make one batch; those that were cancelled fall away."""
        self._waiting = [call for call in self._waiting if not call[1].done()]
        size = count = 0
        for items, _ in self._waiting:
            size += len(items)
            if count and size > IMAGES_PER_BATCH:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    async def _run(self, calls: list[tuple[list[Any], "asyncio.Future[list[Any]]"]]) -> None:
        """Answer calls together; if that fails, one by one, so that each hears of its own fault."""
        flat = [item for items, _ in calls for item in items]
        try:
            results, seconds = await asyncio.get_running_loop().run_in_executor(
                self.worker, self._timed, flat
            )
        except Exception as error:
            if len(calls) > 1:
                for call in calls:
                    await self._run([call])
            elif not calls[0][1].done():
                calls[0][1].set_exception(error)
            return
        except asyncio.CancelledError:
            for _, future in calls:
                future.cancel()
            raise
        first = 0
        for items, future in calls:
            if not future.done():
                future.set_result(results[first : first + len(items)])
            first += len(items)
            if self.took is not None:
                self.took(seconds * len(items) / len(flat))

    def _timed(self, items: list[Any]) -> tuple[list[Any], float]:
        began = time.perf_counter()
        return self.function(items), time.perf_counter() - began
