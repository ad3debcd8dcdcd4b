"""Read and rewrite safetensors files one tensor at a time: size on disk is no size in memory.

A safetensors file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape,
byte offsets) and the raw values. Copying a tensor is copying bytes; only tensors that get new rows,
or another dtype, are ever turned into tensors, and never two of the old ones at once.

Source: the format's description, https://huggingface.co/docs/safetensors, "Format".
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tokenizer_hf.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CONVERTED = ("F64", "F32", "F16", "BF16")  # what a change of dtype touches
_CHUNK = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on disk."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int
    """One past the last byte in the file."""

    def read(self) -> Tensor:
        """The values, on the CPU, in the stored dtype."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            raw = bytearray(stream.read(self.stop - self.start))
        if not raw:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        return torch.frombuffer(raw, dtype=torch.uint8).view(DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class NewRows:
    """What a tensor becomes: its first ``keep`` rows as they are, then ``rows``."""

    keep: int
    rows: Tensor


def shard_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, in the order of the index.

    Raises:
        CheckpointError: no safetensors weights, a shard that is missing, or an unreadable index.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is no index of weight files ({error})") from error
        files = [folder / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing or any(Path(name).name != name for name in names):
            raise CheckpointError(
                f"{index} names {len(files)} files, {len(missing)} of them missing "
                f"({', '.join(missing[:3])}); download the model again"
            )
        return files
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    pickles = sorted(file.name for file in (*folder.glob("*.bin"), *folder.glob("*.pt")))
    if pickles:
        raise CheckpointError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when opened; "
            "expected safetensors. If you trust them, load with transformers and save_pretrained"
        )
    raise CheckpointError(
        f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}; expected model weights"
    )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, by name.

    Raises:
        CheckpointError: the file is corrupt, truncated, or of a dtype that we do not know.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            tensor = StoredTensor(
                name, file, entry["dtype"], shape, 8 + length + begin, 8 + length + end
            )
            values = (end - begin) / DTYPES[tensor.dtype].itemsize
            if not 0 <= begin <= end <= size - 8 - length or math.prod(shape) != values:
                raise ValueError(f"{name} of shape {shape} lies at bytes {begin} to {end}")
            found[name] = tensor
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is corrupt or truncated ({error}); expected safetensors. Get it again"
        ) from error


def rewrite(
    files: list[Path],
    out: Path,
    changes: Mapping[str, NewRows],
    dtype: torch.dtype | None = None,
) -> None:
    """Copy weight files into the folder ``out``, giving some tensors new rows.

    The same shards under the same names, and an index if there are several. At most one tensor is
    in memory at a time.

    Args:
        files: the shards, from :func:`shard_files`.
        out: an existing folder.
        changes: new rows by tensor name; they are cast to the tensor's dtype.
        dtype: what floating-point tensors are cast to; None keeps each as it is.
    """
    weight_map: dict[str, str] = {}
    total = 0
    single = len(files) == 1
    for file in files:
        name = SINGLE_FILE if single else file.name
        stored = read_header(file)
        total += _rewrite_file(list(stored.values()), out / name, changes, dtype)
        weight_map.update(dict.fromkeys(stored, name))
    if not single:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _rewrite_file(
    tensors: list[StoredTensor],
    target: Path,
    changes: Mapping[str, NewRows],
    dtype: torch.dtype | None,
) -> int:
    """Write one file; return the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Widest dtype first, as the library does, so that every tensor is aligned to its item size.
    tensors = sorted(tensors, key=lambda t: (-DTYPES[t.dtype].itemsize, t.start))
    plan: list[tuple[StoredTensor, torch.dtype, bool]] = []
    for tensor in tensors:
        new = dtype if dtype is not None and tensor.dtype in CONVERTED else DTYPES[tensor.dtype]
        shape = list(tensor.shape)
        if tensor.name in changes:
            shape[0] = changes[tensor.name].keep + len(changes[tensor.name].rows)
        begin, end = end, end + math.prod(shape) * new.itemsize
        header[tensor.name] = {"dtype": NAMES[new], "shape": shape, "data_offsets": [begin, end]}
        plan.append((tensor, new, tensor.name in changes or new is not DTYPES[tensor.dtype]))
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with target.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor, new, changed in plan:
            if changed:
                _write_changed(stream, tensor, new, changes.get(tensor.name))
            else:
                _copy_bytes(stream, tensor)
    return end


def _write_changed(
    stream: BinaryIO, tensor: StoredTensor, dtype: torch.dtype, change: NewRows | None
) -> None:
    values = tensor.read()
    if change is not None:
        values = values[: change.keep]
    _write_values(stream, values.to(dtype))
    if change is not None:
        _write_values(stream, change.rows.to(dtype))


def _write_values(stream: BinaryIO, values: Tensor) -> None:
    if values.numel():
        stream.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _copy_bytes(stream: BinaryIO, tensor: StoredTensor) -> None:
    with tensor.file.open("rb") as source:
        source.seek(tensor.start)
        left = tensor.stop - tensor.start
        while left:
            chunk = source.read(min(left, _CHUNK))
            if not chunk:
                raise CheckpointError(f"{tensor.file} ended {left} bytes early while it was copied")
            stream.write(chunk)
            left -= len(chunk)
