"""How the tasks over captioned images read them, retrieval and captioning."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

from hivilt.data.caption_benchmarks import CaptionBenchmark
from hivilt.data.captions import (
    CaptionColumns,
    CaptionedImage,
    read_caption_table,
    read_karpathy,
    read_openmoji,
)
from hivilt.tasks.arguments import CaptionArguments
from hivilt.training.splits import read_splits


def read_captioned(
    args: CaptionArguments, splits: Collection[str], benchmark: CaptionBenchmark | None, captions_needed: bool = True
) -> tuple[str, dict[str, list[CaptionedImage]]]:
    """The name of the data that the arguments name, and those of these splits that there are. Without `captions_needed` images
    of the test split may have none."""
    if args.karpathy_file:
        path = Path(args.karpathy_file)
        return path.stem, {split: read_karpathy(path, split, args.image_dir) for split in splits}
    if args.benchmark == "openmoji":
        # Drawn at the size that the model sees.
        benchmark = replace(benchmark, read_package=partial(read_openmoji, size=args.image_size))
    columns = CaptionColumns(args.image_column, args.caption_column, args.image_id_column)
    needed = lambda split: captions_needed or split != "test"
    of_table = lambda table, source, split, folder: read_caption_table(table, columns, source, folder, needed(split))
    return read_splits(args, splits, of_table, benchmark)
