"""Stores a checkpoint in half the bytes: float16 on disk, float32 again when it is loaded.

    python runs/halve.py outputs/mine

Each number keeps 11 bits of its 24; measure afterwards what that costs, as with any checkpoint. A number that float16
cannot hold, above 65,504, stops it, and nothing is written.
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from hivilt.training.command import run_command


def main(argv: list[str] | None = None) -> None:
    """Rewrites `model.safetensors` and the `dtype` of `config.json`.

    Raises:
        FileNotFoundError: the folder is no checkpoint in one file.
        ValueError: a number is too large for float16.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a checkpoint in one file, model.safetensors")
    folder = parser.parse_args(argv).folder
    weights, config = folder / "model.safetensors", folder / "config.json"
    before = weights.stat().st_size
    halved = {}
    for name, value in load_file(weights).items():
        halved[name] = value.half() if value.is_floating_point() else value
        if not halved[name].isfinite().all():
            raise ValueError(f"folder: {name} has numbers up to {value.abs().max():g}, and float16 ends at 65,504.")
    settings = json.loads(config.read_text(encoding="utf-8"))
    new = weights.with_suffix(".new")
    save_file(halved, new, metadata={"format": "pt"})
    new.replace(weights)
    # What transformers loads it as, unless told otherwise.
    config.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{weights}: {before / 1e6:.1f} MB before, {weights.stat().st_size / 1e6:.1f} MB now")


if __name__ == "__main__":
    run_command(main)
