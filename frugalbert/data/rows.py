"""Reading token shards: a verified set of fixed-length rows, and the order in which training visits them.

In: a directory that `data/shards.py` wrote. Out: rows of token ids, on the host or resident on the device. The order of
samples is a keyed permutation that is computed, not stored (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
CT-RSA 2002: a generalised Feistel network with cycle walking), so a reader's whole state is one integer: how many
samples have been used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from frugalbert.data.packing import LABELS
from frugalbert.dist import free_memory
from frugalbert.run import read_json, sha256

if TYPE_CHECKING:
    import torch

INDEX = "index.json"
FORMAT = 1
COPY_ROWS = 1 << 20  # on the way to the device at once
REBUILD = "build the shards again (`--redo shards`)"


# ---- the set of rows -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ShardSet:
    """All rows of one length and split; row r stays row r for every worker count, world size and resume.

    `tokens` counts everything but padding, `fill` is its share of all positions; `special` maps cls, sep, pad, mask and
    unk to ids and `all` to the list of every special id; `identity` changes whenever any byte of the rows does, or of
    `labels` (rows,) uint8, which sentence pairs have and other rows have not (None).
    """

    length: int
    rows: int
    tokens: int
    fill: float
    vocab_size: int
    special: dict[str, Any]
    identity: str
    files: tuple[np.memmap, ...] = field(repr=False)
    starts: np.ndarray = field(repr=False)
    labels: np.ndarray | None = field(repr=False, default=None)

    @classmethod
    def open(
        cls, directory: Path | str, length: int, split: str = "train", *, verify: bool = True,
        tokenizer_sha256: str | None = None,
    ) -> ShardSet:  # fmt: skip
        """Open the rows of `length` tokens of a `split` (`train` or `held_out`), by default after reading all bytes.

        `verify=False` checks sizes only (other ranks of a machine whose rank 0 has verified). `tokenizer_sha256` is
        what the caller is going to train with; another one than the shards were made with is refused.
        Raises ValueError or FileNotFoundError naming the damaged or missing file.
        """
        return cls.of(Path(directory), read_index(Path(directory)), length, split, verify, tokenizer_sha256)

    @classmethod
    def of(
        cls, directory: Path, index: dict[str, Any], length: int, split: str, verify: bool = True,
        tokenizer_sha256: str | None = None,
    ) -> ShardSet:  # fmt: skip
        """As `open`, by an index that is at hand."""
        if tokenizer_sha256 is not None and tokenizer_sha256 != index["tokenizer_sha256"]:
            raise ValueError(
                f"{directory} was made with another tokenizer ({index['tokenizer_sha256'][:12]}…, now "
                f"{tokenizer_sha256[:12]}…); {REBUILD}"
            )
        found = index["sets"].get(str(length))
        if found is None:
            raise ValueError(
                f"{directory} has rows of {', '.join(index['sets'])} tokens, not of {length}; add {length} to "
                "shards.length and build the shards again"
            )
        entry, dtype = found[split], np.dtype(index["dtype"]).newbyteorder("<")
        paths = [directory / f"length-{length}" / item["name"] for item in entry["files"]]
        _check_sizes(paths, [item["rows"] * length * dtype.itemsize for item in entry["files"]])
        digests, counts = [item["sha256"] for item in entry["files"]], [item["rows"] for item in entry["files"]]
        labels = [path.with_suffix(LABELS) for path in paths] if index.get("pairs", "none") != "none" else []
        if labels:
            _check_sizes(labels, counts)
            digests += [item["labels_sha256"] for item in entry["files"]]
        if verify:
            _check_bytes([*paths, *labels], digests)
        return cls(
            length=length,
            rows=sum(counts),
            tokens=entry["tokens"],
            fill=entry["fill"],
            vocab_size=index["vocab_size"],
            special=index["special"],
            identity=hashlib.sha256("".join(digests).encode()).hexdigest(),
            files=tuple(
                np.memmap(path, dtype, "r", shape=(rows, length)) for path, rows in zip(paths, counts, strict=True)
            ),
            starts=np.cumsum([0, *counts]),
            labels=np.concatenate([np.fromfile(path, np.uint8) for path in labels]) if labels else None,
        )

    @property
    def nbytes(self) -> int:
        return self.rows * self.length * self.files[0].dtype.itemsize

    @property
    def ids(self) -> np.ndarray:
        """All rows as one array (rows, length): the mapped file itself, or a copy in memory if there are several."""
        return self.files[0] if len(self.files) == 1 else np.concatenate(self.files)

    def take(self, row_ids: np.ndarray) -> np.ndarray:
        """Rows by number, in the order asked for: (n,) -> (n, length)."""
        row_ids = np.asarray(row_ids, dtype=np.int64)
        if row_ids.size and not 0 <= row_ids.min() <= row_ids.max() < self.rows:
            raise IndexError(f"row {row_ids.min()} or {row_ids.max()} of {self.rows}")
        out = np.empty((len(row_ids), self.length), self.files[0].dtype)
        which = np.searchsorted(self.starts, row_ids, side="right") - 1
        for number in np.unique(which):
            here = which == number
            out[here] = self.files[number][row_ids[here] - self.starts[number]]
        return out


def read_index(directory: Path) -> dict[str, Any]:
    """The index of a shard directory. Raises ValueError or FileNotFoundError with the way to mend it."""
    path = directory / INDEX
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {directory} holds no finished token shards; {REBUILD}")
    index = read_json(path)
    if not isinstance(index, dict) or index.get("checksum") != index_checksum(index):
        raise ValueError(f"{path} is damaged (its checksum does not match); {REBUILD}")
    if index.get("format") != FORMAT:
        raise ValueError(f"{path} has format {index.get('format')}, this version reads {FORMAT}; {REBUILD}")
    try:
        _Index.model_validate(index)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is damaged ({place}: {first['msg']}); {REBUILD}") from None
    return index


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _File(_Part):
    name: str = Field(pattern=r"^[\w-]+\.bin$")
    rows: int = Field(ge=0)
    sha256: str


class _Split(_Part):
    files: list[_File] = Field(min_length=1)
    tokens: int
    fill: float


class _Set(_Part):
    train: _Split
    held_out: _Split


class _Special(_Part):
    cls: int
    sep: int
    pad: int
    mask: int
    unk: int
    all: list[int]


class _Index(_Part):
    """What is relied on in an index whose checksum is right."""

    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(gt=0)
    special: _Special
    tokenizer_sha256: str
    pairs: str = "none"
    sets: dict[Annotated[str, Field(pattern=r"^[1-9]\d*$")], _Set] = Field(min_length=1)


def index_checksum(index: dict[str, Any]) -> str:
    """SHA-256 of everything in the index but the checksum itself."""
    rest = {key: value for key, value in index.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_sizes(paths: Sequence[Path], sizes: Sequence[int]) -> None:
    for path, size in zip(paths, sizes, strict=True):
        if not path.is_file():
            raise FileNotFoundError(f"the shard {path} is missing; {REBUILD}")
        found = path.stat().st_size
        if found != size:
            what = "truncated" if found < size else "too long"
            raise ValueError(f"the shard {path} is {what} ({found} bytes instead of {size}); {REBUILD}")


def _check_bytes(paths: Sequence[Path], digests: Sequence[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        for path, expected, found in zip(paths, digests, pool.map(sha256, paths), strict=True):
            if found != expected:
                raise ValueError(f"the shard {path} is corrupted (its SHA-256 differs from the index); {REBUILD}")


# ---- on the device ---------------------------------------------------------------------------------------------------


def to_device(shard_set: ShardSet, device: torch.device | str, share: float = 0.5) -> torch.Tensor | ShardSet:
    """The whole set as one tensor (rows, length) on the device if it takes at most `share` of the free memory there.

    Otherwise the set itself: `gather_rows` then reads each batch from the mapped files. Ids of 16 bits travel as int16,
    of which `gather_rows` keeps the bit pattern. On the CPU a set of one file lies in the page cache and is not copied.
    """
    import torch

    where = torch.device(device)
    if shard_set.nbytes > share * _free_memory(where):
        return shard_set
    first = shard_set.files[0]
    signed = {2: np.int16, 4: np.int32}[first.dtype.itemsize]
    if where.type == "cpu" and len(shard_set.files) == 1:
        # mapped again, copy-on-write: torch warns of read-only arrays
        return torch.from_numpy(np.memmap(first.filename, signed, "c", shape=first.shape))
    resident = torch.empty(
        (shard_set.rows, shard_set.length), dtype=getattr(torch, np.dtype(signed).name), device=where
    )
    for start, rows in zip(shard_set.starts, shard_set.files, strict=False):  # starts has one more: the total
        for begin in range(0, len(rows), COPY_ROWS):
            part = torch.from_numpy(np.array(rows[begin : begin + COPY_ROWS]).view(signed))
            resident[start + begin : start + begin + len(part)] = part.to(where)
    return resident


def gather_rows(
    resident: torch.Tensor | ShardSet, row_ids: np.ndarray | torch.Tensor, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Rows (n,) of what `to_device` returned as token ids (n, length) int64, on the tensor's device or on `device`."""
    import torch

    if isinstance(resident, ShardSet):
        return torch.from_numpy(resident.take(np.asarray(row_ids)).astype(np.int64)).to(device, non_blocking=True)
    where = torch.as_tensor(row_ids, dtype=torch.int64).to(resident.device, non_blocking=True)
    rows = resident.index_select(0, where).long()
    return rows & 0xFFFF if resident.dtype == torch.int16 else rows


def _free_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of the host; plenty where the system does not say."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory() or 1 << 40


# ---- the order of samples --------------------------------------------------------------------------------------------

GOLDEN = 0x9E3779B97F4A7C15
ROUNDS = 8


@dataclass(frozen=True)
class RowOrder:
    """The endless sequence of samples: epoch after epoch over all rows, each epoch in an order of its own.

    Position p of the sequence is a row and an epoch, computed from (seed, p) alone: nothing is shuffled, stored or
    restored. A global batch is a range of positions; ranks take their `rank_share` of that range.
    """

    rows: int
    seed: int

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError("there are no rows to train on; give the corpus more text")

    def take(self, start: int, count: int) -> np.ndarray:
        """Row numbers (count,) int64 of the samples at positions start … start + count - 1."""
        position = start + np.arange(count, dtype=np.int64)
        epoch, row = position // self.rows, (position % self.rows).astype(np.uint64)
        key = _mix(_mix(np.array([self.seed & (2**64 - 1)], np.uint64)) + epoch.astype(np.uint64) * np.uint64(GOLDEN))
        row = self._feistel(row, key)
        outside = np.flatnonzero(row >= self.rows)
        while outside.size:  # cycle walking: fewer than one in sqrt(rows) needs a second turn
            row[outside] = self._feistel(row[outside], key[outside])
            outside = outside[row[outside] >= self.rows]
        return row.astype(np.int64)

    def epochs(self, start: int, count: int) -> np.ndarray:
        """How often each of these samples' rows has been used before: (count,) int64."""
        return (start + np.arange(count, dtype=np.int64)) // self.rows

    def _feistel(self, value: np.ndarray, key: np.ndarray) -> np.ndarray:
        high = np.uint64(math.isqrt(self.rows - 1) + 1)
        low = np.uint64(-(-self.rows // int(high)))
        left, right = value // low, value % low
        for number in range(ROUNDS):
            if number % 2:
                right = (right + _mix(key + left) % low) % low
            else:
                left = (left + _mix(key + right) % high) % high
            key = _mix(key + np.uint64(GOLDEN))
        return left * low + right


def rank_share(start: int, count: int, rank: int, world: int) -> tuple[int, int]:
    """The part (start, count) of a range of samples that one of `world` ranks takes: contiguous, equal within one."""
    first, last = count * rank // world, count * (rank + 1) // world
    return start + first, last - first


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): uint64, every bit depends on all."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
