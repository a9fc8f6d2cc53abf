"""What it costs to ask a collection of images a question from the states that an index keeps, beside encoding them.

    python benchmarks/ask_collection.py                            a few minutes
    python benchmarks/ask_collection.py --images 40 --encoded 8 --rounds 1 --output_dir /tmp/quick

Two models answer: that of `vqa/` about drawings at 64 pixels, and one of the size of a model of photographs, which has the encoders
and the fusion of the root under an answer head that nothing has trained; speed does not depend on weights. `--encoded` images are
indexed, by one process and by two, each with one thread. Their rows are then repeated to `--images`, so that states are read from a
file of that size, which the system has in memory since it was written just now. A question about all of them is asked with one
thread and with two, in turns; figures are medians. Runs of the vision encoder are counted meanwhile.

It prints the table and the goals, and leaves a JSON file with the processor in its name in benchmarks/results.
"""

import multiprocessing
import os
import socket
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.utils import logging

import hivilt
from common import alternate, goals_table, judge_goal, make_parser, markdown, seconds
from hivilt import HiViLTForQuestionAnswering, HiViLTProcessor
from hivilt.data.scenes import scenes
from hivilt.data.tables import open_image
from hivilt.search import ImageIndex
from hivilt.training.results import environment, write_result_file

ROOT = Path(hivilt.__file__).resolve().parent
# By name the folder of the checkpoint and the side of its images in pixels.
MODELS = {"drawings, 64 pixels": (ROOT / "vqa", 64), "photographs, 224 pixels": (ROOT, 224)}
QUESTION = "is there a dog in the image?"
THREADS, PROCESSES = (1, 2), (1, 2)
GOAL_SPEED, GOAL_SECONDS, GOAL_IMAGES = 1000, 15, 10_000


def load(folder: Path) -> tuple[HiViLTForQuestionAnswering, HiViLTProcessor]:
    """A checkpoint of any head as one that answers, in evaluation mode."""
    torch.manual_seed(0)
    model = HiViLTForQuestionAnswering.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), HiViLTProcessor.from_pretrained(folder)


def draw(folder: Path, side: int, count: int) -> None:
    """So many drawn scenes as JPEG files with this side."""
    folder.mkdir()
    for number, scene in enumerate(scenes("test", count, image_size=side)):
        open_image(scene.image).save(folder / f"{number}.jpg")


def index_share(rank: int, processes: int, port: int, name: str, place: Path, answer: Any) -> None:
    """One of several processes that index the images in `place` together; the first puts the seconds that it took into `answer`."""
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    state = PartialState(cpu=True)
    torch.set_num_threads(1)  # the state has set another number
    build = partial(ImageIndex.build, place / "images", *load(MODELS[name][0]), place / f"index-{processes}")
    gather_object([rank])  # all begin together
    took = seconds(build)
    if rank == 0:
        answer.put(took)
    state.destroy_process_group()


def index(name: str, place: Path, processes: int) -> float:
    """Seconds of indexing the images in `place` by so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    started = [
        context.Process(target=index_share, args=(rank, processes, port, name, place, answer))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"A process that indexed {place} ended with status {process.exitcode}.")
    return answer.get()


def repeated(index: ImageIndex, count: int, place: Path) -> ImageIndex:
    """An index of so many images, whose rows are those of another over and over."""
    rows = index.dataset.select([row % len(index) for row in range(count)])
    rows.save_to_disk(str(place))
    return ImageIndex(
        datasets.load_from_disk(str(place)), index.folder, index.model, index.processor, index.level_shapes
    )


def measure(name: str, num_images: int, num_encoded: int, rounds: int) -> dict[str, Any]:
    """Images a second of indexing and of asking, and what states take."""
    folder, side = MODELS[name]
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        draw(place / "images", side, num_encoded)
        indexed = {str(processes): num_encoded / index(name, place, processes) for processes in PROCESSES}
        small = ImageIndex.load(place / "index-2", *load(folder))
        collection = repeated(small, num_images, place / "repeated")
        passes = []
        small.model.base_model.vision_model.register_forward_hook(lambda *given: passes.append(1))

        def ask(threads: int) -> None:
            torch.set_num_threads(threads)
            assert len(collection.ask(QUESTION)) == num_images

        ask(1)
        found = alternate({str(threads): partial(ask, threads) for threads in THREADS}, rounds)
        size = sum(path.stat().st_size for path in (place / "repeated").glob("*.arrow"))
    return {
        "parameters": small.model.num_parameters(),
        "num_images": num_images,
        "bytes_per_image": size / num_images,
        "images_indexed_per_second": indexed,
        "ask_seconds": found,
        "images_asked_per_second": {threads: num_images / took for threads, took in found.items()},
        "encoder_passes": len(passes),
    }


def table(results: dict) -> str:
    """Markdown: a model a row."""
    rows = []
    for name, found in results["models"].items():
        cells = [name, f"{found['parameters'] / 1e6:.1f} M", f"{found['bytes_per_image'] / 1e3:.1f}"]
        cells += [f"{speed:,.0f}" for speed in found["images_indexed_per_second"].values()]
        cells += [f"{speed:,.0f}" for speed in found["images_asked_per_second"].values()]
        rows.append([*cells, f"{found['ask_seconds']['2']:.1f}", str(found["encoder_passes"])])
    heads = ["", "parameters", "KB of states an image", "images/s indexed, 1 process", "2 processes"]
    heads += ["images/s asked, 1 thread", "2 threads", "seconds for all, 2 threads", "encoder passes"]
    return markdown(f"| {' | '.join(heads)} |", rows)


def main(argv: list[str] | None = None) -> dict:
    """Measures and writes; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=GOAL_IMAGES, help="images that are asked")
    parser.add_argument("--encoded", type=int, default=512, help="images that are indexed")
    parser.add_argument("--rounds", type=int, default=3, help="questions that are timed")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()

    models = {name: measure(name, args.images, args.encoded, args.rounds) for name in MODELS}
    torch.set_num_threads(1)
    drawings, photographs = models.values()
    speed, passes = drawings["images_asked_per_second"]["1"], sum(found["encoder_passes"] for found in models.values())
    took = photographs["ask_seconds"]["2"] * GOAL_IMAGES / args.images
    why = "see docs/search.md"
    goals = [
        judge_goal("drawings: images/s, one thread", speed, GOAL_SPEED, "", ",.0f", False, why),
        judge_goal(f"photographs: {GOAL_IMAGES:,} images, two threads", took, GOAL_SECONDS, " s", ".1f", True, why),
        judge_goal("encoder passes", passes, 0, "", ".0f", True, why),
    ]
    results = {"models": models, "goals": goals, "environment": environment()}
    print(table(results), goals_table(results), sep="\n\n")
    write_result_file(args.output_dir, "ask_collection", results)
    return results


if __name__ == "__main__":
    main()
