"""The image tokenizer as a service: the same results as alone, in fewer batches, come what may."""

import asyncio
import io
import itertools
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toy import toy_merged_folder
from tokenizer_hf.errors import CodeError, ImageError, MessageError
from unimodal.processing_unimodal import UnimodalProcessor
from unimodal.serving.codec import ImageCodec
from unimodal.serving.openai_shapes import data_uri


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "nested"])
def processor(request: Any, tmp_path_factory: pytest.TempPathFactory) -> UnimodalProcessor:
    folder = toy_merged_folder(tmp_path_factory.mktemp("codec"), nested=request.param)
    processor = UnimodalProcessor.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():  # untrained, the nested one would paint one picture whatever the codes
        for parameter in processor.vq_model.decoder.parameters():  # type: ignore[union-attr]
            parameter.add_(0.1 * torch.randn_like(parameter))
    return processor


def picture(index: int, size: int = 24) -> Image.Image:
    image = Image.new("RGB", (size, size), (37 * index % 255, 90, 255 - 30 * index % 255))
    image.paste((250, 250, 20), (index % 9, index % 7, index % 9 + 9, index % 7 + 9))
    return image


def codes(processor: UnimodalProcessor, seed: int) -> list[int]:
    vocabulary = processor.vocabulary
    generator = torch.Generator().manual_seed(seed)
    lengths = range(vocabulary.min_tokens, vocabulary.num_tokens + 1)
    length = lengths[seed % len(lengths)]
    return torch.randint(vocabulary.codebook_size, (length,), generator=generator).tolist()


def same(one: Image.Image, other: Image.Image) -> bool:
    """In a batch of another size a value may be rounded the other way; codes never differ."""
    difference = np.asarray(one).astype(int) - np.asarray(other)
    return bool(np.abs(difference).max() <= 1)


def run(
    processor: UnimodalProcessor, use: Callable[[ImageCodec], Awaitable[Any]], **options: Any
) -> Any:
    async def main() -> Any:
        codec = ImageCodec(processor, **options)
        try:
            return await asyncio.wait_for(use(codec), 60)
        finally:
            codec.close()

    threads = torch.get_num_threads()
    try:
        return asyncio.run(main())
    finally:
        torch.set_num_threads(threads)


class Recorder:
    """Counts the batches that reach the image tokenizer; the first waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, processor: Any, name: str) -> None:
        self.sizes: list[int] = []
        self.began, self.go_on = threading.Event(), threading.Event()
        original = getattr(processor, name)

        def recorded(items: Any) -> Any:
            self.sizes.append(len(items))
            self.began.set()
            assert self.go_on.wait(30)
            return original(items)

        monkeypatch.setattr(processor, name, recorded)

    async def blocked(self) -> None:
        assert await asyncio.to_thread(self.began.wait, 30)


def test_many_calls_give_what_each_gives_alone(processor: UnimodalProcessor) -> None:
    pictures = [[picture(3 * call + one) for one in range(call % 3 + 1)] for call in range(12)]
    drawn = [
        [codes(processor, 5 * call + one) for one in range(call % 3 + 1)] for call in range(12)
    ]

    async def use(codec: ImageCodec) -> Any:
        encoded = asyncio.gather(*map(codec.encode, pictures))
        return await encoded, await asyncio.gather(*map(codec.decode, drawn))

    encoded, decoded = run(processor, use)
    for sources, found in zip(pictures, encoded, strict=True):
        assert found == [processor.encode_images(source).tolist()[0] for source in sources]
    for rows, images in zip(drawn, decoded, strict=True):
        for row, image in zip(rows, images, strict=True):
            assert same(image, processor.decode_codes([row])[0])
    flat = [image for images in decoded for image in images]
    assert not any(same(one, other) for one, other in itertools.pairwise(flat))


def test_calls_that_come_while_it_is_busy_are_one_batch(
    processor: UnimodalProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch, processor, "decode_codes")

    async def use(codec: ImageCodec) -> None:
        first = asyncio.create_task(codec.decode([codes(processor, 0)]))
        await recorder.blocked()
        rest = [asyncio.create_task(codec.decode([codes(processor, i)] * 2)) for i in range(1, 40)]
        await asyncio.sleep(0)  # they are waiting now
        recorder.go_on.set()
        await asyncio.gather(first, *rest)

    took: list[float] = []
    run(processor, use, decode_took=took.append)
    assert recorder.sizes == [1, 64, 14]  # 39 calls of 2: at most 64 pictures go together
    assert len(took) == 40
    assert len(set(took)) == 3  # each its share of its batch


def test_the_event_loop_goes_on_meanwhile(
    processor: UnimodalProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch, processor, "encode_images")

    async def use(codec: ImageCodec) -> bool:
        task = asyncio.create_task(codec.encode([picture(0)]))
        await recorder.blocked()
        await asyncio.sleep(0.01)
        waiting = not task.done()
        recorder.go_on.set()
        await task
        return waiting

    encoding: list[float] = []
    decoding: list[float] = []
    assert run(processor, use, encode_took=encoding.append, decode_took=decoding.append)
    assert len(encoding) == 1
    assert encoding[0] > 0.005
    assert decoding == []


def test_a_fault_is_told_to_its_own_request_only(processor: UnimodalProcessor) -> None:
    good, wrong = codes(processor, 1), [processor.vocabulary.codebook_size] * 4

    async def use(codec: ImageCodec) -> Any:
        calls = [
            codec.decode([good]),
            codec.decode([good, wrong]),
            codec.decode([good]),
            codec.encode([picture(1)]),
            codec.encode([picture(1), b"no picture"]),
            codec.encode([picture(1)]),
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    first, broken, third, encoded, unreadable, again = run(processor, use)
    assert same(first[0], third[0])
    assert isinstance(broken, CodeError)
    assert encoded == again
    assert isinstance(unreadable, ImageError)


def test_a_cancelled_call_takes_nobody_along(
    processor: UnimodalProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch, processor, "decode_codes")

    async def use(codec: ImageCodec) -> Any:
        running = asyncio.create_task(codec.decode([codes(processor, 0)]))
        await recorder.blocked()
        waiting = [asyncio.create_task(codec.decode([codes(processor, i)])) for i in range(1, 4)]
        await asyncio.sleep(0)
        running.cancel()
        waiting[1].cancel()
        await asyncio.sleep(0)
        recorder.go_on.set()
        return await asyncio.gather(running, *waiting, return_exceptions=True)

    running, first, cancelled, last = run(processor, use)
    assert isinstance(running, asyncio.CancelledError)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert recorder.sizes == [1, 2]  # the cancelled one was not decoded
    for seed, images in ((1, first), (3, last)):
        assert same(images[0], processor.decode_codes([codes(processor, seed)])[0])


def test_previews_are_decoded_too(processor: UnimodalProcessor) -> None:
    async def use(codec: ImageCodec) -> Any:
        few = [codes(processor, 5)[:count] for count in (1, 2, 3)]
        shown = await asyncio.gather(*map(codec.decode_beginning, few))
        return zip(few, shown, strict=True)

    decoding: list[float] = []
    for few, shown in run(processor, use, decode_took=decoding.append):
        alone = processor.decode_beginning(few)
        assert (shown is None) == (alone is None)
        assert shown is None or same(shown, alone)
    assert decoding


def test_messages_are_filled_with_codes(processor: UnimodalProcessor) -> None:
    shown = io.BytesIO()
    picture(2).save(shown, "PNG")
    kept = codes(processor, 3)
    messages = [
        {"role": "system", "content": "look"},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data_uri(picture(1))}},
                {"type": "text", "text": "beside"},
                {"type": "image", "image": shown.getvalue()},
                {"type": "image", "codes": kept},
            ],
        },
    ]

    async def use(codec: ImageCodec) -> Any:
        filled = await codec.encode_messages(messages)
        with pytest.raises(MessageError):
            await codec.encode_messages([{"role": "user", "content": [{"type": "video"}]}])
        assert await codec.encode_messages(messages[:1]) == messages[:1]
        return filled

    filled = run(processor, use)
    assert messages[1]["content"][0].get("codes") is None  # the caller's own are left alone
    parts = [part for part in filled[1]["content"] if part["type"] != "text"]
    alone = [processor.encode_images(picture(index)).tolist()[0] for index in (1, 2)]
    assert [part["codes"] for part in parts] == [*alone, kept]
    ours, theirs = (processor.render(m, add_generation_prompt=True) for m in (filled, messages))
    assert ours.input_ids == theirs.input_ids


def test_nothing_is_computed_for_nothing(processor: UnimodalProcessor) -> None:
    async def use(codec: ImageCodec) -> Any:
        return await codec.encode([]), await codec.decode([])

    assert run(processor, use, encode_took=pytest.fail) == ([], [])
