"""Tensors of one naming to tensors of the other, one at a time, by the :class:`Link` table of a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from accel_pretrain.errors import CheckpointError
from accel_pretrain.hf.family import Link

Read = Callable[[str], torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]


def theirs_shape(link: Link, shapes: Shapes) -> tuple[int, ...]:
    """The shape that a tensor of theirs must have for ours to have ``shapes``."""
    parts = [_shape_of(name, shapes) for name in link.ours]
    whole = (sum(part[0] for part in parts), *parts[0][1:])
    return whole[::-1] if link.transposed else whole


def read_ours(name: str, links: Mapping[str, Link], shapes: Shapes, read_theirs: Read) -> torch.Tensor:
    """One parameter of ours, as a view of what ``read_theirs`` gives (a copy if the link has groups).

    ``links`` finds the link that holds it. Leading dimensions of size 1, which TensorFlow's convolutions have, may be there.
    """
    link = links[name]
    begin = sum(shapes[other][0] for other in link.ours[: link.ours.index(name)]) // link.groups
    whole = read_theirs(link.theirs)
    expected = theirs_shape(link, shapes)
    while whole.ndim > len(expected) and whole.shape[0] == 1:
        whole = whole[0]
    if tuple(whole.shape) != expected:
        raise CheckpointError(f"{link.theirs} has the shape {tuple(whole.shape)}, but the config says {expected}")
    pieces = (whole.T if link.transposed else whole).unflatten(0, (link.groups, -1))
    return pieces[:, begin : begin + shapes[name][0] // link.groups].flatten(0, 1)


def read_theirs(link: Link, shapes: Shapes, read_ours: Read) -> torch.Tensor:
    """One tensor of theirs; a bias that we do not have is zero."""
    parts = [read_ours(name) if name in shapes else torch.zeros(_shape_of(name, shapes)) for name in link.ours]
    pieces = [part.unflatten(0, (link.groups, -1)) for part in parts]
    whole = parts[0] if len(parts) == 1 else torch.cat(pieces, dim=1).flatten(0, 1)
    return (whole.T if link.transposed else whole).contiguous()


def links_by_ours(links: Sequence[Link], shapes: Shapes) -> dict[str, Link]:
    """Which link holds each parameter; every parameter must be in exactly one."""
    found = {name: link for link in links for name in link.ours if name in shapes}
    assert found.keys() == shapes.keys(), sorted(found.keys() ^ shapes.keys())
    return found


def _shape_of(name: str, shapes: Shapes) -> tuple[int, ...]:
    if name in shapes:
        return shapes[name]
    return shapes[name.removesuffix("bias") + "weight"][:1]  # of a bias that we do not have
