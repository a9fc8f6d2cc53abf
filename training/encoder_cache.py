"""What frozen encoders give, encoded once and kept on disk: every later epoch and run costs fusion and head alone.

    cache_dir/vision-1f0c.../0a72....safetensors    maps of some images, a tensor a level: `<image>.0`, `<image>.1`, ...
    cache_dir/text-93be.../77d1....safetensors      states of some texts: `<text>.0`

A folder belongs to one encoder, with its weights, its processor and the precision stored; an item goes by its content:
the bytes of an image's file, the tokens of a text. So nothing stale is ever read. Files come as a whole or not at all,
are memory-mapped, and are shared by processes and runs: those that fill a cache at once share the work, and one that was
killed has left all that it finished.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import compress, product
from pathlib import Path
from typing import Any

import filelock
import torch
import transformers
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import hivilt
from hivilt.data.augmentation import Augmentation
from hivilt.data.captions import CaptionDataset
from hivilt.data.tables import NO_FILE, TableImage, file_stamp, image_bytes, open_image
from hivilt.data.vqa import VQADataset
from hivilt.modeling_hivilt import HiViLTModel, HiViLTPreTrainedModel
from hivilt.processing_hivilt import HiViLTProcessor

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Items of one file: what a kill loses, and what one process of several encodes at a time.
_ITEMS_PER_FILE = {"vision": 128, "text": 2048}
# What is left of a disk for checkpoints and others.
_LEFT_FREE_BYTES = 2**30


class CacheFull(Exception):
    """The cache may not, or cannot, hold what is to be put into it."""


class StateStore:
    """Tensors by keys in the safetensors files of a folder, which several processes may write and read at once.

    Args:
        folder: made when something is written.
        dtype: that tensors are stored in; `None`: their own.
        max_bytes: that `folder` and those beside it may hold; `None`: what the disk has room for.

    Attributes:
        num_encoded, seconds, nbytes: items that this object had encoded, how long that took, and what all files take.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None, max_bytes: int | None = None):
        self.folder, self.dtype, self.max_bytes = folder, dtype, max_bytes
        self.num_encoded, self.seconds, self.nbytes = 0, 0.0, 0
        # The file and the number of tensors of each key. An open file is mapped: whoever deletes it takes nothing.
        self._items: dict[str, tuple[safe_open, int]] = {}
        self._seen: set[Path] = set()
        self.refresh()

    def __reduce__(self) -> tuple:
        # Workers that are spawned map the files themselves.
        return StateStore, (self.folder, self.dtype, self.max_bytes)

    def __len__(self) -> int:
        return len(self._items)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that it does not hold."""
        return [key for key in keys if key not in self._items]

    def refresh(self) -> None:
        """Looks for files that were written since."""
        for path in sorted({*self.folder.glob("*.safetensors")} - self._seen):
            try:
                self._open(path)
            except (OSError, SafetensorError) as error:
                logger.warning(
                    f"{path} cannot be read ({error}): what it held is encoded again, and it can be deleted."
                )

    def _open(self, path: Path) -> None:
        self._seen.add(path)
        file = safe_open(path, "pt")
        counts = Counter(name.partition(".")[0] for name in sorted(file.keys()))
        self._items |= {key: (file, count) for key, count in counts.items()}
        self.nbytes += path.stat().st_size

    def read(self, keys: Sequence[str]) -> list[list[torch.Tensor]] | None:
        """The tensors of each key, in mapped files: copy what is to be changed. `None` unless all of them are there."""
        if self.missing(keys):
            return None
        found = [(key, *self._items[key]) for key in keys]
        return [[file.get_tensor(f"{key}.{level}") for level in range(count)] for key, file, count in found]

    def fill(
        self,
        items: Mapping[str, Any],
        encode: Callable[[list[Any]], Iterator[Sequence[torch.Tensor]]],
        per_file: int,
        describe: str | None = None,
    ) -> None:
        """Encodes what is missing of `items`, file by file; leaves to other processes what they are at, and reads it from
        theirs.

        Args:
            encode: gives the tensors of each of some items, one item after the other.
            describe: what the progress bar is called; `None`: there is none.

        Raises:
            CacheFull: there is no room for all, or the system refuses to write.
            ValueError: a number is too large for float16.
        """
        start = time.perf_counter()
        self.refresh()
        keys = self.missing(items)
        parts = [keys[first : first + per_file] for first in range(0, len(keys), per_file)]
        with tqdm(total=len(keys), desc=describe, disable=describe is None or not keys) as bar:
            # First what no other process is at, then what these have not finished.
            for timeout, part in product((0, -1), parts):
                with self._claim(part, timeout) as missing:
                    tensors = {}
                    encoded = encode([items[key] for key in missing]) if missing else ()
                    for key, levels in zip(missing, encoded, strict=True):
                        tensors |= {f"{key}.{place}": self._stored(level) for place, level in enumerate(levels)}
                        bar.update()
                    if missing:
                        self._write(f"{_digest(missing)}.safetensors", tensors, len(self.missing(keys)) / len(missing))
                        self.num_encoded += len(missing)
        self.seconds += time.perf_counter() - start

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        # safetensors takes no two views of the same batch.
        stored = tensor.to("cpu", self.dtype or tensor.dtype, copy=True).contiguous()
        if self.dtype == torch.float16 and not stored.isfinite().all():
            raise ValueError(
                f"cache_dtype: float16 holds numbers up to 65,504, but the encoder gives {tensor.abs().max():,.0f}; take "
                "bfloat16 or float32."
            )
        return stored

    @contextmanager
    def _claim(self, keys: list[str], timeout: float) -> Iterator[list[str]]:
        """What this process is to encode of these, while no other one does: nothing where one is at it after `timeout`."""
        # The system frees the lock of a process that was killed.
        lock = filelock.FileLock(self.folder / f"{_digest(keys)}.lock", timeout)
        with self._writing(), suppress(filelock.Timeout):
            lock.acquire()
        try:
            self.refresh()
            yield self.missing(keys) if lock.is_locked else []
        finally:
            if lock.is_locked:
                Path(lock.lock_file).unlink(missing_ok=True)
                lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What the system refuses within is a `CacheFull`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except (OSError, SafetensorError) as error:
            raise CacheFull(f"{self.folder} cannot be written to ({error})") from error

    def _write(self, name: str, tensors: dict[str, torch.Tensor], times: float) -> None:
        """Writes a file, if there is room for so many times as much: for all that is missing."""
        cache, need = self.folder.parent, times * sum(tensor.nbytes for tensor in tensors.values())
        with self._writing():
            room = shutil.disk_usage(cache).free - _LEFT_FREE_BYTES
            if self.max_bytes is not None:
                room = min(room, self.max_bytes - sum(path.stat().st_size for path in cache.glob("*/*.safetensors")))
            if need > room:
                raise CacheFull(
                    f"{need / 1e9:.3g} GB are to come, but {cache} has room for {max(room, 0) / 1e9:.3g}; allow more "
                    "(--cache_gb), name another disk (--cache_dir), store less (--cache_dtype float16), or delete what is "
                    "old there"
                )
            # safetensors writes a file as a whole or not at all, but leaves it to its writer alone.
            save_file(tensors, self.folder / name)
            (self.folder / name).chmod(self.folder.stat().st_mode & 0o666)
            self._open(self.folder / name)


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()


class EncoderCache:
    """What the frozen encoders of a model give of the images and texts of data sets, as their collators take it.

    `HiViLTTrainer(..., encoder_cache=EncoderCache())` fills it and gives it to its collator; docs/training.md has a loop of
    one's own. Batches then hold `feature_maps` in place of `pixel_values`, and `token_states` beside the tokens: `model(**batch)` takes
    them as they are. An encoder is cached where `model.freeze` froze it as a whole; one that trains in part, or by an
    adapter, is not. A cache serves one model; where its encoders changed, make a new one.

    Args:
        folder: default: `hivilt` in the folder of Hugging Face's caches (`HF_HOME`).
        max_bytes: of all encoders in `folder` together. What this bound or the disk has no room for is encoded in every
            epoch, with a warning. Default: no bound but the disk.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`, in which states are stored. Default: as the encoder gives them, by the
            precision of its weights (in mixed precision, too); losses then are those without the cache.

    Attributes:
        stores: of `"vision"` and `"text"` those whose encoder is frozen.

    Raises:
        ValueError: `dtype` is another.
    """

    def __init__(self, folder: str | os.PathLike | None = None, max_bytes: int | None = None, dtype: str | None = None):
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
        self.folder = Path(HF_HOME) / "hivilt" if folder is None else Path(folder)
        self.max_bytes = max_bytes
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.stores: dict[str, StateStore] = {}
        # By images, and by what tells that their files are still the same.
        self._image_keys: dict[tuple[str | TableImage, tuple[int, int]], str] = {}

    def add(
        self,
        dataset: VQADataset | CaptionDataset,
        model: HiViLTPreTrainedModel,
        processor: HiViLTProcessor,
        parts: Collection[str] = ("vision", "text"),
        augmentation: Augmentation | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        progress: bool = True,
    ) -> None:
        """Encodes the images and texts of a data set, as far as their encoders are frozen and it was not done before.

        Args:
            model, processor: the encoders, on the device where they run, and what they read.
            parts: the encoders to do it for. What the cache held of one that is not frozen is not read any more.
            augmentation: of the collator. What it changes is not cached: the images of a training split, and its texts
                where `random_flip="swap"` exchanges their words.
            batch_size: images or texts that are encoded at a time.
            num_workers: processes that open images and cut texts.

        Raises:
            FileNotFoundError, ValueError: an image cannot be read.
            ValueError: an encoder is another than before, or gives numbers that are too large for float16.
        """
        base = next(module for module in model.modules() if hasattr(module, "frozen_modules"))
        augments = augmentation is not None and dataset.seed is not None
        changes = {"vision": augments, "text": augments and augmentation.random_flip == "swap"}
        for part in ("vision", "text"):
            # What was put in for another model, or before this one trained, is nothing to it.
            store = self.stores.pop(part, None)
            if not _is_frozen(base, f"{part}_model") or (store is None and part not in parts):
                continue
            folder = self.folder / f"{part}-{_fingerprint(part, base, processor, self.dtype)}"
            if store is not None and store.folder != folder:
                raise ValueError(
                    f"model: its {part} encoder is another than that of the data sets added before; use a new cache."
                )
            self.stores[part] = StateStore(folder, self.dtype, self.max_bytes) if store is None else store
            if part in parts and changes[part]:
                logger.info_once(f"{part}: not cached in training, since augmentation changes it each time.")
            elif part in parts:
                encode = partial(_encode, part, base, processor, batch_size, num_workers)
                self._fill(part, self._items(part, dataset, processor), encode, progress)

    def _items(self, part: str, dataset: VQADataset | CaptionDataset, processor: HiViLTProcessor) -> dict[str, Any]:
        """The images or texts of a data set by their keys; texts by length, so that little is padded."""
        if part == "vision":
            images = dict.fromkeys(image for example in dataset.examples for image in example.images)
            return {self._image_key(image): image for image in images}
        texts = sorted(dataset.texts, key=len)
        return dict(zip(_text_keys(processor(text=texts, padding=False)), texts, strict=True))

    def _image_key(self, image: str | TableImage) -> str:
        version = image, file_stamp(image) if isinstance(image, str) else NO_FILE
        if version not in self._image_keys:
            self._image_keys[version] = _digest([image_bytes(image)])
        return self._image_keys[version]

    def _fill(self, part: str, items: Mapping[str, Any], encode: Callable, progress: bool) -> None:
        store = self.stores[part]
        before = store.num_encoded
        try:
            store.fill(items, encode, _ITEMS_PER_FILE[part], f"Encoding {part}" if progress else None)
        except CacheFull as error:
            logger.warning_once(f"{part}: {error}, so what is missing is encoded in every epoch.")
        else:  # every evaluation looks, and says it once
            now = f"{store.num_encoded - before:,} of them encoded now"
            logger.info_once(
                f"{part}: {len(items):,} from the cache, {now}; {store.nbytes / 1e9:.3g} GB in {store.folder}"
            )

    def feature_maps(self, images: Sequence[str | TableImage]) -> tuple[torch.Tensor, ...] | None:
        """The model's `feature_maps` `(B_i, height, width, channels)` of images; `None` unless all of them are cached."""
        store = self.stores.get("vision")
        # A file that was written over since is another image.
        found = None if store is None else store.read([self._image_key(image) for image in images])
        return None if found is None else tuple(map(torch.stack, zip(*found, strict=True)))

    def token_states(self, texts: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The model's `token_states` `(B_t, N_t, text width)` of texts, 0 at padding; `None` unless all are cached.

        Args:
            texts: `input_ids` and `attention_mask` `(B_t, N_t)`, and `token_type_ids` where the tokenizer gives them.
        """
        found = self.stores["text"].read(_text_keys(texts)) if "text" in self.stores else None
        if found is None:
            return None
        mask, states = texts["attention_mask"].bool(), torch.cat([states for (states,) in found])
        padded = states.new_zeros(*mask.shape, states.shape[-1])
        padded[mask] = states
        return padded

    def summary(self) -> dict[str, dict[str, float]]:
        """For each encoder its items, their bytes, and how many of them this object encoded in how many seconds."""
        return {
            part: {"cached": len(store), "bytes": store.nbytes, "encoded": store.num_encoded, "seconds": store.seconds}
            for part, store in self.stores.items()
            if len(store)
        }


def _is_frozen(base: HiViLTModel, name: str) -> bool:
    """Whether an encoder gives the same each time: it was frozen as a whole, so it has no dropout, and nothing in it trains."""
    encoder = getattr(base, name)
    # An adapter of peft's may still be turned off, exchanged or scaled, which its weights do not tell.
    adapted = any(hasattr(module, "adapter_layer_names") for module in encoder.modules())
    return name in base.frozen_modules and not adapted and not any(p.requires_grad for p in encoder.parameters())


def _fingerprint(part: str, base: HiViLTModel, processor: HiViLTProcessor, dtype: torch.dtype | None) -> str:
    """Names what an encoder's results depend on: its weights, layers and config, the processor before it, the versions."""
    encoder = getattr(base, f"{part}_model")
    way = [str(dtype), hivilt.__version__, transformers.__version__, _settings(encoder.config.to_dict())]
    if part == "vision":
        # Without local fusion the coarsest level alone.
        way += [base._vision_levels, _settings(processor.image_processor.to_dict())]
    digest = [json.dumps(way, sort_keys=True, default=str)]
    digest += [f"{name} {type(module).__name__}" for name, module in encoder.named_modules()]
    for name, tensor in encoder.state_dict().items():
        data = tensor.detach().cpu().flatten().view(torch.uint8).numpy()
        digest += [f"{name} {tensor.dtype} {tuple(tensor.shape)}", data]
    return _digest(digest)


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config's or processor's fields those that say what it computes, and not where it came from."""
    origins = ("transformers_version", "dtype", "architectures", "auto_map", "processor_class")
    return {name: value for name, value in fields.items() if not name.startswith("_") and name not in origins}


def _text_keys(texts: Mapping[str, Any]) -> list[str]:
    """Names each tokenized text by what the encoder reads of it: its tokens and their types, without padding."""
    given = (texts[name] for name in ("input_ids", "token_type_ids", "attention_mask") if name in texts)
    *fields, masks = (value.tolist() if isinstance(value, torch.Tensor) else value for value in given)
    return [
        _digest([repr([list(compress(values, mask)) for values in row])])
        for *row, mask in zip(*fields, masks, strict=True)
    ]


@torch.no_grad()
def _encode(
    part: str, base: HiViLTModel, processor: HiViLTProcessor, batch_size: int, num_workers: int, items: list[Any]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """What an encoder gives of each item: a map a level, or the states of a text."""
    # With a generator of its own: training draws the same as without a cache.
    own = {"generator": torch.Generator(), "collate_fn": partial(_read, part, processor)}
    for inputs in DataLoader(items, batch_size, num_workers=num_workers, **own):
        inputs = inputs.to(base.device)
        if part == "vision":
            yield from zip(*base.get_feature_maps(inputs["pixel_values"]), strict=True)
        else:
            states, masks = base.get_token_states(**inputs).cpu(), inputs["attention_mask"].bool().cpu()
            yield from ((row[mask],) for row, mask in zip(states, masks, strict=True))


def _read(part: str, processor: HiViLTProcessor, items: Sequence[Any]) -> Mapping[str, torch.Tensor]:
    if part == "text":
        return processor(text=items, return_tensors="pt", padding=True)
    return processor(images=[processor.resize(open_image(image)) for image in items], return_tensors="pt")
