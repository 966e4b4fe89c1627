"""Ways in which a file of a checkpoint can come to harm. Each is a function that says whether it has changed anything."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path, Path, random.Random], bool]  # the file, its counterpart in another checkpoint, chance


def _replaced(path: Path, content: bytes) -> bool:
    if content == path.read_bytes():
        return False  # no harm was done: not a corruption
    path.write_bytes(content)
    return True


def flip(path: Path, other: Path, draw: random.Random) -> bool:
    """One bit."""
    content = bytearray(path.read_bytes())
    if not content:
        return False
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return _replaced(path, bytes(content))


def truncate(path: Path, other: Path, draw: random.Random) -> bool:
    content = path.read_bytes()
    return _replaced(path, content[: draw.randrange(len(content))]) if content else False


def zero(path: Path, other: Path, draw: random.Random) -> bool:
    """A block of zeros, as lost sectors are."""
    content = bytearray(path.read_bytes())
    begin = draw.randrange(len(content) or 1) // 512 * 512
    content[begin : begin + 4096] = bytes(len(content[begin : begin + 4096]))
    return _replaced(path, bytes(content))


def lengthen(path: Path, other: Path, draw: random.Random) -> bool:
    return _replaced(path, path.read_bytes() + bytes(draw.randint(1, 600)))


def garble(path: Path, other: Path, draw: random.Random) -> bool:
    """As many random bytes, or a few words of JSON: what another program may write there."""
    size = path.stat().st_size
    return _replaced(path, draw.choice([draw.randbytes(size), b"{}", b"[]", b"null", b'{"files": {}}', b"\xff\xfe", b""]))


def delete(path: Path, other: Path, draw: random.Random) -> bool:
    path.unlink()
    return True


def swap(path: Path, other: Path, draw: random.Random) -> bool:
    """The file of another checkpoint of this run in its place."""
    return other.exists() and _replaced(path, other.read_bytes())


def change_case(path: Path, other: Path, draw: random.Random) -> bool:
    path.rename(path.with_name(path.name.upper()))
    return True


def link(path: Path, other: Path, draw: random.Random) -> bool:
    """The same bytes, but by a link that leads out of the checkpoint, where anyone may change them."""
    outside = path.parents[1] / f"outside-{draw.getrandbits(60)}"
    shutil.move(path, outside)
    path.symlink_to(outside)
    return True


def make_folder(path: Path, other: Path, draw: random.Random) -> bool:
    path.unlink()
    path.mkdir()
    return True


def add_file(path: Path, other: Path, draw: random.Random) -> bool:
    names = ("custom_checkpoint_0.pkl", "pytorch_model.bin", "sampler.bin", "model.safetensors.bak", "a/b")
    extra = path.parent / draw.choice(names)
    extra.parent.mkdir(exist_ok=True)
    extra.write_bytes(draw.randbytes(draw.randrange(100)))
    return True


def add_pipe(path: Path, other: Path, draw: random.Random) -> bool:
    """Something that blocks who reads it."""
    pipe = path.with_name(f"pipe-{draw.getrandbits(60)}")
    os.mkfifo(pipe)
    return True


DAMAGES: tuple[Damage, ...] = (
    flip, flip, flip, truncate, zero, lengthen, garble, delete, swap, change_case, link, make_folder, add_file, add_pipe,
)  # fmt: skip
