"""What drawn images show, read from their pixels alone."""

import numpy as np

from hivilt.data.scenes import COLORS


def patches(mask):
    """The connected parts of what is true in a mask: their rows and columns."""
    left = set(zip(*np.nonzero(mask), strict=True))
    while left:
        found, reached = [], [left.pop()]
        while reached:
            row, column = reached.pop()
            found.append((row, column))
            beside = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)} & left
            left -= beside
            reached += beside
        yield np.array(found).T


def seen(image):
    """Everything in an image by its pixels alone: its words and its box in pixels."""
    pixels, things = np.asarray(image), []
    assert image.width == image.height
    for color, rgb in COLORS.items():
        for rows, columns in patches((pixels == rgb).all(-1)):
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            width, height = box[2] - box[0], box[3] - box[1]
            assert width == height
            share = len(rows) / (width * height)
            if share == 1:
                shape = "square"
            elif share > 0.7:
                shape = "circle"
            else:  # a triangle stands on its longest row
                shape = "triangle" if (rows == rows.max()).sum() == width else "cross"
            things.append(({"small" if width < image.width / 6 else "large", color, shape}, box))
    covered = sum((pixels == rgb).all(-1) for rgb in (*COLORS.values(), (255, 255, 255)))
    assert (covered == 1).all()
    return things
