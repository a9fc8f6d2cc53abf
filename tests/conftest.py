"""What every test runs under: no network, one thread, quiet; and the two fixtures that most of them share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from hivilt import HiViLTProcessor
from tiny import make_batch, make_processor

# `make browser`, which wants Chromium, and `make stress`, which takes long, name these folders.
collect_ignore = ["browser", "stress"]

# Small tensors on few cores run an order of magnitude slower with several threads.
torch.set_num_threads(1)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return make_batch()


@pytest.fixture
def processor() -> HiViLTProcessor:
    return make_processor()
