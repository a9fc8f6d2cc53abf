"""Images and texts that are to be matched, as Winoground and SugarCrepe ask it, and how they become batches.

The readers of `hivilt.data.reasoning_benchmarks` give lists of `Matching`. Those about the same images are one item of a
`MatchingDataset`, and `MatchingCollator` opens each image of a batch once and tokenizes each text once.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch

from hivilt.data.tables import Collator, EpochDataset, TableImage, check_items


class Matching(NamedTuple):
    """Images and texts to be matched: of Winoground two of each, in the same order; of SugarCrepe an image, its caption and a
    negative one. `kind` is that of the data set."""

    images: tuple[str | TableImage, ...]
    image_ids: tuple[str, ...]
    texts: tuple[str, ...]
    kind: str | None = None


class MatchingDataset(EpochDataset):
    """A split to measure on: one item is all examples about the same images, a dict of `images` (by id what
    `Collator.images` takes of each), `matchings`, and `matching_index` (their places in the split).

    Attributes:
        groups: for each item the places of its examples, items in the order of their first ones.

    Raises:
        ValueError: there is no example, or they differ in how many images or texts they have.
    """

    def __init__(self, examples: Sequence[Matching]):
        super().__init__(examples, seed=None)
        first, groups = self.examples[0], {}
        for place, one in enumerate(self.examples):
            if (len(one.images), len(one.texts)) != (len(first.images), len(first.texts)):
                raise ValueError(
                    f"examples: example {place} has {len(one.images)} images and {len(one.texts)} texts, the first one "
                    f"{len(first.images)} and {len(first.texts)}; give all of them as many."
                )
            groups.setdefault(one.image_ids, []).append(place)
        self.groups: list[list[int]] = list(groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        places = self.groups[index]
        matchings = [self.examples[place] for place in places]
        images = {}
        for one in matchings:
            images |= {name: {"image": image} for name, image in zip(one.image_ids, one.images, strict=True)}
        return {"images": images, "matchings": matchings, "matching_index": list(places)}


class MatchingCollator(Collator):
    """Makes a batch of examples: their images and texts, once each, and each image of an example with each of its texts.

    Returns:
        `input_ids` and `attention_mask` (B_t, N_t) long, `pixel_values` (B_i, 3, H, W) float or from the cache
        `feature_maps`; `image_index` and `text_index` (pairs,) long, the rows of each pair, an example after the other, image by
        image; `matching_index` (examples,) long, the place in `MatchingDataset.examples`.
    """

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        check_items(items, "matchings", "MatchingCollator", "MatchingDataset")
        shown: dict[str, Mapping[str, Any]] = {}
        for item in items:
            shown |= item["images"]
        matchings = [one for item in items for one in item["matchings"]]
        texts = list(dict.fromkeys(text for one in matchings for text in one.texts))
        rows = [{name: row for row, name in enumerate(names)} for names in (shown, texts)]
        pairs = [
            (rows[0][image_id], rows[1][text])
            for one in matchings
            for image_id, text in product(one.image_ids, one.texts)
        ]
        image_index, text_index = torch.tensor(pairs).t()
        images, _ = self.images(list(shown.values()), [()] * len(shown))
        return {
            **self.texts(texts),  # first: Trainer takes the batch size from there
            **images,
            "image_index": image_index,
            "text_index": text_index,
            "matching_index": torch.tensor([place for item in items for place in item["matching_index"]]),
        }
