"""Statements about pairs of Flickr8k's photographs, true or false by what people wrote of these.

    flickr8k_rows(folder, "train")            34,496 statements about 4,312 images

The rule. A concept is shown by an image if at least `SAID_BY` of its five captions have one of its words. It is not shown if no
caption has one of these, nor one of those that leave it open: where people write of a "player", there may be a man. All other
images are left out for that concept. Sets of four images, as those of `hivilt.data.drawn_pairs`, are drawn for two concepts
P and Q: two images show P and not Q, and two show Q and not P. Of these the same sentences are said, each as often truly as
falsely, of the three kinds that count nothing ("exactly one image shows a dog"), and to train on of the kind "side". An image is
in one set. All pairs of concepts that are left have the same chance.

So labels are as sure as the captions are complete: five people may all leave out what is there. `docs/reasoning.md` says how
many of fifty statements a reader found wrong.
"""

import random
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from hivilt.data.caption_benchmarks import CAPTION_BENCHMARKS
from hivilt.data.captions import CaptionedImage
from hivilt.data.drawn_pairs import said_of_shown, statements_of_set
from hivilt.data.reasoning import Statement

SAID_BY = 3


class Concept(NamedTuple):
    """What an image may show, the words that say so, and those that leave it open."""

    text: str
    says: frozenset[str]
    open: frozenset[str]


def _concept(text: str, says: str, leaves_open: str) -> Concept:
    return Concept(text, frozenset(says.split()), frozenset(leaves_open.split()))


_PEOPLE = (
    "person people someone somebody player players team crowd group family couple friends adult adults human figure"
)
_PEOPLE += " rider riders biker bikers cyclist surfer skier skiers snowboarder skateboarder climber hiker hikers swimmer runner"
_PEOPLE += " teenager teenagers teen teens youth youths dancer performer spectators audience everyone others he she his her him"
CONCEPTS = (
    _concept("a dog", "dog dogs puppy puppies", "animal animals greyhound greyhounds retriever labrador collie terrier poodle pet"),
    _concept("a man", "man men guy guys gentleman", f"{_PEOPLE} male males boy boys skater wrestler worker father dad cowboy"),
    _concept("a woman", "woman women lady ladies", f"{_PEOPLE} female females girl girls mother mom bride"),
    _concept(
        "a child", "child children boy boys girl girls kid kids toddler toddlers baby babies infant", f"{_PEOPLE} son daughter"
    ),
    _concept(
        "water",
        "water ocean sea lake river pool waves wave stream pond",
        "beach surf surfer surfing surfboard boat boats kayak swim swims swimming swimmer fountain splash splashes splashing "
        "wet puddle puddles shore creek shoreline dock pier rain canoe raft sprinkler hose waterfall dives diving wades wading",
    ),
    _concept("snow", "snow snowy snowbank", "ski skis skier skiers skiing snowboard snowboarder ice icy sled winter snowball white"),
    _concept("a ball", "ball balls", "toy toys soccer football basketball baseball tennis volleyball game player players plays hockey"),
    _concept("a bike", "bike bikes bicycle bicycles motorcycle motorbike", "biker bikers cyclist rider riders riding rides race racer"),
    _concept("a horse", "horse horses pony", "animal animals rider rodeo bull cowboy riding jockey donkey"),
    _concept("a skateboard", "skateboard skateboarder skateboarding skateboards", "board skate skater skaters skating ramp trick"),
    _concept("a boat", "boat boats canoe kayak raft", "ship sail sailing water lake river ocean sea dock rowing vessel"),
    _concept("a car", "car cars", "vehicle vehicles truck van street road race racing traffic taxi jeep drive driving city wheel"),
)  # fmt: skip


def shows(captions: Sequence[str], concept: Concept) -> bool | None:
    """Whether an image of these captions shows a concept, by the rule; `None`: they leave it open."""
    words = [set(re.findall("[a-z]+", caption.lower())) for caption in captions]
    if sum(not concept.says.isdisjoint(own) for own in words) >= SAID_BY:
        return True
    return False if (concept.says | concept.open).isdisjoint(set().union(*words)) else None


def pairs_of_captioned(split: str, images: Sequence[CaptionedImage], seed: int = 0) -> list[Statement]:
    """The statements about the images of a split, until no set of four is left. Those of "train" have the kind "side" too."""
    draw = random.Random(f"photographs in pairs {seed} {split}")
    shown = {
        image.image_id: tuple(shows(image.captions, concept) for concept in CONCEPTS)
        for image in draw.sample(images, len(images))
    }
    files = {image.image_id: image.image for image in images}
    # Of two concepts the images that may be of each name in a set; images are taken from the end.
    pools: dict[tuple[int, int], dict[str, list[str]]] = {}
    for p, q in combinations(range(len(CONCEPTS)), 2):
        pools[p, q] = {name: [] for name in "AB"}
        for image_id, known in shown.items():
            name = {(True, False): "A", (False, True): "B"}.get((known[p], known[q]))
            if name is not None:
                pools[p, q][name].append(image_id)
    used: set[str] = set()
    statements, number = [], 0
    while pools:
        p, q = draw.choice(list(pools))
        left = {name: [one for one in pool if one not in used] for name, pool in pools[p, q].items()}
        pools[p, q] = left
        if min(map(len, left.values())) < 2:
            del pools[p, q]
            continue
        own = dict(zip(("A", "A'", "B", "B'"), (*left["A"][-2:], *left["B"][-2:]), strict=True))
        used |= set(own.values())
        named = {name: (image_id, files[image_id]) for name, image_id in own.items()}
        said = said_of_shown(draw, CONCEPTS[p].text, CONCEPTS[q].text)
        statements += statements_of_set(draw, split, number, named, *said)
        number += 1
    return statements


def flickr8k_rows(folder: Path, split: str, image_dir: Path | None = None) -> list[dict[str, Any]]:
    """The statements of an official split of Flickr8k in its folder, as rows of a benchmark."""
    images = CAPTION_BENCHMARKS["flickr8k"].read(split, folder, image_dir)
    return [
        {**one._asdict(), "identifier": one.statement_id, "images": list(one.images), "image_ids": list(one.image_ids)}
        for one in pairs_of_captioned(split, images)
    ]
