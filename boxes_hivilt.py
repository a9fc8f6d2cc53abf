"""Boxes as tensors `(..., 4)`, in parts of the image: centre, width and height, as models learn them, or corners."""

import numpy as np
import torch


def to_corners(boxes: torch.Tensor) -> torch.Tensor:
    """`(cx, cy, width, height)` -> `(left, top, right, bottom)`."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def overlap(corners: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Intersection over union of boxes given by their corners, and their generalized one, `IoU - (hull - union) / hull`
    (Rezatofighi et al., arXiv 1902.09630, algorithm 1), both of the shape that their sizes broadcast to. Without area
    0 and at most 0.
    """

    def area(left_top: torch.Tensor, right_bottom: torch.Tensor) -> torch.Tensor:
        return (right_bottom - left_top).clamp(min=0).prod(dim=-1)

    (left_top, right_bottom), (other_left_top, other_right_bottom) = corners.split(2, -1), others.split(2, -1)
    shared = area(torch.maximum(left_top, other_left_top), torch.minimum(right_bottom, other_right_bottom))
    hull = area(torch.minimum(left_top, other_left_top), torch.maximum(right_bottom, other_right_bottom))
    union = area(left_top, right_bottom) + area(other_left_top, other_right_bottom) - shared
    least = torch.finfo(corners.dtype).tiny
    iou = shared / union.clamp(min=least)
    return iou, iou - (hull - union) / hull.clamp(min=least)


def suppress(corners: torch.Tensor, threshold: float, limit: int | None = None) -> torch.LongTensor:
    """Of boxes `(n, 4)`, the best first, those that overlap no better one that is kept by more than `threshold`, at most
    `limit` of them: their places `(kept,)`, in order. Greedy non-maximum suppression, as torchvision's `nms`.
    """
    left, kept = np.ones(len(corners), dtype=bool), []
    # Rows of the table of all pairs, some at a time, since a call of torch takes longer than what it computes here.
    for start in range(0, len(corners), 64):
        places = start + left[start : start + 64].nonzero()[0]
        over = (overlap(corners[places][:, None], corners)[0] > threshold).cpu().numpy()  # (places, n)
        for place, covered in zip(places.tolist(), over, strict=True):
            if left[place]:
                kept.append(place)
                left &= ~covered
            if len(kept) == limit:
                return torch.tensor(kept, device=corners.device)
    return torch.tensor(kept, dtype=torch.long, device=corners.device)


def grid_cells(height: int, width: int, device: torch.device | str | None = None) -> torch.FloatTensor:
    """The cells of a grid over the image, row-major, `(height * width, 4)`: centre, width and height, float32."""
    size = torch.tensor([1 / width, 1 / height], device=device)
    axes = [torch.arange(count, device=device) + 0.5 for count in (height, width)]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    centres = torch.stack([columns.flatten(), rows.flatten()], dim=-1) * size
    return torch.cat([centres, size.expand_as(centres)], dim=-1)


def assign_cells(boxes: torch.Tensor, grid: tuple[int, int]) -> torch.LongTensor:
    """The box `(cx, cy, width, height)` that each cell of a grid belongs to, `(B, n, 4)` -> `(B, height * width)`; -1: none.
    A cell belongs to the smallest box that its centre lies in or that has its own centre in the cell, so that a box
    smaller than a cell has one. Boxes without area, which fill a batch up, have none.
    """
    height, width = grid
    cells = grid_cells(height, width, boxes.device).to(boxes.dtype)
    centre, size = boxes[..., None, :2], boxes[..., None, 2:]
    inside = ((cells[:, :2] - centre).abs() < size / 2).all(dim=-1)  # (B, n, height * width)
    columns, rows = (
        (boxes[..., axis] * count).long().clamp(0, count - 1) for axis, count in enumerate((width, height))
    )
    holds = (rows * width + columns)[..., None] == torch.arange(height * width, device=boxes.device)
    area = size.prod(dim=-1)  # (B, n, 1)
    areas = area.masked_fill(~((inside | holds) & (area > 0)), float("inf"))
    smallest, owner = areas.min(dim=1)
    return owner.masked_fill(smallest.isinf(), -1)
