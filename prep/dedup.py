"""``--dedup exact``: of documents with the same key (:mod:`prep.normal`) only the first in the order of the corpus stays."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from prep.encode import Block
from prep.normal import KEY_BYTES


class FirstOnly:
    """The keys that were seen, in memory (about 100 bytes per document) and, for a run that goes on, in the file ``path``."""

    def __init__(self, path: Path) -> None:
        self.seen: set[bytes] = set()
        # Of a document that goes on in the next unit: whether it stays. None between documents.
        self.open: bool | None = None
        self._path = path
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()

    def state(self) -> dict[str, Any]:
        return {"keys": len(self.seen), "keys_sha256": self._digest.hexdigest(), "open": self.open}

    def resume(self, state: dict[str, Any]) -> bool:
        """Go back to ``state``; False when the keys are not what they were then."""
        self.close()
        data = b""
        with contextlib.suppress(FileNotFoundError):
            data = self._path.read_bytes()[: state.get("keys", 0) * KEY_BYTES]
        self._path.write_bytes(data)
        self.seen = {data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES)}
        self.open = state.get("open")
        self._digest = hashlib.sha256(data)
        self._file = self._path.open("ab")
        return not state or self._digest.hexdigest() == state.get("keys_sha256")

    def without_repeats(self, block: Block) -> tuple[Block, int]:
        """The block without documents that were there before, and how many these are."""
        assert self._file
        keep = np.ones(len(block.table), dtype=bool)
        for row, key in enumerate(block.keys):
            if self.open is None:
                self.open = key not in self.seen
                if self.open:
                    self.seen.add(key)
                    self._file.write(key)
                    self._digest.update(key)
            keep[row] = self.open
            if block.table["ends"][row]:
                self.open = None
        if keep.all():
            return block, 0
        ids = []
        for number, part in enumerate(block.ids):
            rows = block.table["split"] == number
            ids.append(part[np.repeat(keep[rows], block.table["tokens"][rows])])
        return Block(block.table[keep], [], (ids[0], ids[1])), int(block.table["ends"][~keep].sum())

    def sync(self) -> None:
        assert self._file
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self._file.close()
