"""Searching folders of images by words or by an image."""

from hivilt.search.image_index import Hit, ImageIndex

__all__ = ["Hit", "ImageIndex"]
