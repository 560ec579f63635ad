"""Static rearrangements of a picture: patches, merged cells, resampled position tables."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def patches(pixels: Tensor, patch: int, merge: int) -> Tensor:
    """Patches `[N, L, 3 * patch^2]` of `[N, 3, H, W]`, those of one merged cell side by side."""
    count, _, height, width = pixels.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    cut = pixels.reshape(count, 3, rows, merge, patch, columns, merge, patch)
    return cut.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(count, -1, 3 * patch * patch)


def cells_first(table: Tensor, rows: int, columns: int, merge: int) -> Tensor:
    """A row-major table `[rows * columns, d]` of patches in the order of `patches`."""
    cut = table.reshape(rows // merge, merge, columns // merge, merge, -1)
    return cut.permute(0, 2, 1, 3, 4).reshape(rows * columns, -1)


def merged(features: Tensor, rows: int, columns: int, merge: int) -> Tensor:
    """Row-major patch features `[N, rows * columns, d]` joined by cell: `[N, cells, merge^2 d]`.

    The pixel shuffle of InternVL and SmolVLM, for any rectangle.
    """
    count, _, width = features.shape
    cut = features.reshape(count, rows // merge, merge, columns // merge, merge, width)
    return cut.permute(0, 1, 3, 2, 4, 5).reshape(count, -1, merge * merge * width)


def resampling(side: int, size: int, mode: str, *, align_corners: bool) -> Tensor:
    """The matrix `[size, side]` by which torch resamples one axis from `side` to `size` places."""
    unit = torch.eye(side).view(1, side, side, 1)
    found = functional.interpolate(unit, size=(size, 1), mode=mode, align_corners=align_corners)
    return found[0, :, :, 0].t().contiguous()


def resampled(table: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """A square position table `[side^2, d]` on a grid: `[rows * columns, d]`, row-major."""
    side = down.shape[1]
    grid = table.view(side, side, -1)
    return torch.einsum('ra,cb,abd->rcd', down, across, grid).flatten(0, 1)
