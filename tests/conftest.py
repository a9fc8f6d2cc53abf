"""What every test runs under: an empty home folder, no network, one thread; and the fixtures that most tests share."""

import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

# All that follows comes before the imports that read it; processes that tests start inherit it.

# What lies in a person's home folder, or is set in their shell, must not decide whether a test passes.
FOREIGN = ("ACCELERATE_", "DATASETS_", "GRADIO_", "HF_", "HIVILT_", "HUGGINGFACE_", "HYPOTHESIS_", "MPL", "TORCH")
FOREIGN += ("TRANSFORMERS_", "XDG_")
for _name in [name for name in os.environ if name.startswith(FOREIGN)]:
    del os.environ[_name]
HOME = Path(tempfile.mkdtemp(prefix="hivilt-home-")).resolve()
os.environ["HOME"] = str(HOME)
# Else each process that draws would look through all fonts again.
os.environ["MPLCONFIGDIR"] = str(HOME / "matplotlib")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(HOME / "inductor")

os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"), "1")
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
# Small tensors on few cores run an order of magnitude slower with several threads.
os.environ["OMP_NUM_THREADS"] = "1"

# As it is now: later transformers and evaluate append their caches of modules to `sys.path`, and modules of the same name
# in the cache of another process would hide its own.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))

# What a script starts in the background is told to ignore Ctrl-C, and so are all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import settings

# `make browser`, which wants Chromium, and `make stress`, which takes long, name these folders.
collect_ignore = ["browser", "stress"]

# The same examples in every run, and fewer; `make test-all` draws others each time.
settings.register_profile("same", derandomize=True, deadline=None, database=None, max_examples=40)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("same")


# Those that take longest, begun first: else one of two processes would be left alone with one of them in the end.
LONGEST = ["test_hub.py", "test_remote_code.py", "test_conformance.py", "test_run_vqa.py", "test_checkpoint_life.py"]
LONGEST += ["test_run_retrieval.py", "test_readme.py", "test_encoder_cache.py", "test_check_arguments.py"]
LONGEST += ["test_generation_hivilt.py", "test_encoders_hivilt.py", "test_app.py", "test_interruption.py"]
LONGEST += ["test_image_index.py", "test_run_captioning.py", "test_run_grounding.py", "test_export.py"]
LONGEST += ["test_losses_hivilt.py", "test_trainer.py", "test_init.py", "test_models.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish():
    # What is imported by now stays. Trainer collects garbage after every run, and need not look through it all again.
    gc.freeze()


def pytest_unconfigure():
    shutil.rmtree(HOME, ignore_errors=True)


# These import what they need: the process that hands tests to workers runs this file, too.


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """Runs leave blank images, for drawing is most of what a tiny run does; `drawn` is for tests of what they draw."""
    if "hivilt.training.command" not in sys.modules:  # no script is run in this process
        yield
        return
    from tiny import draw_blank, draw_with

    with pytest.MonkeyPatch.context() as patch:
        draw_with(patch, lambda name: draw_blank)
        yield


@pytest.fixture
def drawn(monkeypatch):
    """Runs draw, as they do for users."""
    from hivilt.evaluation import plots
    from tiny import draw_with

    draw_with(monkeypatch, lambda name: getattr(plots, name))


@pytest.fixture
def batch() -> dict:
    """Three images and five texts, as `tiny.make_batch` says."""
    from tiny import make_batch

    return make_batch()


@pytest.fixture
def processor():
    """A tiny [`HiViLTProcessor`]."""
    from tiny import make_processor

    return make_processor()
