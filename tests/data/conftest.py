"""What tests of benchmarks share."""

from pathlib import Path

import datasets
import pytest


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder laid out as a dataset on the Hub; `write(split, rows)` adds a split, `image` of a row is a path."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hub"

    def write(split, rows):
        rows = [{**row, "image": {"bytes": Path(row["image"]).read_bytes(), "path": None}} for row in rows]
        (folder / "data").mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        table.to_parquet(str(folder / f"data/{split}-00000-of-00001.parquet"))
        return str(folder)

    return write
