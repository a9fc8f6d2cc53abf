from collections import Counter

import easy_vqa
import pytest

from hivilt.data.easy_vqa import COLORS, SHAPES, WORDINGS, facts, reword
from hivilt.data.vqa import VQAExample
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS


def ask(image: str, *pairs: tuple[str, str]) -> list[VQAExample]:
    return [VQAExample(f"{image}-{n}", image, f"{image}.png", text, (said,)) for n, (text, said) in enumerate(pairs)]


def test_color_and_shape_are_what_the_questions_tell_of_them():
    told = ask("a", ("what color is the circle?", "teal"))
    told += ask("b", ("is no rectangle present?", "no"), ("does the image contain a gray shape?", "yes"))
    told += ask("c", ("is there not a red shape?", "yes"), ("what shape is present?", "circle"))
    assert facts(told) == {"a": ("teal", "circle"), "b": ("gray", "rectangle")}


@pytest.mark.parametrize("held_out", [False, True])
def test_reworded_questions_have_the_answers_of_their_images(held_out):
    examples = VQA_BENCHMARKS["easy-vqa"].read_package("test")
    known = facts(examples)
    assert len(known) > 800
    found = reword(examples, 0.5, seed=1, held_out=held_out)
    assert found == reword(examples, 0.5, seed=1, held_out=held_out) != reword(examples, 0.5, 2, held_out)
    changed = [(one, was) for one, was in zip(found, examples, strict=True) if one != was]
    assert 0.4 < len(changed) / len(examples) < 0.5
    for one, was in changed:
        assert (one.question_id, one.image_id, one.image) == (was.question_id, was.image_id, was.image)
        color, shape = known[one.image_id]
        named = {word for word in (*COLORS, *SHAPES) if word in one.question.rstrip("?").split()}
        if one.answers[0] in ("yes", "no"):
            assert (one.answers[0] == "yes") == (named <= {color, shape}) and named
        else:
            assert one.answers[0] in (color, shape) and one.answers[0] not in named
    said = Counter(one.answers[0] for one, _ in changed)
    assert abs(said["yes"] - said["no"]) < 0.1 * said["yes"]


def test_wordings_that_are_tested_are_not_trained_on_nor_in_the_data_set():
    asked = set(easy_vqa.get_train_questions()[0])
    for trained, tested in WORDINGS.values():
        assert len(set(trained)) == len(trained) >= 6 and len(set(tested)) == len(tested) >= 3
        assert not set(trained) & set(tested)
        told = {text.format(color=color, shape=shape) for text in tested for color in COLORS for shape in SHAPES}
        assert not told & asked
