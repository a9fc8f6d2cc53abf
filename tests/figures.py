"""What tests of drawings share."""

import numpy as np
from matplotlib.figure import Figure
from PIL import Image


def assert_is_image(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.std() > 10, "an empty sheet"


def figures_of(monkeypatch):
    """A list that each figure that is saved is put in, too."""
    drawn, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        drawn.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn
