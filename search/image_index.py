"""A folder of images to search and to ask: encoded once, and what came of it kept on disk.

    index/embeddings/         a `datasets` folder, memory-mapped: an image a row, sorted by path
        image, size, mtime_ns     its path below the folder of the images, and the stamp of its file when it was encoded
        embedding                 of a retrieval checkpoint: float32, to search by
        level_0, level_1, ...     with `keep_states`: float16, its `level_states`, all that fusion needs of an image
    index/embeddings.faiss    of a retrieval checkpoint: the FAISS index of `embedding`
    index/index.json          which checkpoint and which folder of images all of it is of, and the shapes of the levels
    index/shards/             while it is built: the rows of each process so far

`embeddings` and `embeddings-2` take turns: a new one is written beside the one that serves. A batch of rows is one piece of the
map, so a question about all images reads their states as they lie, and runs fusion alone; so does re-ranking.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import faiss
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, extract_model_from_parallel, gather_object
from datasets.arrow_writer import ArrowWriter
from datasets.utils import tqdm
from filelock import FileLock, Timeout
from PIL import Image

from hivilt import HiViLTForQuestionAnswering, HiViLTForRetrieval, HiViLTProcessor, __version__
from hivilt.data.tables import NO_FILE, file_stamp, heif_hint, image_endings
from hivilt.evaluation.vqa import canonical_answer
from hivilt.fusion_hivilt import HiViLTImageStates, HiViLTTextStates, cat_states, map_states, select, tensors_of
from hivilt.search.scoring import check_at_least, check_evaluates, score_pairs
from hivilt.training.names import did_you_mean

logger = logging.getLogger(__name__)

_INFO, _SHARDS, _STAMP = "index.json", "shards", ("image", "size", "mtime_ns")
# Folders of embeddings: a new one is written beside the one that serves, and takes its place once `index.json` names it.
_TURNS = ("embeddings", "embeddings-2")

_RERANK_BATCH = 32  # images that are encoded at a time for re-ranking
STATES_BYTES = 2**29  # kept of the states of images that were re-ranked, so that a page left running does not grow
_MOST_LISTED = 20  # answers that a message names
# Of kept states: what is in memory at a time, to be written or to be fused.
BYTES_AT_ONCE = 2**26

Model = HiViLTForRetrieval | HiViLTForQuestionAnswering

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


class ImageAnswer(NamedTuple):
    """What a model answers to a question about an image.

    Args:
        path: the image's file.
        answer: of `config.id2label`.
        score: its probability, as `processor.post_process_question_answering` gives it.
    """

    path: Path
    answer: str
    score: float


def fingerprint(model: Model, processor: HiViLTProcessor) -> str:
    """What tells one checkpoint from another: 32 hexadecimal digits (BLAKE2b) of all that makes its embeddings and states.

    Read are the names, shapes and float32 values of the weights, the vision levels, and what the image processor does
    to images; not the device, nor how and where from the checkpoint was loaded, nor what an encoder's config says besides,
    such as its activation. A model that is loaded in half precision has another fingerprint.
    """
    settings = processor.image_processor.to_dict().items()
    made_by = {
        "image_processor": {name: value for name, value in settings if name not in _NOT_ABOUT_IMAGES},
        "vision_levels": model.config.vision_level_layout,
    }
    if model.dtype != torch.float32:  # the weights that are shipped are the same numbers in half precision
        made_by["dtype"] = str(model.dtype)
    digest = hashlib.blake2b(json.dumps(made_by, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.to("cpu", torch.float32).flatten().numpy())
    return digest.hexdigest()


class ImageIndex:
    """The images of a folder with what a checkpoint gave of them; [`ImageIndex.build`] or [`ImageIndex.load`] makes one.

    Args:
        dataset: the columns above; `embedding` with its FAISS index, to search; `image` is enough to ask.
        folder: where the images are.
        model, processor: the checkpoint that made the columns, `model` in evaluation mode. Its weights must stay as they are,
            which is not checked again: after training on, build the index again.
        level_shapes: height, width and channels of each of the levels that `dataset` holds; none: it holds no states.

    Attributes:
        num_encoded: images that all processes of the build that made this object encoded; 0 for one that was loaded.
    """

    num_encoded = 0

    def __init__(
        self,
        dataset: datasets.Dataset,
        folder: Path,
        model: Model,
        processor: HiViLTProcessor,
        level_shapes: Sequence[Sequence[int]] = (),
    ):
        self.dataset, self.folder = dataset, folder
        self.model, self.processor = _checked(model), processor
        self.level_shapes = [tuple(shape) for shape in level_shapes]
        # Levels are read as they lie, and not where other columns are.
        self._rows, self._levels = dataset, None
        if levels := list(_level_columns(self.level_shapes)):
            # Without the FAISS index, which each of these would copy, but with the order of rows that were selected.
            plain = datasets.Dataset(dataset.data, indices_table=dataset._indices)
            self._rows, self._levels = plain.remove_columns(levels), plain.select_columns(levels).with_format("arrow")
        # States of images met in re-ranking, on the CPU, least recently used first.
        self._image_states: OrderedDict[str, HiViLTImageStates] = OrderedDict()

    def __len__(self) -> int:
        return len(self.dataset)

    @classmethod
    @torch.inference_mode()
    def build(
        cls,
        images: str | os.PathLike,
        model: Model,
        processor: HiViLTProcessor,
        output_dir: str | os.PathLike,
        batch_size: int = 32,
        on_bad_image: Literal["error", "skip"] = "error",
        index_factory: str = "Flat",
        shard_size: int = 1024,
        keep_states: bool | None = None,
        max_states_bytes: int | None = None,
    ) -> "ImageIndex":
        """Encodes the images below a folder, or only those that are new or have changed since an earlier build.

        A build that was cut off goes on where it stopped, and an index that is already there serves until the new one is
        complete. `output_dir` then has what stands above; `index.json` also lists which files were skipped and why. Of
        several processes of one launcher, which share `output_dir`, all call this: each encodes a share of the images.

        Args:
            images: the folder. Files below it are images if Pillow reads their ending (HEIC with the extra `heif`); hidden
                files and links to folders are left out.
            model: a retrieval model, whose index is searched, or one of question answering, whose index is asked.
            batch_size: images that are encoded at a time.
            on_bad_image: what to do about a file that has the ending of an image and cannot be read: stop, or skip it.
            index_factory: FAISS factory string (https://github.com/facebookresearch/faiss/wiki/The-index-factory).
                "Flat" is exact; "IVF256,Flat" and the like are trained here, and trade recall for speed. How hard they
                search is set on `index.dataset.get_index("embedding").faiss_index`, e.g. its `nprobe`.
            shard_size: images between two saves, at most.
            keep_states: keep the images' states, too, in float16, so that re-ranking encodes no image. Unset, as the search
                index that is there has it; of a question answering model always, since they are what is asked.
            max_states_bytes: that states may take; default: what the disk has room for. While they are new they are there
                twice.

        Raises:
            FileNotFoundError: there is no such folder.
            TypeError: the model is of another kind.
            ValueError: no image is readable, one is not and `on_bad_image` is "error", states have no room or are too large
                for float16, `output_dir` has an index of other images, a damaged one, or one that is being built, or an argument
                is out of range.
        """
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image: got {on_bad_image!r}, expected 'error' or 'skip'.")
        check_at_least("batch_size", batch_size, 1)
        check_at_least("shard_size", shard_size, 1)
        model = _checked(model)
        searches = _is_a(model, HiViLTForRetrieval)
        if not searches and keep_states is False:
            raise ValueError(
                "keep_states: got False, but states are what a question answering model is asked by; leave it out."
            )
        faiss_index = _make_faiss_index(index_factory, model.config.projection_dim) if searches else None
        if not Path(images).is_dir():
            raise FileNotFoundError(f"images: there is no folder {os.fspath(images)!r}; check the path.")
        folder, output_dir = Path(os.path.realpath(images)), Path(os.path.realpath(output_dir))
        if output_dir == folder:
            raise ValueError(f"output_dir: {folder} is the folder of the images itself; name {folder}/index, say.")
        _check_text("images", folder)
        _check_text("output_dir", output_dir)

        checkpoint = model.name_or_path
        # As seen from `output_dir`, unless it is on another drive.
        place = os.path.relpath(folder, output_dir) if folder.anchor == output_dir.anchor else folder
        info = {
            "hivilt_version": __version__,
            "fingerprint": fingerprint(model, processor),
            "checkpoint": os.path.abspath(checkpoint) if os.path.isdir(checkpoint) else checkpoint,
            "images": Path(place).as_posix(),
            "index_factory": index_factory if searches else None,
        }
        old = _read_info(output_dir)
        if old is not None and old["fingerprint"] != info["fingerprint"]:
            made_by = f" ({old['checkpoint']})" if old["checkpoint"] else ""
            logger.warning(
                f"output_dir: the index in {output_dir} is of another checkpoint{made_by}; all images are encoded again, and "
                "the new index takes its place."
            )
        is_same = old is not None and all(old[name] == info[name] for name in ("fingerprint", "images"))
        if keep_states is None:  # one to ask always has them, and says nothing of one to search
            is_search = old is not None and old["index_factory"] is not None
            keep_states = not searches or (is_search and old["level_shapes"] is not None)
        info["level_shapes"] = _level_shapes(model, processor) if keep_states else None
        levels = _level_columns(info["level_shapes"] or ())

        columns = dict.fromkeys(_STAMP, "int64") | {"image": "string"}
        features = datasets.Features({name: datasets.Value(kind) for name, kind in columns.items()})
        if searches:
            features["embedding"] = datasets.List(datasets.Value("float32"), length=model.config.projection_dim)
        features |= {name: datasets.List(datasets.Value("float16"), length=size) for name, size in levels.items()}
        there = None if old is None else _read_rows(output_dir, old)
        if is_same and features.keys() <= set(there.column_names):
            complete = there.select_columns(list(features))
        else:
            complete = datasets.Dataset.from_dict({name: [] for name in features}, features)
        # Named after what they belong to: shards of another checkpoint, folder or kind are never mixed in.
        key = f"{info['fingerprint']} {info['images']}{' with states' if keep_states else ''}"
        key = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()

        def embedded() -> tuple[datasets.Dataset, dict[tuple[str, int, int], int]]:
            """What there is by now, and the row of each image, as it was when it was embedded."""
            paths = map(str, sorted((output_dir / _SHARDS).glob(f"{key}-*.arrow")))
            with _told_as_damaged(output_dir):
                table = datasets.concatenate_datasets([complete, *map(datasets.Dataset.from_file, paths)])
            return table, {image: row for row, image in enumerate(_stamps(table))}

        state, work = PartialState(), [None] * 3
        if state.is_main_process:
            found, skipped = _find_images(folder, output_dir)
            known = embedded()[1]
            work = [found, skipped, {image: stamp for image, stamp in found.items() if (image, *stamp) not in known}]
        # As the first process sees it: another one may already have added to the shards.
        found, skipped, todo = broadcast_object_list(work)
        if not found:
            counted = f"{_count_endings(skipped)}.{heif_hint(skipped)}"
            raise ValueError(f"images: there is no image file below {folder}{counted}")
        is_moved = old is not None and old["images"] != info["images"]
        if is_moved and 2 * sum(found.get(image) == tuple(stamp) for image, *stamp in _stamps(there)) <= len(there):
            raise ValueError(
                f"output_dir: {output_dir} has an index of {len(there):,} other images, of {old['images']}, which would be "
                "lost; give another output_dir, or delete that index."
            )
        row_bytes = 2 * sum(levels.values())
        _check_room(output_dir, row_bytes, len(found), len(todo), max_states_bytes)

        with _alone(output_dir, old) if state.is_main_process else nullcontext():
            # By now all have read what the first one is to replace, and none writes a shard where it is refused.
            state.wait_for_everyone()
            if todo:
                own = dict(list(todo.items())[state.process_index :: state.num_processes])
                shard_size = min(shard_size, max(1, BYTES_AT_ONCE // max(row_bytes, 1)))
                pending, save = (
                    [],
                    partial(_write_shard, output_dir / _SHARDS, f"{key}-{state.process_index}", features),
                )
                total = len(found) - len(todo) + len(own)
                shown = {"unit": "image", "desc": "Encoding", "disable": not state.is_main_process}
                bar = tqdm(total=total, initial=total - len(own), **shown)
                try:
                    for rows, reasons in _encode_images(
                        folder, own, model, processor, bool(levels), batch_size, on_bad_image
                    ):
                        pending, skipped = pending + rows, skipped | reasons
                        bar.update(len(rows) + len(reasons))
                        if len(pending) >= shard_size:
                            save(pending)
                            pending = []
                finally:
                    bar.close()
                    if pending:
                        save(pending)
            # Also where nothing is to do.
            for reasons in gather_object([skipped]):
                skipped |= reasons
            if all(image in skipped for image in found):
                image = next(iter(found))
                raise ValueError(f"images: none of the {len(found)} files could be read; {image}: {skipped[image]}")

            if state.is_main_process:
                if skipped:
                    logger.warning(
                        f"{len(skipped)} of {len(found | skipped)} files are no readable images{_count_endings(skipped)}; "
                        f"{output_dir / _INFO} lists them.{heif_hint(skipped)}"
                    )
                table, known = embedded()
                rows = [known[image, *stamp] for image, stamp in found.items() if image not in skipped]
                reasons = [
                    {"image": image, "reason": reason, "stamp": list(found.get(image, NO_FILE))}
                    for image, reason in sorted(skipped.items())
                ]
                serving = _TURNS[1] if old is None else old["embeddings"]
                info |= {"num_images": len(rows), "skipped": reasons, "embeddings": serving}
                if info != old or rows != list(range(len(complete))):
                    info["embeddings"] = _TURNS[serving == _TURNS[0]]
                    _publish(output_dir, table.select(rows), faiss_index, info)
                shutil.rmtree(output_dir / _SHARDS, ignore_errors=True)
        state.wait_for_everyone()
        index = cls._open(output_dir, _complete_info(output_dir), model, processor)
        index.num_encoded = sum(image not in skipped for image in todo)
        return index

    @classmethod
    def load(cls, output_dir: str | os.PathLike, model: Model, processor: HiViLTProcessor) -> "ImageIndex":
        """Opens what [`ImageIndex.build`] has made with the same checkpoint, `model` in evaluation mode. Tells in a warning how
        many images of the folder were added, deleted or changed since.

        Raises:
            FileNotFoundError: there is no complete index.
            TypeError: the model is of another kind.
            ValueError: another checkpoint made the index, or it is damaged.
        """
        model = _checked(model)
        output_dir = Path(os.path.realpath(output_dir))
        info = _complete_info(output_dir)
        own = fingerprint(model, processor)
        if info["fingerprint"] != own:
            raise ValueError(
                f"The index in {output_dir} was made by another checkpoint (fingerprint {info['fingerprint']}) than the "
                f"one loaded ({own}), which can make nothing of what it holds: load the checkpoint that made it, in the "
                "same precision, or build the index again."
            )
        index = cls._open(output_dir, info, model, processor)
        script = "run_retrieval.py" if _is_a(model, HiViLTForRetrieval) else "run_vqa.py"
        embedded = {image: tuple(stamp) for image, *stamp in _stamps(index.dataset)}
        found = _find_images(index.folder, output_dir)[0]
        # Until 2026-12-01 what was skipped had no stamp.
        skipped = {one["image"]: tuple(one.get("stamp") or found.get(one["image"], ())) for one in info["skipped"]}
        added = [image for image in found.keys() - embedded.keys() if skipped.get(image) != found[image]]
        deleted = embedded.keys() - found.keys()
        changed = [image for image in embedded.keys() & found.keys() if found[image] != embedded[image]]
        if added or deleted or changed:
            logger.warning(
                f"{len(added)} images were added to {index.folder}, {len(deleted)} deleted and {len(changed)} changed since the "
                f"index in {output_dir} was built; build it again ({script} --index) to have what is there now."
            )
        return index

    @staticmethod
    def is_at(folder: str | os.PathLike) -> bool:
        """Whether a folder is an index, and not one of images."""
        # Not `Path.is_file`, which raises where a folder may not be entered.
        return os.path.isfile(Path(folder, _INFO)) and any(os.path.isdir(Path(folder, name)) for name in _TURNS)

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
        folder, dataset = Path(os.path.realpath(output_dir / info["images"])), _read_rows(output_dir, info)
        with _told_as_damaged(output_dir):
            if info["index_factory"] is not None:
                dataset.load_faiss_index("embedding", str(output_dir / f"{info['embeddings']}.faiss"))
        return cls(dataset, folder, model, processor, info["level_shapes"] or ())

    def changed(self, rows: Sequence[int] | None = None) -> list[Path]:
        """Images whose file is gone, or of another size or time of change than when they were encoded; of some rows of
        `dataset`, or of all. What is found or answered about them is of what they were."""
        # A table of one's own need not say which files its rows are of.
        stamps = _stamps(self._rows, rows) if "size" in self._rows.column_names else ()
        paths = ((self.folder / image, tuple(stamp)) for image, *stamp in stamps)
        return [path for path, stamp in paths if file_stamp(path) != stamp]

    @torch.inference_mode()
    def search(self, query: str | os.PathLike | Image.Image, top_k: int = 10, rerank_k: int = 0) -> list[Hit]:
        """The images nearest to a text or to an image, best first; equal scores by path. Of several that are equal at the cut any
        are given.

        Args:
            query: a `str` is always a text, a `Path` or a PIL image always an image.
            top_k: how many images to give; fewer only if the index has, or finds, no more.
            rerank_k: order this many of the nearest anew, by fusion with the query, which is a text then; the others follow
                by embedding. An index with states reads them. Without, an image is encoded when it is met, unless it has changed
                since; the states of the most recently used ones stay in memory, up to 512 MiB (2.6 MB an image with the base
                model).

        Raises:
            ValueError: the text is empty, an image cannot be read, `rerank_k` is given for an image, a number is out of
                range, the query's embedding is not finite, or the model is in training mode or one that answers and does not
                search.
            FileNotFoundError, TypeError: the query is an image that is not there, or something else.
        """
        check_evaluates(self.model)
        check_at_least("top_k", top_k, 1)
        check_at_least("rerank_k", rerank_k, 0)
        if not _is_a(self.model, HiViLTForRetrieval):
            raise ValueError(
                f"search: the index is of a {type(self.model).__name__}, which has no embeddings to search by; ask it, or build "
                "one with a checkpoint of run_retrieval.py."
            )
        if isinstance(query, str):
            text_states = self._encode_text("query", query)
            embeds = self.model.embed_texts(text_states)
        elif isinstance(query, (os.PathLike, Image.Image)):
            if rerank_k:
                raise ValueError("rerank_k: an image cannot be fused with images; search for a text, or leave it 0.")
            pixel_values = self.processor(images=query, return_tensors="pt")["pixel_values"]
            embeds = self.model.get_image_features(pixel_values.to(self.model.device)).pooler_output
        else:
            raise TypeError(f"query: got {type(query).__name__}, expected a text, a path or a PIL image.")

        embedding = embeds[0].cpu().numpy()
        if not np.isfinite(embedding).all():
            raise ValueError("query: its embedding is not finite; look for such values in the checkpoint's weights.")
        _, rows = self.dataset.search("embedding", embedding, min(max(top_k, rerank_k), len(self)))
        rows = np.sort(rows[rows >= 0])  # -1: an approximate index found no more
        if not len(rows):
            return []
        found = self._rows[rows.tolist()]
        # Computed here, since a compressed index only knows them approximately.
        cosines = np.asarray(found["embedding"], dtype=np.float32).reshape(len(rows), len(embedding)) @ embedding
        order = np.argsort(-cosines, kind="stable")
        scores, paths = cosines.copy(), [self.folder / image for image in found["image"]]
        changed = self.changed(rows.tolist())
        # Encoded now, an image that has changed would be another than the one that was found.
        others = set(changed) if self._levels is None else ()
        if head := [place for place in order[:rerank_k] if paths[place] not in others and os.path.exists(paths[place])]:
            images = {found["image"][place]: int(rows[place]) for place in head}
            image_states = self._encode_met(list(images)) if self._levels is None else self._states([*images.values()])
            pairs = torch.arange(len(head))
            fused = score_pairs(self.model, [image_states], [text_states], pairs, torch.zeros_like(pairs))
            scores[head] = self.model.ranking_score(torch.from_numpy(cosines[head]), fused).numpy()
            order = [*sorted(head, key=lambda place: -scores[place]), *order[~np.isin(order, head)]]
        hits = [Hit(paths[place], float(scores[place]), float(cosines[place])) for place in order]
        self._warn_of(changed, f"{len(hits)} images found")
        return hits[:top_k]

    @torch.inference_mode()
    def ask(
        self,
        questions: str | Sequence[str],
        top_k: int | None = None,
        answer: str | None = None,
        progress: bool = False,
    ) -> list[ImageAnswer] | list[list[ImageAnswer]]:
        """What the model answers to a question about each image, from states: no image is encoded, and each question once.

        Args:
            questions: one, or several.
            top_k: how many images to give, the first of their order; unset, all.
            answer: one of `config.id2label`, in any case that fits no other, to give with its probability for every image.
                Unset, each image has its own best answer.
            progress: show a bar.

        Returns:
            Of one question the images with their answers, the highest probability first, equal ones by path; of several a list
            of that for each.

        Raises:
            ValueError: the model does not answer from a list or is in training mode, the index has no states, a question is
                empty, the answer is not among the model's, scores are NaN, or `top_k` is less than 1.
        """
        check_evaluates(self.model)
        asked = [questions] if isinstance(questions, str) else list(questions)
        if top_k is not None:
            check_at_least("top_k", top_k, 1)
        if not _is_a(self.model, HiViLTForQuestionAnswering):
            raise ValueError(
                f"ask: the index is of a {type(self.model).__name__}, which answers nothing; build one with a checkpoint of "
                "run_vqa.py."
            )
        if self._levels is None:
            raise ValueError(
                "ask: the index holds no states, so images would be encoded anew; build it with keep_states."
            )
        wanted = None if answer is None else _label_of(answer, self.model.config.id2label)
        texts = [self._encode_text("questions", question) for question in asked]

        scores = torch.empty(len(texts), len(self), dtype=torch.float64)
        labels = torch.empty(len(texts), len(self), dtype=torch.long)
        with tqdm(total=labels.numel(), unit="answer", desc="Asking", disable=not progress) as bar:
            at_once = max(1, BYTES_AT_ONCE // (4 * sum(map(math.prod, self.level_shapes))))
            for start in range(0, len(self), at_once):
                rows = slice(start, min(start + at_once, len(self)))
                image_states = self._states(rows)
                for number, text in enumerate(texts):
                    scores[number, rows], labels[number, rows] = self._answer(image_states, text, wanted)
                    bar.update(rows.stop - rows.start)

        given = []
        for number in range(len(texts)):
            order = scores[number].argsort(descending=True, stable=True)[:top_k]
            found = self._rows[order.tolist()]
            paths = [self.folder / image for image in found["image"]]
            answers = [self.model.config.id2label[label] for label in labels[number, order].tolist()]
            columns = (paths, answers, scores[number, order].tolist())
            given.append([ImageAnswer(*row) for row in zip(*columns, strict=True)])
        self._warn_of(self.changed(), f"{len(self)} images")
        return given[0] if isinstance(questions, str) else given

    def _answer(
        self, image_states: HiViLTImageStates, text_states: HiViLTTextStates, wanted: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each image the probability of the wanted answer to one question, or of its best, and the answer's label."""
        index = torch.zeros(len(image_states.global_state), dtype=torch.long)
        text_states = map_states(partial(select, index=index), text_states)
        # In float64, where fewer of those that are almost certain are equal.
        logits = self.model(image_states=image_states, text_states=text_states).logits.double()
        if logits.isnan().any():
            raise ValueError("ask: scores are not numbers (NaN); look for such values in the checkpoint's weights.")
        is_multi_label = self.model.config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if is_multi_label else logits.softmax(dim=-1)
        return probabilities.max(dim=-1) if wanted is None else (probabilities[:, wanted], index + wanted)

    def _encode_text(self, argument: str, text: str) -> HiViLTTextStates:
        if not text.strip():
            raise ValueError(f"{argument}: the text is empty; write some words.")
        inputs = self.processor(text=[text], return_tensors="pt").to(self.model.device)
        tokenizer = self.processor.tokenizer
        unknown = {tokenizer.unk_token_id}
        if {*inputs["input_ids"][0].tolist()} - ({*tokenizer.all_special_ids} - unknown) == unknown:
            logger.warning(f"{argument}: {text!r} has no word that the model knows; any order is as good as another.")
        return self.model.encode_texts(**inputs)

    def _warn_of(self, changed: list[Path], among: str) -> None:
        if changed:
            logger.warning(
                f"{len(changed)} of the {among}, {changed[0].name} first, are gone or have changed since they were encoded: "
                "scores are of what they were, and what is gone, or has no states here, is not re-ranked. Build the index again."
            )

    def _states(self, rows: slice | list[int]) -> HiViLTImageStates:
        """States of images from the levels that the index holds."""
        columns, levels = self._levels[rows], []
        for name, shape in zip(_level_columns(self.level_shapes), self.level_shapes, strict=True):
            # The map is for reading alone, which torch does not know.
            numbers = columns[name].combine_chunks().flatten().to_numpy().copy()
            levels.append(torch.from_numpy(numbers).view(-1, *shape).to(self.model.device).to(self.model.dtype))
        return self.model.base_model.fusion("states_of_levels", levels)

    def _encode_met(self, images: list[str]) -> HiViLTImageStates:
        """States of images, encoded unless they are among those most recently used."""
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
        return image_states


def _checked(model: Model) -> Model:
    """The model itself, in evaluation mode, without what `torch.compile` or several processes put around it: it runs as written.
    Other models, and one that trains, are refused."""
    if isinstance(model, torch.nn.Module):
        model = extract_model_from_parallel(model, keep_torch_compile=False)
    if not (_is_a(model, HiViLTForRetrieval) or _is_a(model, HiViLTForQuestionAnswering)):
        raise TypeError(
            f"model: got a {type(model).__name__}, expected HiViLTForRetrieval, to search, or HiViLTForQuestionAnswering, to ask. "
            "Merge adapters first."
        )
    check_evaluates(model)
    return model


def _is_a(model: Model, kind: type) -> bool:
    """Whether a model is of a class, or of its copy that comes with a checkpoint (`trust_remote_code`)."""
    return any(base.__name__ == kind.__name__ for base in type(model).__mro__)


def _check_text(argument: str, folder: Path) -> None:
    """Refuses a path that neither `index.json` nor a printed line could hold."""
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument}: the name {os.fspath(folder)!r} is no UTF-8 text; rename the folder.") from error


def _stamps(table: datasets.Dataset, rows: Sequence[int] | None = None) -> Iterator[tuple[str, int, int]]:
    """Of some rows, or of all, the image and the stamp of its file when it was encoded."""
    return zip(*(table[name][slice(None) if rows is None else rows] for name in _STAMP), strict=True)


@contextmanager
def _told_as_damaged(output_dir: Path) -> Iterator[None]:
    """What reading a part of an index raises, as an error that says what to do: each format has errors of its own."""
    try:
        yield
    except (MemoryError, PermissionError):  # not of the index: built again, it would be no better
        raise
    except Exception as error:
        raise ValueError(
            f"output_dir: the index in {output_dir} is damaged ({type(error).__name__}: {error}); delete it and build it again."
        ) from error


@contextmanager
def _alone(output_dir: Path, old: dict | None) -> Iterator[None]:
    """Refuses a build while another one works in the folder, whose shards would mix with its own, and one whose index has
    changed since it was read as `old`."""
    folder = output_dir / _SHARDS
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            if _read_info(output_dir) != old:
                raise ValueError(
                    f"output_dir: another process has changed the index in {output_dir} meanwhile; build it again."
                )
            yield
    except Timeout as error:
        raise ValueError(
            f"output_dir: another process is building the index in {output_dir}; wait for it, or give another output_dir."
        ) from error


def _read_rows(output_dir: Path, info: dict) -> datasets.Dataset:
    """The columns of an index, as many as `index.json` says."""
    with _told_as_damaged(output_dir):
        rows, levels = datasets.load_from_disk(str(output_dir / info["embeddings"])), info["level_shapes"] or ()
        lengths = {name: rows.features[name].length for name in rows.column_names if name.startswith("level_")}
        if len(rows) != info["num_images"] or lengths != _level_columns(levels):
            raise ValueError(f"{len(rows)} images with levels {lengths} are not those of {_INFO}")
    return rows


def _level_columns(level_shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The columns of the levels of these shapes, and how many numbers an image has in each."""
    return {f"level_{place}": math.prod(shape) for place, shape in enumerate(level_shapes)}


def _level_shapes(model: Model, processor: HiViLTProcessor) -> list[list[int]]:
    """Height, width and channels of each level of an image as the processor gives it."""
    blank = processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    return [list(level.shape[1:]) for level in model.encode_images(blank.to(model.device)).level_states]


def _label_of(answer: str, id2label: dict[int, str]) -> int:
    """The label of an answer as it stands, else in another case; a `ValueError` if there is none, or several in another."""
    wanted = canonical_answer(answer)
    alike = {name: label for label, name in id2label.items() if canonical_answer(name) == wanted}
    if not alike:
        hint = did_you_mean(answer, id2label.values())
        listed = f": {', '.join(id2label.values())}." if len(id2label) <= _MOST_LISTED and hint == "." else hint
        raise ValueError(
            f"answer: {answer!r} is none of the {len(id2label):,} answers that the model chooses from{listed}"
        )
    if answer not in alike and len(alike) > 1:
        raise ValueError(f"answer: {answer!r} may be {' or '.join(map(repr, alike))}; write one of them as it stands.")
    return alike.get(answer, next(iter(alike.values())))


def _make_faiss_index(index_factory: str, width: int) -> faiss.Index:
    try:
        return faiss.index_factory(width, index_factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f'index_factory: FAISS cannot make {index_factory!r} of {width} dimensions; "Flat" always works. ({error})'
        ) from error


def _check_room(output_dir: Path, row_bytes: int, num_images: int, num_new: int, max_bytes: int | None) -> None:
    """Refuses states that have no room, before any image is encoded."""
    need = f"keep_states: states of {num_images:,} images take {num_images * row_bytes / 1e9:.3g} GB, {row_bytes:,} bytes each"
    fewer = "index fewer images, or a model with smaller levels"
    if max_bytes is not None and num_images * row_bytes > max_bytes:
        raise ValueError(f"{need}, and {max_bytes / 1e9:.3g} GB are allowed: allow more (--states_gb), {fewer}.")
    place = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    # What is new is written to shards first, and then all of it to the new index.
    room, new = shutil.disk_usage(place).free, (num_images + num_new) * row_bytes
    if num_new and new > room:
        raise ValueError(
            f"{need}, and the disk of {place} has room for {room / 1e9:.3g} GB of {new / 1e9:.3g}: {fewer}."
        )


def _find_images(folder: Path, without: Path) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The stamps of the image files below a folder, but for `without` and what is an index, and why the other files are none;
    both sorted."""
    endings = image_endings()
    found, others = {}, {}
    for parent, folders, names in os.walk(folder, onerror=lambda error: logger.warning("Left out: %s", error)):
        paths = [Path(parent, name) for name in folders if not name.startswith(".")]
        folders[:] = [path.name for path in paths if path != without and not ImageIndex.is_at(path)]
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


def _encode_images(
    folder: Path,
    todo: dict[str, tuple[int, int]],
    model: Model,
    processor: HiViLTProcessor,
    keep_states: bool,
    batch_size: int,
    on_bad_image: str,
) -> Iterator[tuple[list[tuple], dict[str, str]]]:
    """By batches the rows of images, and why others were skipped."""
    images = list(todo)
    for start in range(0, len(images), batch_size):
        pixel_values, errors = _read_images(folder, processor, images[start : start + batch_size])
        skipped = {image: str(error).replace(f"{folder}{os.sep}", "") for image, error in errors.items()}
        for image, error in errors.items() if on_bad_image == "error" else ():
            raise ValueError(
                f"images: {image} in {folder} cannot be encoded: {skipped[image]} To leave out bad files, give "
                "--on_bad_image skip. The images before it need not be encoded again."
            ) from error
        columns = []
        if pixel_values:
            states = model.encode_images(torch.cat([*pixel_values.values()]).to(model.device))
            if _is_a(model, HiViLTForRetrieval):
                embeds = model.embed_images(states).cpu()
                if bad := [image for image, row in zip(pixel_values, embeds, strict=True) if not row.isfinite().all()]:
                    raise ValueError(
                        f"images: the embedding of {bad[0]} is not finite, so that no search would find it; look for such values "
                        "in the checkpoint's weights, or load it in float32."
                    )
                columns.append(embeds.numpy())
            if keep_states:
                columns += map(_stored, states.level_states)
        yield [(image, *todo[image], *values) for image, *values in zip(pixel_values, *columns, strict=True)], skipped


def _stored(level: torch.Tensor) -> np.ndarray:
    """A level as it is kept: `(B_i, height * width * channels)`, float16."""
    stored = level.flatten(1).to("cpu", torch.float16)
    if not stored.isfinite().all():
        raise ValueError(
            f"keep_states: float16 holds numbers up to 65,504, but a state is {level.abs().max():,.0f}; this checkpoint's states "
            "cannot be kept."
        )
    return stored.numpy()


def _write_shard(folder: Path, key: str, features: datasets.Features, rows: list[tuple]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}-{len(list(folder.glob(f'{key}-*.arrow'))):06d}.arrow"
    with ArrowWriter(features=features, path=str(path.with_suffix(".tmp"))) as writer:
        writer.write_batch(dict(zip(features, zip(*rows, strict=True), strict=True)))
        writer.finalize()
    os.replace(path.with_suffix(".tmp"), path)


def _publish(output_dir: Path, table: datasets.Dataset, faiss_index: faiss.Index | None, info: dict) -> None:
    """Writes a whole index beside the one that serves, which goes once `index.json` names the other."""
    folder = output_dir / info["embeddings"]
    shutil.rmtree(folder, ignore_errors=True)  # of a build that was cut off
    table.save_to_disk(str(folder))
    if faiss_index is not None:
        dataset = datasets.load_from_disk(str(folder))
        try:
            train_size = None if faiss_index.is_trained else len(dataset)
            dataset.add_faiss_index("embedding", custom_index=faiss_index, train_size=train_size)
        except RuntimeError as error:
            raise ValueError(
                f"index_factory: FAISS cannot train {info['index_factory']!r} on {len(dataset)} images; take fewer lists, "
                f'or "Flat". No image need be encoded again. ({error})'
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
    with _told_as_damaged(output_dir):
        info = json.loads((output_dir / _INFO).read_text(encoding="utf-8"))
    if not isinstance(info, dict) or "fingerprint" not in info:
        raise ValueError(f"output_dir: {output_dir / _INFO} is not of an image index; give another output_dir.")
    with _told_as_damaged(output_dir):
        # Until 2026-11-29 it said "pictures" and "num_pictures", and there was one folder of embeddings and no states.
        info = {name.replace("pictures", "images"): value for name, value in info.items()}
        info = {"embeddings": _TURNS[0], "level_shapes": None, **info}
        parts = [info["embeddings"]]
        if info["index_factory"] is not None:
            parts.append(f"{info['embeddings']}.faiss")
    return info if all((output_dir / name).exists() for name in parts) else None


def _complete_info(output_dir: Path) -> dict:
    info = _read_info(output_dir)
    if info is None:
        begun = any((output_dir / name).exists() for name in (_INFO, _SHARDS, *_TURNS))
        what = "a whole index: build it again, it goes on where it stopped" if begun else "an index: build one there"
        raise FileNotFoundError(f"output_dir: {output_dir} does not hold {what}, or check the path.")
    return info
