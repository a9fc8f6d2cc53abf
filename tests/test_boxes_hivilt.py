"""Boxes against loops over them in plain numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hivilt.boxes_hivilt import assign_cells, grid_cells, overlap, suppress, to_corners


def corners_of(box: list[float]) -> list[float]:
    cx, cy, width, height = box
    return [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]


def overlap_of(one: list[float], other: list[float]) -> tuple[float, float]:
    """IoU and GIoU of two boxes given by their corners."""
    area = lambda left, top, right, bottom: max(right - left, 0) * max(bottom - top, 0)
    shared = area(*(max(pair) for pair in zip(one[:2], other[:2], strict=True)), *map(min, one[2:], other[2:]))
    hull = area(*map(min, one[:2], other[:2]), *map(max, one[2:], other[2:]))
    union = area(*one) + area(*other) - shared
    return shared / union, shared / union - (hull - union) / hull


@st.composite
def boxes(draw, most: int = 6) -> list[list[float]]:
    """Centre, width and height, of which some lie over one another and some are alike."""
    steps = st.integers(1, 12).map(lambda number: number / 13)
    return draw(st.lists(st.tuples(steps, steps, steps, steps).map(list), min_size=1, max_size=most))


@settings(max_examples=40)
@given(boxes(), boxes())
def test_overlap_of_all_pairs_is_that_of_each(some, others):
    iou, generalized = overlap(to_corners(torch.tensor(some))[:, None], to_corners(torch.tensor(others)))
    expected = [[overlap_of(corners_of(one), corners_of(other)) for other in others] for one in some]
    torch.testing.assert_close(torch.stack([iou, generalized], dim=-1), torch.tensor(expected))


# Two boxes (left, top, width, height), their IoU and their GIoU.
PAIRS = [
    ((0, 0, 10, 10), (0, 0, 10, 10), 1, 1),
    ((0, 0, 10, 10), (5, 0, 10, 10), 0.333333, 0.333333),
    ((0, 0, 10, 10), (0, 0, 10, 5), 0.5, 0.5),
    ((0, 0, 10, 10), (2, 2, 8, 8), 0.64, 0.64),
    ((0, 0, 10, 10), (3, 1, 10, 10), 0.459854, 0.417896),
    ((0, 0, 10, 20), (0, 5, 10, 20), 0.6, 0.6),
    ((0, 0, 100, 50), (33, 0, 100, 50), 0.503759, 0.503759),
    ((0, 0, 4, 4), (10, 10, 4, 4), 0, -0.836735),
]


def test_overlap_worked_by_hand():
    ones, others, iou, generalized = map(torch.tensor, zip(*PAIRS, strict=True))
    for boxes_of_pair in (ones, others):
        boxes_of_pair[:, 2:] += boxes_of_pair[:, :2]
    found = torch.stack(overlap(ones.float(), others.float()))
    torch.testing.assert_close(found, torch.stack([iou, generalized]), atol=1e-6, rtol=0)

    one = torch.tensor([0.0, 0.0, 2.0, 1.0])
    others = torch.tensor([[0.0, 0, 2, 1], [1.0, 0, 3, 1], [3.0, 0, 4, 1], [5.0, 5, 5, 5], [1.0, 0.5, 1, 0.5]])
    iou, generalized = overlap(one, others)
    torch.testing.assert_close(iou, torch.tensor([1, 1 / 3, 0, 0, 0]))
    torch.testing.assert_close(generalized, torch.tensor([1, 1 / 3, -1 / 4, 2 / 25 - 1, 0]))
    assert overlap(one * 0, one * 0)[0] == 0


@settings(max_examples=40)
@given(boxes(9), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from([None, 1, 2]))
def test_of_boxes_that_overlap_the_best_is_kept(some, threshold, limit):
    corners = [corners_of(box) for box in some]
    kept = []
    for place, box in enumerate(corners):
        if all(overlap_of(box, corners[better])[0] <= threshold + 1e-6 for better in kept):
            kept.append(place)
    assert suppress(torch.tensor(corners), threshold + 1e-6, limit).tolist() == kept[:limit]


def test_no_box_is_suppressed_to_none():
    assert suppress(torch.zeros(0, 4), 0.5).tolist() == []


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 2)])
def test_cells_cover_the_image_row_by_row(grid):
    height, width = grid
    expected = [
        [(x + 0.5) / width, (y + 0.5) / height, 1 / width, 1 / height] for y in range(height) for x in range(width)
    ]
    torch.testing.assert_close(grid_cells(*grid), torch.tensor(expected))


def owners_of(some: list[list[float]], grid: tuple[int, int]) -> list[int]:
    """The box of each cell, one by one."""
    height, width = grid
    owners = []
    for y in range(height):
        for x in range(width):
            claims = []
            for number, (cx, cy, w, h) in enumerate(some):
                inside = abs((x + 0.5) / width - cx) < w / 2 and abs((y + 0.5) / height - cy) < h / 2
                holds = min(math.floor(cx * width), width - 1) == x and min(math.floor(cy * height), height - 1) == y
                if w * h > 0 and (inside or holds):
                    claims.append((w * h, number))
            owners.append(min(claims)[1] if claims else -1)
    return owners


@settings(max_examples=60)
@given(st.lists(boxes(), min_size=1, max_size=3), st.sampled_from([(1, 1), (3, 5), (4, 2)]))
def test_each_cell_belongs_to_the_smallest_box_it_lies_in(texts, grid):
    """In float64, in which borders of cells and boxes are where they are in the loop."""
    padded = [some + [[0.0] * 4] * (6 - len(some)) for some in texts]
    found = assign_cells(torch.tensor(padded, dtype=torch.float64), grid)
    assert found.tolist() == [owners_of(some, grid) for some in texts]


def test_a_box_smaller_than_a_cell_has_the_cell_that_holds_its_centre():
    some = torch.tensor([[[0.05, 0.95, 0.01, 0.02], [1.0, 0.0, 0.1, 0.1], [0.5, 0.5, 1.0, 1.0]]])
    assert assign_cells(some, (2, 3)).view(2, 3).tolist() == [[2, 2, 1], [0, 2, 2]]
    assert assign_cells(torch.zeros(1, 2, 4), (2, 3)).eq(-1).all()
