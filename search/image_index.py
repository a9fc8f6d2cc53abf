"""A folder of images to search: embedded once, kept in a FAISS index, re-ranked by fusion."""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import faiss
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from datasets.utils import tqdm
from PIL import Image

from hivilt import HiViLTForRetrieval, HiViLTProcessor, __version__
from hivilt.data.tables import file_stamp, heif_hint, image_endings
from hivilt.fusion_hivilt import HiViLTImageStates, HiViLTTextStates, cat_states, map_states, select, tensors_of
from hivilt.search.scoring import check_at_least, check_evaluates, score_pairs

logger = logging.getLogger(__name__)

_INFO, _SHARDS, _STAMP = "index.json", "shards", ("image", "size", "mtime_ns")
# Folders of embeddings: a new one is written beside the one that serves, and takes its place once `index.json` names it.
_TURNS = ("embeddings", "embeddings-2")

_RERANK_BATCH = 32  # images that are encoded at a time for re-ranking
STATES_BYTES = 2**29  # kept of the states of images that were re-ranked, so that a page left running does not grow

# Of an image processor: which class read it, where from and where it runs, as opposed to what it does to an image.
_NOT_ABOUT_IMAGES = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "_name_or_path"),
    *("device", "return_tensors", "disable_grouping"),
}


class Hit(NamedTuple):
    """An image that was found.

    Args:
        path: its file.
        score: what it was ranked by, in [-1, 1]: `HiViLTForRetrieval.ranking_score` if re-ranked, else `embedding_score`.
        embedding_score: cosine of its embedding and the query's.
    """

    path: Path
    score: float
    embedding_score: float


def fingerprint(model: HiViLTForRetrieval, processor: HiViLTProcessor) -> str:
    """What tells one checkpoint from another: 32 hexadecimal digits (BLAKE2b) of all that makes its embeddings.

    Read are the names, shapes and float32 values of the weights, the vision levels, and what the image processor does
    to images; not the device, nor how and where from the checkpoint was loaded. A checkpoint loaded in half precision
    has another fingerprint, as it has other weights.
    """
    settings = processor.image_processor.to_dict().items()
    made_by = {
        "image_processor": {name: value for name, value in settings if name not in _NOT_ABOUT_IMAGES},
        "vision_levels": model.config.vision_level_layout,
    }
    digest = hashlib.blake2b(json.dumps(made_by, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.to("cpu", torch.float32).flatten().numpy())
    return digest.hexdigest()


class ImageIndex:
    """The images of a folder with their embeddings; [`ImageIndex.build`] or [`ImageIndex.load`] makes one.

    Args:
        dataset: columns `image` (path below `folder`) and `embedding`, with the FAISS index of the latter.
        folder: where the images are.
        model, processor: the checkpoint that made the embeddings, `model` in evaluation mode.
    """

    def __init__(self, dataset: datasets.Dataset, folder: Path, model: HiViLTForRetrieval, processor: HiViLTProcessor):
        check_evaluates(model)
        self.dataset, self.folder = dataset, folder
        self.model, self.processor = model, processor
        # States of images met in re-ranking, on the CPU, least recently used first.
        self._image_states: OrderedDict[str, HiViLTImageStates] = OrderedDict()

    def __len__(self) -> int:
        return len(self.dataset)

    @classmethod
    @torch.inference_mode()
    def build(
        cls,
        images: str | os.PathLike,
        model: HiViLTForRetrieval,
        processor: HiViLTProcessor,
        output_dir: str | os.PathLike,
        batch_size: int = 32,
        on_bad_image: Literal["error", "skip"] = "error",
        index_factory: str = "Flat",
        shard_size: int = 1024,
    ) -> "ImageIndex":
        """Embeds the images below a folder, or only those that are new or have changed since an earlier build.

        A build that was cut off goes on where it stopped, and an index that is already there serves until the new one is
        complete. `output_dir` then has

        - `embeddings/`, after a rebuild `embeddings-2/` by turns: a `datasets` folder with columns `image` (path below
          `images`), `size` (bytes), `mtime_ns` and `embedding` (`projection_dim` float32 numbers), sorted by path;
        - `embeddings.faiss`, likewise: their FAISS index, by inner product;
        - `index.json`: the checkpoint's fingerprint, the folder as seen from `output_dir`, which files were skipped and why.

        Args:
            images: the folder. Files below it are images if Pillow reads their ending (HEIC with the extra `heif`); hidden
                files and links to folders are left out.
            batch_size: images that are encoded at a time.
            on_bad_image: what to do about a file that has the ending of an image and cannot be read: stop, or skip it.
            index_factory: FAISS factory string (https://github.com/facebookresearch/faiss/wiki/The-index-factory).
                "Flat" is exact; "IVF256,Flat" and the like are trained here, and trade recall for speed. How hard they
                search is set on `index.dataset.get_index("embedding").faiss_index`, e.g. its `nprobe`.
            shard_size: images between two saves.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: no image is readable, one is not and `on_bad_image` is "error", or an argument is out of range.
        """
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image: got {on_bad_image!r}, expected 'error' or 'skip'.")
        check_at_least("batch_size", batch_size, 1)
        check_at_least("shard_size", shard_size, 1)
        check_evaluates(model)
        width = model.config.projection_dim
        try:
            faiss_index = faiss.index_factory(width, index_factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(
                f'index_factory: FAISS cannot make {index_factory!r} of {width} dimensions; "Flat" always works. ({error})'
            ) from error
        if not Path(images).is_dir():
            raise FileNotFoundError(f"images: there is no folder {os.fspath(images)!r}; check the path.")
        folder, output_dir = Path(os.path.realpath(images)), Path(os.path.realpath(output_dir))
        if output_dir == folder:
            raise ValueError(f"output_dir: {folder} is the folder of the images itself; name {folder}/index, say.")
        found, skipped = _find_images(folder, output_dir)
        if not found:
            counted = f"{_count_endings(skipped)}.{heif_hint(skipped)}"
            raise ValueError(f"images: there is no image file below {folder}{counted}")

        checkpoint = model.name_or_path
        # As seen from `output_dir`, unless it is on another drive.
        place = os.path.relpath(folder, output_dir) if folder.anchor == output_dir.anchor else folder
        info = {
            "hivilt_version": __version__,
            "fingerprint": fingerprint(model, processor),
            "checkpoint": os.path.abspath(checkpoint) if os.path.isdir(checkpoint) else checkpoint,
            "images": Path(place).as_posix(),
            "index_factory": index_factory,
        }
        old = _read_info(output_dir)
        columns = dict.fromkeys(_STAMP, "int64") | {"image": "string"}
        features = datasets.Features({name: datasets.Value(kind) for name, kind in columns.items()})
        features["embedding"] = datasets.List(datasets.Value("float32"), length=width)
        if old is not None and all(old[name] == info[name] for name in ("fingerprint", "images")):
            complete = datasets.load_from_disk(str(output_dir / old["embeddings"]))
        else:
            complete = datasets.Dataset.from_dict({name: [] for name in features}, features)
        # Named after what they belong to: shards of another checkpoint or folder are never mixed in.
        key = hashlib.blake2b(f"{info['fingerprint']} {info['images']}".encode(), digest_size=8).hexdigest()

        def embedded() -> tuple[datasets.Dataset, dict[tuple[str, int, int], int]]:
            """What there is by now, and the row of each image, as it was when it was embedded."""
            paths = map(str, sorted((output_dir / _SHARDS).glob(f"{key}-*.arrow")))
            table = datasets.concatenate_datasets([complete, *map(datasets.Dataset.from_file, paths)])
            images = zip(*(table[name][:] for name in _STAMP), strict=True)
            return table, {image: row for row, image in enumerate(images)}

        table, known = embedded()
        todo = {image: stamp for image, stamp in found.items() if (image, *stamp) not in known}
        if todo:
            pending, save = [], partial(_write_shard, output_dir / _SHARDS, key, features)
            bar = tqdm(total=len(found), initial=len(found) - len(todo), unit="image", desc="Embedding")
            try:
                for rows, reasons in _embed_images(folder, todo, model, processor, batch_size, on_bad_image):
                    pending, skipped = pending + rows, skipped | reasons
                    bar.update(len(rows) + len(reasons))
                    if len(pending) >= shard_size:
                        save(pending)
                        pending = []
            finally:
                bar.close()
                if pending:
                    save(pending)
            table, known = embedded()
        if skipped:
            logger.warning(
                f"{len(skipped)} of {len(found | skipped)} files are no readable images{_count_endings(skipped)}; "
                f"{output_dir / _INFO} lists them.{heif_hint(skipped)}"
            )

        rows = [known[image, *stamp] for image, stamp in found.items() if image not in skipped]
        if not rows:
            image = next(iter(found))
            raise ValueError(f"images: none of the {len(found)} files could be read; {image}: {skipped[image]}")
        reasons = [{"image": image, "reason": reason} for image, reason in sorted(skipped.items())]
        serving = _TURNS[1] if old is None else old["embeddings"]
        info |= {"num_images": len(rows), "skipped": reasons, "embeddings": serving}
        if info != old or rows != list(range(len(complete))):
            info["embeddings"] = _TURNS[serving == _TURNS[0]]
            _publish(output_dir, table.select(rows), faiss_index, info)
        shutil.rmtree(output_dir / _SHARDS, ignore_errors=True)
        return cls._open(output_dir, info, model, processor)

    @classmethod
    def load(cls, output_dir: str | os.PathLike, model: HiViLTForRetrieval, processor: HiViLTProcessor) -> "ImageIndex":
        """Opens what [`ImageIndex.build`] has made with the same checkpoint, `model` in evaluation mode. Tells in a warning how
        many images of the folder were added or deleted since.

        Raises:
            FileNotFoundError: there is no complete index.
            ValueError: another checkpoint made the index.
        """
        output_dir = Path(os.path.realpath(output_dir))
        info = _complete_info(output_dir)
        own = fingerprint(model, processor)
        if info["fingerprint"] != own:
            raise ValueError(
                f"The index in {output_dir} was made by another checkpoint (fingerprint {info['fingerprint']}) than the "
                f"one loaded ({own}), so their embeddings cannot be compared: load the checkpoint that made it, in the "
                "same precision, or build the index again."
            )
        index = cls._open(output_dir, info, model, processor)
        embedded, found = set(index.dataset["image"]), _find_images(index.folder, output_dir)[0].keys()
        added, deleted = found - embedded - {one["image"] for one in info["skipped"]}, embedded - found
        if added or deleted:
            logger.warning(
                f"{len(added)} images were added to {index.folder} and {len(deleted)} deleted since the index in {output_dir} "
                "was built; build it again (run_retrieval.py --index) to search what is there now."
            )
        return index

    @staticmethod
    def made_by(output_dir: str | os.PathLike) -> str:
        """Name or folder of the checkpoint that an index was built with.

        Raises:
            FileNotFoundError: there is no complete index.
            ValueError: it was built with a model that had not been saved.
        """
        checkpoint = _complete_info(Path(os.path.realpath(output_dir)))["checkpoint"]
        if not checkpoint:
            raise ValueError(f"The index in {output_dir} is of a model that had not been saved; name its checkpoint.")
        return checkpoint

    @classmethod
    def _open(cls, output_dir: Path, info: dict, model, processor) -> "ImageIndex":
        folder = Path(os.path.realpath(output_dir / info["images"]))
        dataset = datasets.load_from_disk(str(output_dir / info["embeddings"]))
        dataset.load_faiss_index("embedding", str(output_dir / f"{info['embeddings']}.faiss"))
        return cls(dataset, folder, model, processor)

    @torch.inference_mode()
    def search(self, query: str | os.PathLike | Image.Image, top_k: int = 10, rerank_k: int = 0) -> list[Hit]:
        """The images nearest to a text or to an image, best first; equal scores by path.

        Args:
            query: a `str` is always a text, a `Path` or a PIL image always an image.
            top_k: how many images to give; fewer only if the index has, or finds, no more.
            rerank_k: order this many of the nearest anew, by fusion with the query, which is a text then; the others follow
                by embedding. An image is encoded when it is met; the states of the most recently used ones stay in memory,
                up to 512 MiB (2.6 MB an image with the base model).

        Raises:
            ValueError: the text is empty, an image cannot be read, `rerank_k` is given for an image, or a number is out of
                range.
            FileNotFoundError, TypeError: the query is an image that is not there, or something else.
        """
        check_at_least("top_k", top_k, 1)
        check_at_least("rerank_k", rerank_k, 0)
        if isinstance(query, str):
            if not query.strip():
                raise ValueError("query: the text is empty; say what to look for.")
            inputs = self.processor(text=[query], return_tensors="pt").to(self.model.device)
            tokenizer = self.processor.tokenizer
            unknown = {tokenizer.unk_token_id}
            if {*inputs["input_ids"][0].tolist()} - ({*tokenizer.all_special_ids} - unknown) == unknown:
                logger.warning(f"query: {query!r} has no word that the model knows; any order is as good as another.")
            text_states = self.model.encode_texts(**inputs)
            embeds = self.model.embed_texts(text_states)
        elif isinstance(query, (os.PathLike, Image.Image)):
            if rerank_k:
                raise ValueError("rerank_k: an image cannot be fused with images; search for a text, or leave it 0.")
            pixel_values = self.processor(images=query, return_tensors="pt")["pixel_values"]
            embeds = self.model.get_image_features(pixel_values.to(self.model.device)).pooler_output
        else:
            raise TypeError(f"query: got {type(query).__name__}, expected a text, a path or a PIL image.")

        embedding = embeds[0].cpu().numpy()
        _, rows = self.dataset.search("embedding", embedding, min(max(top_k, rerank_k), len(self)))
        rows = np.sort(rows[rows >= 0])  # -1: an approximate index found no more
        if not len(rows):
            return []
        found = self.dataset[rows.tolist()]
        # Computed here, since a compressed index only knows them approximately.
        cosines = np.asarray(found["embedding"], dtype=np.float32).reshape(len(rows), len(embedding)) @ embedding
        order = np.argsort(-cosines, kind="stable")
        scores = cosines.copy()
        if head := [place for place in order[:rerank_k] if (self.folder / found["image"][place]).exists()]:
            fused = self._fuse(text_states, [found["image"][place] for place in head])
            scores[head] = self.model.ranking_score(torch.from_numpy(cosines[head]), fused).numpy()
            order = [*sorted(head, key=lambda place: -scores[place]), *order[~np.isin(order, head)]]
        hits = [
            Hit(self.folder / found["image"][place], float(scores[place]), float(cosines[place])) for place in order
        ]
        # A table of one's own need not say which files its embeddings are of.
        stamps = [(found["size"][place], found["mtime_ns"][place]) for place in order] if "size" in found else []
        if stale := [hit.path.name for hit, stamp in zip(hits, stamps, strict=False) if file_stamp(hit.path) != stamp]:
            logger.warning(
                f"{len(stale)} of the {len(hits)} images found, {stale[0]} first, are gone or have changed since they were "
                "embedded: scores are of what they were, and what is gone is not re-ranked. Build the index again."
            )
        return hits[:top_k]

    def _fuse(self, text_states: HiViLTTextStates, images: list[str]) -> torch.FloatTensor:
        """Fused similarity of one text and some images."""
        new = [image for image in images if image not in self._image_states]
        for start in range(0, len(new), _RERANK_BATCH):
            pixel_values, errors = _read_images(self.folder, self.processor, new[start : start + _RERANK_BATCH])
            for image, error in errors.items():
                raise ValueError(f"{image}: {error} Or build the index again without it.") from error
            states = self.model.encode_images(torch.cat([*pixel_values.values()]).to(self.model.device))
            states = map_states(torch.Tensor.cpu, states)
            for place, image in enumerate(pixel_values):
                self._image_states[image] = map_states(partial(select, index=torch.tensor([place])), states)
        for image in images:
            self._image_states.move_to_end(image)
        image_states = cat_states([self._image_states[image] for image in images])
        size = sum(tensor.nbytes for tensor in tensors_of(image_states)) / len(images)
        while len(self._image_states) * size > STATES_BYTES:
            self._image_states.popitem(last=False)
        pairs = torch.arange(len(images))
        return score_pairs(self.model, [image_states], [text_states], pairs, torch.zeros_like(pairs))


def _find_images(folder: Path, without: Path) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The stamps of the image files below a folder, but for `without`, and why the other files are none; both sorted."""
    endings = image_endings()
    found, others = {}, {}
    for parent, folders, names in os.walk(folder, onerror=lambda error: logger.warning("Left out: %s", error)):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(parent, name) != without]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            image, ending = path.relative_to(folder).as_posix(), path.suffix.lower()
            if ending in endings:
                found[image] = file_stamp(path)
            else:
                what = f"files of the ending {ending}" if ending else "files without an ending"
                others[image] = f"{what} are not read as images.{heif_hint([image])}"
    return dict(sorted(found.items())), others


def _count_endings(images: Iterable[str]) -> str:
    """How many files there are of which ending, in brackets; nothing of none."""
    counts = Counter(Path(image).suffix.lower() for image in images)
    listed = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in sorted(counts.items()))
    return f" ({listed})" if listed else ""


def _read_images(folder: Path, processor: HiViLTProcessor, images: list[str]) -> tuple[dict, dict]:
    """`pixel_values` (1, channels, height, width) by image; by image that cannot be read the exception that says why."""

    def read(image: str) -> torch.Tensor | Exception:
        try:
            image.encode()  # a name that is no text could not be stored
            return processor(images=folder / image, return_tensors="pt")["pixel_values"]
        except Exception as error:  # a broken file raises whatever the reader of its format stumbles on
            return error

    with ThreadPoolExecutor() as pool:
        given = dict(zip(images, pool.map(read, images), strict=True))
    errors = {image: value for image, value in given.items() if isinstance(value, Exception)}
    return {image: value for image, value in given.items() if image not in errors}, errors


def _embed_images(
    folder: Path, todo: dict[str, tuple[int, int]], model, processor, batch_size: int, on_bad_image: str
) -> Iterator[tuple[list[tuple], dict[str, str]]]:
    """By batches the rows of images, and why others were skipped."""
    images = list(todo)
    for start in range(0, len(images), batch_size):
        pixel_values, errors = _read_images(folder, processor, images[start : start + batch_size])
        skipped = {image: str(error).replace(f"{folder}{os.sep}", "") for image, error in errors.items()}
        for image, error in errors.items() if on_bad_image == "error" else ():
            raise ValueError(
                f"images: {image} in {folder} cannot be embedded: {skipped[image]} To leave out bad files, give "
                "--on_bad_image skip. The images before it need not be embedded again."
            ) from error
        embeds = ()
        if pixel_values:
            inputs = torch.cat([*pixel_values.values()]).to(model.device)
            embeds = model.get_image_features(inputs).pooler_output.cpu().numpy()
        yield [(image, *todo[image], embed) for image, embed in zip(pixel_values, embeds, strict=True)], skipped


def _write_shard(folder: Path, key: str, features: datasets.Features, rows: list[tuple]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}-{len(list(folder.glob(f'{key}-*.arrow'))):06d}.arrow"
    with ArrowWriter(features=features, path=str(path.with_suffix(".tmp"))) as writer:
        writer.write_batch(dict(zip(features, zip(*rows, strict=True), strict=True)))
        writer.finalize()
    os.replace(path.with_suffix(".tmp"), path)


def _publish(output_dir: Path, table: datasets.Dataset, faiss_index: faiss.Index, info: dict) -> None:
    """Writes a whole index beside the one that serves, which goes once `index.json` names the other."""
    folder = output_dir / info["embeddings"]
    shutil.rmtree(folder, ignore_errors=True)  # of a build that was cut off
    table.save_to_disk(str(folder))
    dataset = datasets.load_from_disk(str(folder))
    try:
        train_size = None if faiss_index.is_trained else len(dataset)
        dataset.add_faiss_index("embedding", custom_index=faiss_index, train_size=train_size)
    except RuntimeError as error:
        raise ValueError(
            f"index_factory: FAISS cannot train {info['index_factory']!r} on {len(dataset)} images; take fewer lists, "
            f'or "Flat". No image need be embedded again. ({error})'
        ) from error
    dataset.save_faiss_index("embedding", f"{folder}.faiss")
    new = output_dir / "index.tmp"
    new.write_text(f"{json.dumps(info, indent=2)}\n", encoding="utf-8")
    os.replace(new, output_dir / _INFO)
    for other in set(_TURNS) - {info["embeddings"]}:
        shutil.rmtree(output_dir / other, ignore_errors=True)
        (output_dir / f"{other}.faiss").unlink(missing_ok=True)


def _read_info(output_dir: Path) -> dict | None:
    """`index.json`; `None` if there is no index, or not all of it."""
    if not (output_dir / _INFO).is_file():
        return None
    info = json.loads((output_dir / _INFO).read_text(encoding="utf-8"))
    # Until 2026-11-29 it said "pictures" and "num_pictures", and there was one folder of embeddings.
    info = {"embeddings": _TURNS[0], **{name.replace("pictures", "images"): value for name, value in info.items()}}
    parts = (info["embeddings"], f"{info['embeddings']}.faiss")
    return info if all((output_dir / name).exists() for name in parts) else None


def _complete_info(output_dir: Path) -> dict:
    info = _read_info(output_dir)
    if info is None:
        begun = any((output_dir / name).exists() for name in (_INFO, _SHARDS, *_TURNS))
        what = "a whole index: build it again, it goes on where it stopped" if begun else "an index: build one there"
        raise FileNotFoundError(f"output_dir: {output_dir} does not hold {what}, or check the path.")
    return info
