"""No test depends on what lies in a person's home folder, and none leaves anything there."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import evaluate
import huggingface_hub.constants
import matplotlib
import pytest
import torch
import transformers.utils.hub
from transformers.dynamic_module_utils import init_hf_modules

HOME = Path(os.environ["HOME"])


def test_libraries_keep_what_they_keep_in_a_home_that_was_empty():
    places = [
        Path.home(),
        huggingface_hub.constants.HF_HOME,
        huggingface_hub.constants.HF_HUB_CACHE,
        huggingface_hub.constants.HF_TOKEN_PATH,
        transformers.utils.hub.HF_MODULES_CACHE,
        datasets.config.HF_CACHE_HOME,
        datasets.config.HF_DATASETS_CACHE,
        evaluate.config.HF_EVALUATE_CACHE,
        evaluate.config.HF_METRICS_CACHE,
        evaluate.config.HF_MODULES_CACHE,
        torch.hub.get_dir(),
        matplotlib.get_cachedir(),
        matplotlib.get_configdir(),
    ]
    assert HOME.parent == Path(tempfile.gettempdir()).resolve()
    assert [place for place in places if not Path(place).resolve().is_relative_to(HOME)] == []


def test_a_process_that_a_test_starts_finds_no_module_that_this_one_has_in_its_cache():
    init_hf_modules()  # as after any remote code
    module = Path(transformers.utils.hub.HF_MODULES_CACHE, "hivilt_of_the_cache.py")
    module.touch()
    try:
        program = "import importlib.util; print(importlib.util.find_spec('hivilt_of_the_cache'))"
        assert str(module.parent) in sys.path
        started = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert started.stdout == "None\n"
    finally:
        module.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_whatever_home_and_shell_say_a_run_of_tests_begins_the_same(tmp_path, workers):
    """With a home folder that cannot be made, a token and caches, and begun in the background, where Ctrl-C is ignored; in
    the process that runs tests and in a worker."""
    shutil.copyfile(Path(__file__).with_name("conftest.py"), tmp_path / "conftest.py")
    report = tmp_path / "report.json"
    test = "import json, os, signal, sys\ndef test_it(tmp_path):\n"
    test += "    interrupted = signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    test += "    said = [dict(os.environ), list(sys.modules), interrupted]\n"
    test += f"    with open({str(report)!r}, 'w') as file: json.dump(said, file)\n"
    (tmp_path / "test_it.py").write_text(test)
    file = tmp_path / "file"
    file.touch()
    theirs = dict.fromkeys(("HF_HOME", "HF_MODULES_CACHE", "XDG_CACHE_HOME", "TORCH_HOME", "HOME"), str(file / "home"))
    theirs |= {"HF_TOKEN": "hf_theirs", "HIVILT_DEBUG": "1", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "7"}
    theirs["PYTEST_ADDOPTS"] = ""
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-m", "pytest", "-q", "-n", workers]
    command += ["--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | theirs, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    environment, modules, interrupted = json.loads(report.read_text())
    assert interrupted
    assert not {"HF_TOKEN", "HIVILT_DEBUG", "HF_HOME", "HF_MODULES_CACHE"} & set(environment)
    assert environment["HF_HUB_OFFLINE"] == environment["OMP_NUM_THREADS"] == "1"
    assert not [name for name, value in environment.items() if str(file) in value]
    # It is gone when the run is over; and the process that hands out tests has not loaded torch first.
    assert not Path(environment["HOME"]).exists()
    assert not {"torch", "transformers", "huggingface_hub"} & set(modules)
