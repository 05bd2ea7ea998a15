"""A teacher's likeliest predictions on disk: it is asked once for every masked copy of a row.

A directory with `index.json` (whose predictions of what they are) and a file of fixed-size records per row length:
CRC-32, then for each masked slot N token ids, N scores and the rest's share (`distill.Prediction`). A record that was
never written or only half of it does not match its sum and counts as absent, so a killed run leaves nothing to mend;
students with the same masks share the directory, also at the same time.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frugalbert.data.slots import record_type
from frugalbert.run import flatten, read_json, write_json
from frugalbert.train.distill import Prediction


class Cache:
    """`sizes`: row length -> (records, masked slots per row). `identity`: all that decides a prediction."""

    def __init__(
        self, folder: Path, identity: dict[str, Any], sizes: dict[int, tuple[int, int]], count: int, vocab_size: int
    ) -> None:
        """Opens or makes it. Raises ValueError if it holds other predictions, OSError if it cannot be written."""
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"pretrain.distill.cache {folder} is a file; name a directory")
        folder.mkdir(parents=True, exist_ok=True)
        index = folder / "index.json"
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".tmp-")}
        if index.name in names:
            before, now = flatten(read_json(index)), flatten(identity)
            other = sorted(key.split(".")[0] for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            if other:
                raise ValueError(
                    f"pretrain.distill.cache {folder} was made with another {' and '.join(dict.fromkeys(other))}; name "
                    "another directory, or delete this one"
                )
        elif names:
            raise ValueError(f"pretrain.distill.cache {folder} holds other files; name an empty or new directory")
        else:  # several ranks may come here at once, with the same identity
            write_json(index, identity)
        self.files: dict[int, np.memmap[Any, Any]] = {}
        for length, (records, slots) in sizes.items():
            kind, path = record_type(slots, count, vocab_size), folder / f"length-{length}.bin"
            with open(path, "ab") as file:
                if file.tell() != records * kind.itemsize:
                    file.truncate(records * kind.itemsize)  # sparse: the disk fills as records are written
            self.files[length] = np.memmap(path, kind, "r+", shape=(records,))

    def read(self, length: int, numbers: np.ndarray) -> tuple[Stored, np.ndarray]:
        """The records `numbers`, and which of them are whole."""
        found = self.files[length][numbers]
        known = np.array([_sum(record) == record["crc"] for record in found], dtype=bool)
        return Stored(found), known

    def write(self, length: int, numbers: np.ndarray, wanted: Prediction) -> None:
        """Predictions (rows * slots, N) of the rows `numbers`."""
        assert wanted.ids is not None
        assert wanted.rest is not None
        file = self.files[length]
        found = np.zeros(len(numbers), file.dtype)
        for name, tensor in (("ids", wanted.ids), ("scores", wanted.scores), ("rest", wanted.rest)):
            found[name] = tensor.cpu().numpy().reshape(found[name].shape)
        for record in found:
            record["crc"] = _sum(record)
        file[numbers] = found


class Stored:
    """Records as they lie on disk."""

    def __init__(self, found: np.ndarray) -> None:
        self.found = found

    def to(self, device: torch.device) -> Prediction:
        slots, count = self.found["ids"].shape[1:]
        ids = torch.from_numpy(self.found["ids"].astype(np.int64).reshape(-1, count))
        scores, rest = (torch.from_numpy(self.found[name].copy()) for name in ("scores", "rest"))
        return Prediction(
            scores.view(-1, count).to(device), ids.to(device), rest.view(len(self.found) * slots).to(device)
        )


def _sum(record: Any) -> int:
    return zlib.crc32(record.tobytes()[4:])
