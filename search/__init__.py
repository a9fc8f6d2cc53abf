"""Searching folders of images by words or by an image, and asking all of their images a question."""

from hivilt.search.image_index import Hit, ImageAnswer, ImageIndex

__all__ = ["Hit", "ImageAnswer", "ImageIndex"]
