"""The code cache: right codes, whole after a kill, refused with another tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.toy import nested_image_tokenizer, tiny_image_tokenizer
from tests.training.conftest import write_pictures
from tokenizer_hf.errors import CheckpointError, DataError, MismatchError
from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
from training.data.code_cache import CodeCache, build_cache
from training.data.sources import ImageFolder, Row, Skipped


class DyingSource(ImageFolder):
    """Stops as a kill would, after some rows."""

    dies_at = 15

    def read(self, start: int = 0) -> Iterator[Row | Skipped]:
        for row in super().read(start):
            if row.index == self.dies_at:
                raise KeyboardInterrupt
            yield row


def rows_of(cache: CodeCache) -> list[tuple]:
    return [
        (cache.key(i), cache.codes(i).tolist(), cache.captions(i), cache.questions(i))
        for i in range(len(cache))
    ]


def test_codes_are_the_tokenizers(cache: Path, merged: Path, pictures: Path) -> None:
    opened = CodeCache(cache)
    model = ImageTokenizer.from_pretrained(merged / "image_tokenizer").eval()
    for row in (0, 7, 23):
        image = Image.open(pictures / f"{row:03d}.png")
        pixel_values = model.image_processor([image])["pixel_values"]
        assert opened.codes(row).tolist() == model.encode(pixel_values)[0].tolist()
    assert opened.manifest.fingerprint == model.fingerprint()
    assert opened.captions(1)[0] == "A green circle."
    assert opened.question(int(opened.question_offsets[2])) == ("What colour is it?", "It's blue!")


def test_tokenizers_that_come_with_the_package(pictures: Path, tmp_path: Path) -> None:
    built = [
        build_cache(str(pictures), name, tmp_path / name[8:], progress=False)
        for name in ("shipped:image_tokenizer", "shipped:model")
    ]
    assert built[0].manifest.fingerprint == built[1].manifest.fingerprint


def test_batch_size_does_not_matter(pictures: Path, tmp_path: Path) -> None:
    model = nested_image_tokenizer()
    one = build_cache(str(pictures), model, tmp_path / "one", batch_size=1, progress=False)
    many = build_cache(str(pictures), model, tmp_path / "many", batch_size=24, progress=False)
    assert rows_of(one) == rows_of(many)


def test_a_killed_build_goes_on(pictures: Path, tmp_path: Path) -> None:
    model = tiny_image_tokenizer()
    whole = build_cache(ImageFolder(pictures), model, tmp_path / "a", shard_rows=4, progress=False)
    out = tmp_path / "b"
    with pytest.raises(KeyboardInterrupt):
        build_cache(DyingSource(pictures), model, out, shard_rows=4, progress=False)
    assert len(list(out.glob("codes-*.parquet"))) == 3  # of 15 rows, 12 were committed
    with pytest.raises(CheckpointError, match="half-built"):
        CodeCache(out)
    # A shard that was written, but not its progress, is written again and not kept twice.
    (out / "codes-00003.parquet").write_bytes(b"half")
    encoded = count_encoded(model)
    resumed = build_cache(ImageFolder(pictures), model, out, shard_rows=4, progress=False)
    assert sum(encoded) == 12
    assert rows_of(resumed) == rows_of(whole)
    assert not (out / "progress.json").exists()


def count_encoded(model: ImageTokenizer) -> list[int]:
    counted: list[int] = []
    plain = model.encode

    def encode(pixel_values, num_tokens=None):  # type: ignore[no-untyped-def]
        counted.append(len(pixel_values))
        return plain(pixel_values, num_tokens)

    model.encode = encode  # type: ignore[method-assign]
    return counted


def test_a_finished_cache_is_not_built_again(pictures: Path, cache: Path) -> None:
    model = tiny_image_tokenizer()
    encoded = count_encoded(model)
    build_cache(str(pictures), model, cache, progress=False)
    assert encoded == []


def test_another_tokenizer_is_refused(cache: Path, pictures: Path) -> None:
    other = tiny_image_tokenizer(seed=1)
    ours = CodeCache(cache).manifest.fingerprint
    with pytest.raises(MismatchError, match=rf"{ours[:16]}.*{other.fingerprint()[:16]}.*encode"):
        CodeCache(cache, other.fingerprint())
    with pytest.raises(MismatchError, match="holds a cache of the image tokenizer"):
        build_cache(str(pictures), other, cache, progress=False)
    assert CodeCache(cache, ours).manifest.num_rows == 24


def test_other_data_is_refused(cache: Path, tmp_path: Path) -> None:
    fewer = write_pictures(tmp_path, 5)
    with pytest.raises(MismatchError, match="built from other data"):
        build_cache(str(fewer), tiny_image_tokenizer(), cache, progress=False)


def test_skipped_rows_are_counted_and_listed(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 6)
    for broken in (1, 4):
        (folder / f"{broken:03d}.png").write_text("not a picture")
    out = tmp_path / "cache"
    cache = build_cache(str(folder), tiny_image_tokenizer(), out, shard_rows=2, progress=False)
    assert (cache.manifest.num_rows, cache.manifest.skipped) == (4, 2)
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [line["where"].rsplit(":", 1)[1] for line in lines] == ["2", "5"]


def test_no_good_row_is_an_error(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 2)
    for file in folder.glob("*.png"):
        file.write_text("not a picture")
    with pytest.raises(DataError, match="no usable row"):
        build_cache(str(folder), tiny_image_tokenizer(), tmp_path / "cache", progress=False)
    with pytest.raises(CheckpointError):
        CodeCache(tmp_path / "cache")


def test_chats_keep_their_codes_in_place(pictures: Path, tmp_path: Path) -> None:
    image = {"type": "image", "image": str((pictures / "000.png").resolve())}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "Draw it in blue."}]},
        {"role": "assistant", "content": [{**image, "image": str(pictures / "002.png")}]},
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    model = tiny_image_tokenizer()
    chats = build_cache(file, model, tmp_path / "chats", progress=False)
    plain = build_cache(str(pictures), model, tmp_path / "plain", progress=False)
    found = chats.messages(0)
    assert found is not None and chats.has_messages.tolist() == [True]
    assert chats.chat_codes(0) == [plain.codes(0).tolist(), plain.codes(2).tolist()]
    assert plain.chat_codes(0) == []
    assert found[0]["content"][0] == {"type": "image", "codes": plain.codes(0).tolist()}
    assert found[1]["content"][0] == {"type": "image", "codes": plain.codes(2).tolist()}
    assert plain.messages(0) is None


@pytest.mark.parametrize("damage", ["missing shard", "cut shard", "cut manifest"])
def test_a_damaged_cache_is_refused(damage: str, pictures: Path, tmp_path: Path) -> None:
    build_cache(str(pictures), tiny_image_tokenizer(), tmp_path, shard_rows=8, progress=False)
    shard = tmp_path / "codes-00001.parquet"
    if damage == "missing shard":
        shard.unlink()
    elif damage == "cut shard":
        shard.write_bytes(shard.read_bytes()[:100])
    else:
        (tmp_path / "cache_manifest.json").write_text("{")
    with pytest.raises(CheckpointError):
        CodeCache(tmp_path)
