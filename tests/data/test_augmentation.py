"""Changed images stay images, the same draw gives the same one, and words turn with them."""

import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from hivilt.data.augmentation import (
    _OPERATIONS,
    GRAY,
    Augmentation,
    Frame,
    rand_augment,
    random_resized_crop,
    says_left_or_right,
    swap_left_and_right,
)

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.sampled_from([(1, 1), (1, 4000), (4000, 1), (2, 999)])
SEEDS = st.integers(0, 2**32)
RECIPE = {"random_crop": 0.5, "random_flip": "swap", "rand_augment": (2, 7)}


def noise(size, seed=0):
    """Every pixel another colour, as good as surely."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def where(size):
    """An image whose pixels say their own place: x in the lower, y in the higher twelve bits."""
    place = np.arange(size[0])[None, :] + 4096 * np.arange(size[1])[:, None]
    return Image.fromarray(np.stack([place & 255, place >> 8 & 255, place >> 16], axis=-1).astype(np.uint8))


def place_of(image):
    """Left, top, width and height of what was cut from `where`, after making sure that it is one piece of it."""
    pixels = np.array(image).astype(int)
    place = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
    left, top = place[0, 0] % 4096, place[0, 0] // 4096
    assert (place == place[0, 0] + np.arange(image.width)[None, :] + 4096 * np.arange(image.height)[:, None]).all()
    return left, top, *image.size


# Images


@given(SIZES, SEEDS, st.floats(0.001, 1))
@settings(max_examples=150, deadline=None)
def test_a_crop_is_a_piece_of_the_image(size, seed, min_scale):
    first, second = (random_resized_crop(size, random.Random(seed), min_scale) for _ in range(2))
    assert first == second
    left, top, right, bottom = first
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    cut, frame = Augmentation(random_crop=min_scale)(where(size), [], random.Random(seed))
    assert place_of(cut) == (left, top, right - left, bottom - top)
    shown = frame.left * size[0], frame.top * size[1], frame.right * size[0], frame.bottom * size[1]
    assert shown == pytest.approx(first) and not frame.mirrored


def test_crops_have_the_areas_and_aspect_ratios_of_the_inception_crop():
    places = [random_resized_crop((300, 240), random.Random(seed), 0.2) for seed in range(400)]
    areas = [(right - left) * (bottom - top) / (300 * 240) for left, top, right, bottom in places]
    ratios = [(right - left) / (bottom - top) for left, top, right, bottom in places]
    assert 0.19 < min(areas) < 0.23 and 0.9 < max(areas) <= 1
    assert 0.74 < min(ratios) < 0.78 and 1.28 < max(ratios) < 1.35
    assert len({(left, top) for left, top, _, _ in places}) > 380
    assert min(left for left, *_ in places) == 0 and max(right for _, _, right, _ in places) == 300


@pytest.mark.parametrize(
    ("size", "place"),
    [
        ((1, 4000), (0, 1999, 1, 2000)),
        ((10, 1000), (0, 493, 10, 506)),
        ((1000, 12), (492, 0, 508, 12)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_where_no_crop_fits_it_is_centred(size, place):
    for seed in range(5):
        assert random_resized_crop(size, random.Random(seed), 1.0) == place


@given(SIZES, SEEDS, st.integers(1, 4), st.integers(0, 10))
@settings(max_examples=150, deadline=None)
def test_rand_augment_gives_images_of_the_same_size(size, seed, num_ops, magnitude):
    image = noise(size)
    before = image.tobytes()
    first, second = (rand_augment(image, random.Random(seed), num_ops, magnitude) for _ in range(2))
    assert (first.mode, first.size) == ("RGB", size)
    assert first.tobytes() == second.tobytes()
    assert image.tobytes() == before


def test_rand_augment_carries_out_half_of_its_operations():
    image = noise((12, 12))
    changed = [rand_augment(image, random.Random(seed), 1, 10).tobytes() for seed in range(1000)]
    kept = changed.count(image.tobytes())
    # One operation of ten is the identity. Of the others each changes noise: equal ones are the same operation.
    assert abs(kept - 550) < 65
    assert len(set(changed)) - 1 >= len(_OPERATIONS) - 1


def test_operations_reach_as_far_as_albef():
    image = noise((384, 768))
    pixels = np.array(image)
    moved = np.array(_OPERATIONS["translate_x"](image, 1, 1))
    assert (moved[:, :-10] == pixels[:, 10:]).all() and (moved[:, -10:] == GRAY).all()
    moved = np.array(_OPERATIONS["translate_y"](image, 0.5, -1))
    assert (moved[10:] == pixels[:-10]).all() and (moved[:10] == GRAY).all()

    # A bright line down the middle leans by 0.3 of the height, or is turned by 30 degrees.
    line = Image.new("RGB", (301, 301))
    line.paste((255, 255, 255), (150, 0, 151, 301))
    bright = np.array(_OPERATIONS["shear_x"](line, 1, -1))[..., 0]
    assert abs(bright[0].argmax() - 150) <= 1 and abs(bright[300].argmax() - 240) <= 1
    bright = np.array(_OPERATIONS["shear_y"](line.rotate(90), 1, -1))[..., 0]
    assert abs(bright[:, 0].argmax() - 150) <= 1 and abs(bright[:, 300].argmax() - 240) <= 1
    turned = np.array(_OPERATIONS["rotate"](line, 1, 1))
    assert tuple(turned[0, 0]) == GRAY and abs(turned[50, :, 0].argmax() - (150 - 100 * np.tan(np.pi / 6))) <= 1

    for name in ("brightness", "sharpness"):
        assert _OPERATIONS[name](image, 0.5, 1).tobytes() == image.tobytes()
        assert np.array(_OPERATIONS[name](image, 1, 1)).std() > pixels.std()
    bright = np.array(_OPERATIONS["brightness"](Image.new("RGB", (2, 2), (100, 10, 200)), 1, 1))
    assert tuple(bright[0, 0]) == (190, 19, 255)
    dull = Image.fromarray((pixels // 4 + 50).astype(np.uint8))
    for name in ("auto_contrast", "equalize"):
        stretched = np.array(_OPERATIONS[name](dull, 0, 1))
        assert stretched.min() == 0 and stretched.max() >= 254


# Words


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("left", "right"),
        ("right", "left"),
        ("Left of the cup", "Right of the cup"),
        ("IS IT LEFT OR RIGHT?", "IS IT RIGHT OR LEFT?"),
        ("the left-hand man, rightmost, leftmost", "the right-hand man, leftmost, rightmost"),
        ("turning leftwards, then rightward", "turning rightwards, then leftward"),
        ("a left-handed righthand lefty", "a right-handed lefthand righty"),
        ("topleft, BottomRight, upper-left, left_arrow", "topright, BottomLeft, upper-right, right_arrow"),
        ("(left)/right's", "(right)/left's"),
        ("left2right", None),
    ],
)
def test_words_for_one_side(text, swapped):
    assert says_left_or_right(text) == (swapped is not None)
    assert swap_left_and_right(text) == (swapped or text)


@pytest.mark.parametrize(
    "text",
    ["", "bright", "upright", "cleft", "leftover", "copyright", "human rights", "frightened", "rightly", "éleft"],
)
def test_other_words_are_left_alone(text):
    assert not says_left_or_right(text)
    assert swap_left_and_right(text) == text


WORDS = ["Left", "right", "LEFT", "rightmost", "bright", "Top-left", "a", "cup?", "leftover"]


@given(st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_swapping_twice_gives_the_text_back(text):
    assert swap_left_and_right(swap_left_and_right(text)) == text


@given(st.text() | st.text("lLefFtTrRiIıİgh -"))
@example("rıght")
@settings(max_examples=300)
def test_what_says_left_or_right_is_what_a_swap_changes(text):
    assert says_left_or_right(text) == (swap_left_and_right(text) != text)


# Both


def test_by_default_nothing_happens():
    image, draw = noise((9, 7)), random.Random(0)
    state = draw.getstate()
    assert Augmentation()(image, ["left"], draw) == (image, Frame(0, 0, 1, 1, False))
    assert draw.getstate() == state


@given(SIZES, SEEDS)
@settings(max_examples=100, deadline=None)
def test_the_same_draw_gives_the_same_image(size, seed):
    (first, frame), (second, again) = (
        Augmentation(**RECIPE)(noise(size), ["what"], random.Random(seed)) for _ in range(2)
    )
    assert first.mode == "RGB" and min(first.size) >= 1
    assert first.tobytes() == second.tobytes() and frame == again


@pytest.mark.parametrize(
    ("mode", "texts", "most"),
    [
        ("skip", ["what color", "bright"], 400),
        ("skip", [], 400),
        ("skip", ["what color", "the one on the left"], 0),
        ("swap", ["what color", "the one on the left"], 400),
        (None, ["what color"], 0),
    ],
)
def test_half_of_the_images_are_mirrored_where_they_may(mode, texts, most):
    image, count = noise((5, 4)), 0
    for seed in range(400):
        changed, frame = Augmentation(random_flip=mode)(image, texts, random.Random(seed))
        assert changed.tobytes() == (ImageOps.mirror(image) if frame.mirrored else image).tobytes()
        count += frame.mirrored
    assert abs(count - most / 2) < 45 * (most > 0) + 1


def test_texts_do_not_change_the_other_draws():
    augmentation, image = Augmentation(random_flip="skip", rand_augment=(2, 7)), noise((20, 20))
    for seed in range(30):
        (one, frame), (other, _) = (augmentation(image, [text], random.Random(seed)) for text in ("what color", "left"))
        if not frame.mirrored:
            assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("mode", [None, "skip", "swap"])
def test_images_can_be_mirrored_as_was_decided_for_several(mode):
    augmentation, image = Augmentation(random_crop=0.5, random_flip=mode, rand_augment=(2, 7)), noise((20, 10))
    for seed in range(20):
        decided = augmentation.mirrors(["the left one"], random.Random(seed))
        assert decided == (mode == "swap" and random.Random(seed).random() < 0.5)
        (plain, frame), (turned, other) = (
            augmentation(image, [], random.Random(seed), mirrored=mirrored) for mirrored in (False, True)
        )
        assert (frame.mirrored, other.mirrored) == (False, True) and frame[:4] == other[:4]
    only_flips = Augmentation(random_flip=mode)
    assert only_flips(image, ["left"], random.Random(0), mirrored=True)[0].tobytes() == ImageOps.mirror(image).tobytes()
    assert only_flips(image, ["what"], random.Random(1), mirrored=False)[0].tobytes() == image.tobytes()


# Boxes


@st.composite
def boxes_of(draw, size):
    """Some boxes of whole pixels."""
    boxes = []
    for _ in range(draw(st.integers(1, 3))):
        left, top = draw(st.integers(0, size[0] - 1)), draw(st.integers(0, size[1] - 1))
        right, bottom = draw(st.integers(left + 1, size[0])), draw(st.integers(top + 1, size[1]))
        boxes.append((left / size[0], top / size[1], right / size[0], bottom / size[1]))
    return boxes


@given(st.data(), SIZES, SEEDS, st.floats(0.001, 1))
@settings(max_examples=200, deadline=None)
def test_a_crop_keeps_the_centre_of_every_box(data, size, seed, min_scale):
    boxes = data.draw(boxes_of(size))
    part = random_resized_crop(size, random.Random(seed), min_scale, boxes)
    frame = Frame(part[0] / size[0], part[1] / size[1], part[2] / size[0], part[3] / size[1])
    for box in boxes:
        left, top, right, bottom = frame.place(box)
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        for low, high, whole, shown in (
            (left, right, box[2] - box[0], frame.right - frame.left),
            (top, bottom, box[3] - box[1], frame.bottom - frame.top),
        ):
            assert high - low == pytest.approx(1) or (high - low) * shown >= whole / 2 - 1e-9


def test_a_crop_lies_where_it_holds_the_boxes_and_is_left_out_where_none_does():
    corner = (0.9, 0.9, 1, 1)
    parts = [random_resized_crop((300, 240), random.Random(seed), 0.3, [corner]) for seed in range(200)]
    assert all(right > 285 and bottom > 228 for _, _, right, bottom in parts)
    assert len(set(parts)) > 190
    plain = [random_resized_crop((300, 240), random.Random(seed), 0.3) for seed in range(200)]
    sides = lambda places: [(right - left, bottom - top) for left, top, right, bottom in places]
    assert sides(parts) == sides(plain)
    assert sum(right > 285 and bottom > 228 for _, _, right, bottom in plain) < 100
    apart = [(0, 0, 0.01, 0.01), (0.99, 0.99, 1, 1)]
    both = [random_resized_crop((300, 240), random.Random(seed), 0.3, apart) for seed in range(50)]
    assert both.count((0, 0, 300, 240)) > 45
    assert random_resized_crop((10, 1000), random.Random(0), 1.0, [corner]) == (0, 0, 10, 1000)


@pytest.mark.parametrize(
    ("frame", "box", "placed"),
    [
        (Frame(), (0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
        (Frame(mirrored=True), (0.1, 0.2, 0.3, 0.4), (0.7, 0.2, 0.9, 0.4)),
        (Frame(0.2, 0, 0.7, 0.5), (0.3, 0.1, 0.6, 0.4), (0.2, 0.2, 0.8, 0.8)),
        (Frame(0.2, 0, 0.7, 0.5, True), (0.1, 0.1, 0.3, 0.9), (0.8, 0.2, 1, 1)),
    ],
)
def test_boxes_move_with_what_is_shown_worked_by_hand(frame, box, placed):
    assert frame.place(box) == pytest.approx(placed)


def test_where_there_are_boxes_rand_augment_moves_nothing():
    # The only bright pixel, in a place that every turn and shift would change.
    dot = Image.new("RGB", (20, 20), (90, 80, 70))
    dot.putpixel((3, 14), (200, 190, 210))
    augmentation, changed = Augmentation(rand_augment=(3, 10)), set()
    for boxes in ([(0.1, 0.6, 0.3, 0.9)], []):
        for seed in range(100):
            image, frame = augmentation(dot, [], random.Random(seed), boxes)
            brightest = np.array(image).astype(int).sum(-1)
            assert frame == Frame() and brightest.argmax() == 14 * 20 + 3
            changed.add(image.tobytes())
    assert len(changed) > 5
    moved = [augmentation(dot, [], random.Random(seed))[0] for seed in range(100)]
    assert sum(np.array(image).astype(int).sum(-1).argmax() != 14 * 20 + 3 for image in moved) > 30


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"random_crop": 0}, "random_crop: expected .* above 0 and at most 1, got 0"),
        ({"random_crop": 1.5}, "random_crop: expected .* got 1.5"),
        ({"random_crop": "0.5"}, "random_crop: expected .* got '0.5'"),
        ({"random_flip": True}, "random_flip: expected 'skip', 'swap' or None for no flip, got True"),
        ({"rand_augment": 2}, r"rand_augment: expected \(num_ops, magnitude\), .* such as \(2, 7\), got 2"),
        ({"rand_augment": (2, 7, 1)}, r"rand_augment: .* got \(2, 7, 1\)"),
        ({"rand_augment": (0, 7)}, r"rand_augment: .* at least 1 .* got \(0, 7\)"),
        ({"rand_augment": (2, 11)}, r"rand_augment: .* from 0 to 10, .* got \(2, 11\)"),
        ({"rand_augment": (2, 0.7)}, r"rand_augment: .* got \(2, 0.7\)"),
    ],
)
def test_errors_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**fields)
