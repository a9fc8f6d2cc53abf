"""A task from its flags to its report, by the methods that a new head writes."""

import inspect

from PIL import Image

from caption_miniatures import make_caption_miniature
from hivilt.tasks.retrieval import Retrieval
from hivilt.tasks.task import Task
from hivilt.training.main import main

STEPS = [name for name, method in vars(Task).items() if inspect.isfunction(method) and not name.startswith("_")]


def test_a_run_asks_a_task_in_the_order_in_which_its_methods_stand(tmp_path):
    asked = []

    def noted(name):
        def method(self, *args, **kwargs):
            asked.append(name)
            return getattr(super(Noted, self), name)(*args, **kwargs)

        return method

    Noted = type("Noted", (Retrieval,), {name: noted(name) for name in STEPS})
    make_caption_miniature("openmoji", tmp_path / "data")
    flags = ["--benchmark", "openmoji", "--data_dir", str(tmp_path / "data"), "--image_size", "32", "--use_cpu"]
    results = main(Noted, [*flags, "--max_steps", "1", "--output_dir", str(tmp_path / "out"), "--rerank_k", "2"])
    assert list(dict.fromkeys(asked)) == [name for name in STEPS if name != "hold_out_by"]
    assert {"validation", "test", "settings"} <= set(results)
    # What tests/conftest.py says of all runs, since drawing is half of what a tiny one does.
    assert {Image.open(tmp_path / f"out/{name}.png").size for name in ("training", "retrieval")} == {(1, 1)}
