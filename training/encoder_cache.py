"""What frozen encoders give, encoded once and kept on disk: every later epoch and run costs fusion and head alone.

    cache_dir/vision-1f0c.../0a72....safetensors    maps of some images, concatenated, and how many rows each has
    cache_dir/text-93be.../77d1....safetensors      states of some texts, likewise

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
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from glob import glob
from itertools import compress, product
from operator import itemgetter
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
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
# Another process that holds a part this long is taken to be stuck; its part is encoded twice then.
_PATIENCE_SECONDS = 600
# What is left of a disk for checkpoints and others.
_LEFT_FREE_BYTES = 2**30
# What reading a file raises that was cut off, damaged or made by others.
_NOT_WHOLE = (SafetensorError, OSError, TypeError, KeyError, IndexError, ValueError)
_UMASK = os.umask(0o077)
os.umask(_UMASK)


class CacheFull(Exception):
    """The cache may not, or cannot, hold what is to be put into it."""


class StateStore:
    """Tensors by keys in the safetensors files of a folder, which several processes may write and read at once.

    A file holds parts, each of one tensor of all its items, one item behind the other; `sizes`, the rows of each item in
    each part; the keys; and a checksum, which is compared when the file is read first.

    Args:
        folder: made when something is written.
        dtype: that tensors are stored in; `None`: their own.
        max_bytes: that `folder` and those beside it may hold; `None`: what the disk has room for.

    Attributes:
        num_encoded: items that this object had encoded.
        nbytes: what the files take.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None, max_bytes: int | None = None):
        self.folder, self.dtype, self.max_bytes = folder, dtype, max_bytes
        self.num_encoded = 0
        # The file of a key, and which of its items it is.
        self._places: dict[str, tuple[str, int]] = {}
        self._seen: set[str] = set()
        # The checksums of files that were not read yet.
        self._unchecked: dict[str, str] = {}
        # The parts of mapped files, and where in them each item begins and the last one ends.
        self._open: dict[str, tuple[list[torch.Tensor], torch.Tensor]] = {}
        self.refresh()

    def __getstate__(self) -> dict:
        # Workers that are spawned map the files themselves.
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        return _file_bytes(self.folder, "*.safetensors")

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that it does not hold."""
        return [key for key in keys if key not in self._places]

    def refresh(self) -> None:
        """Looks for files that were written since."""
        for name in sorted(set(glob("*.safetensors", root_dir=self.folder)) - self._seen):
            self._seen.add(name)
            try:
                with safe_open(self.folder / name, "pt") as file:
                    keys, checksum = itemgetter("keys", "checksum")(file.metadata())
                places = {key: (name, row) for row, key in enumerate(json.loads(keys))}
            except _NOT_WHOLE as error:
                logger.warning(
                    f"{self.folder / name} was cut off or is no file of this cache that this user may read ({error}): "
                    "what it held is encoded again, and it can be deleted."
                )
            else:
                self._places = places | self._places
                self._unchecked[name] = checksum

    def open(self, keys: Iterable[str]) -> None:
        """Maps the files of these items, so that whoever deletes them takes nothing, and forgets those that are damaged."""
        for name in dict.fromkeys(self._places[key][0] for key in keys if key in self._places):
            try:
                self._map(name)
            except _NOT_WHOLE as error:
                logger.warning(
                    f"{self.folder / name} is damaged or gone ({error}): what it held is encoded again, and it can be deleted."
                )
                self._places = {key: place for key, place in self._places.items() if place[0] != name}

    def _map(self, name: str) -> tuple[list[torch.Tensor], torch.Tensor]:
        if name not in self._open:
            with safe_open(self.folder / name, "pt") as file:
                keys, sizes = file.metadata()["keys"], file.get_tensor("sizes")
                parts = [file.get_tensor(f"part_{number}") for number in range(sizes.shape[1])]
            checksum = self._unchecked.get(name)
            if checksum is not None and checksum != _checksum(parts, sizes, keys):
                raise ValueError("it holds other bytes than were written")
            self._unchecked.pop(name, None)
            self._open[name] = parts, F.pad(sizes.cumsum(0), (0, 0, 1, 0))
        return self._open[name]

    def read(self, keys: Iterable[str]) -> list[list[torch.Tensor]] | None:
        """The tensors of each key, in mapped files: copy what is to be changed. `None` unless all of them are there."""
        found = []
        try:
            for key in keys:
                name, row = self._places[key]
                parts, ends = self._map(name)
                found.append([part[ends[row, n] : ends[row + 1, n]] for n, part in enumerate(parts)])
        except (KeyError, OSError, SafetensorError):  # not encoded, or deleted before this process mapped it
            return None
        return found

    def fill(
        self,
        sizes: Mapping[str, int],
        encode: Callable[[list[str]], Iterator[Sequence[torch.Tensor]]],
        per_file: int,
        describe: str | None = None,
    ) -> None:
        """Encodes what is missing, file by file; leaves to other processes what they are at, and reads it from theirs.

        Args:
            sizes: by the keys of all items, what the bytes of each are in proportion to.
            encode: gives the tensors of each of some keys, one key after the other.
            per_file: items of a file.
            describe: what the progress bar is called; `None`: there is none.

        Raises:
            CacheFull: there is no room for all, so that nothing is written, or the system refuses to write.
            ValueError: a number is too large for float16.
        """
        keys = list(sizes)
        self.refresh()
        self.open(keys)
        done = len(keys) - len(self.missing(keys))
        parts = [keys[start : start + per_file] for start in range(0, len(keys), per_file)]
        room_checked = False
        with tqdm(total=len(keys), initial=done, desc=describe, disable=describe is None or done == len(keys)) as bar:
            # First what no other process works on; then it waits for the rest.
            for patience, part in product((0, _PATIENCE_SECONDS), parts):
                with self._claim(part, patience) as missing:
                    items = []
                    for key, item in zip(missing, encode(missing) if missing else (), strict=True):
                        items.append([self._stored(tensor) for tensor in item])
                        bar.update()
                        if not room_checked:
                            left = sum(sizes[key] for key in self.missing(keys))
                            self._check_room(sum(tensor.nbytes for tensor in items[0]) * left // sizes[key])
                            room_checked = True
                    if items:
                        self._write(missing, items)
            bar.update(bar.total - bar.n)  # what others encoded

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        stored = tensor.to("cpu", self.dtype or tensor.dtype)
        if self.dtype == torch.float16 and not stored.isfinite().all():
            raise ValueError(
                f"cache_dtype: float16 holds numbers up to 65,504, but the encoder gives {tensor.abs().max():,.0f}; take "
                "bfloat16 or float32."
            )
        return stored

    @contextmanager
    def _claim(self, keys: list[str], patience: float) -> Iterator[list[str]]:
        """What this process is to encode of these, while no other one does; with patience also what one is stuck at."""
        if not self.missing(keys):
            yield []
            return
        # The system frees the lock of a process that was killed.
        lock = filelock.FileLock(self.folder / f"{_digest(keys)}.lock")
        with _writing(self.folder), suppress(filelock.Timeout):
            lock.acquire(timeout=patience)
        try:
            self.refresh()
            self.open(keys)
            yield self.missing(keys) if lock.is_locked or patience else []
        finally:
            if lock.is_locked:
                Path(lock.lock_file).unlink(missing_ok=True)
                lock.release()

    def _write(self, keys: list[str], items: list[list[torch.Tensor]]) -> None:
        sizes = torch.tensor([[len(tensor) for tensor in item] for item in items])
        parts = {f"part_{n}": torch.cat(tensors) for n, tensors in enumerate(zip(*items, strict=True))}
        header, name = json.dumps(keys), f"{_digest(keys)}.safetensors"
        metadata = {"keys": header, "checksum": _checksum(parts.values(), sizes, header)}
        with _writing(self.folder):
            # safetensors writes a file as a whole or not at all, but leaves it to its writer alone.
            save_file({**parts, "sizes": sizes}, self.folder / name, metadata)
            (self.folder / name).chmod(0o666 & ~_UMASK)
            # Where one lay there that was cut off or damaged.
            self._open.pop(name, None)
            self._unchecked.pop(name, None)
            self._map(name)
        self._seen.add(name)
        self._places |= {key: (name, row) for row, key in enumerate(keys)}
        self.num_encoded += len(keys)

    def _check_room(self, need: int) -> None:
        """Raises `CacheFull` unless this folder, and those beside it, may hold so many bytes more."""
        cache = self.folder.parent
        with _writing(cache):
            used, free = _file_bytes(cache, "*/*.safetensors"), shutil.disk_usage(cache).free
        if self.max_bytes is not None and used + need > self.max_bytes:
            where = f"{cache} holds {_size(used)} and may hold {_size(self.max_bytes)} (--cache_gb)"
        elif need + _LEFT_FREE_BYTES > free:
            where = f"the disk of {cache} (--cache_dir) has {_size(free)} left"
        else:
            return
        raise CacheFull(
            f"{where}, but {_size(need)} are to come; allow more, name another disk, store less (--cache_dtype float16), or "
            "delete what is old there"
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes a folder, which may have been deleted meanwhile; what the system refuses then is a `CacheFull`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise CacheFull(f"{folder} cannot be written to ({error})") from error


def _file_bytes(folder: Path, pattern: str) -> int:
    total = 0
    for name in glob(pattern, root_dir=folder):
        with suppress(FileNotFoundError):  # deleted meanwhile
            total += (folder / name).stat().st_size
    return total


def _checksum(parts: Iterable[torch.Tensor], sizes: torch.Tensor, keys: str) -> str:
    checksum = zlib.crc32(keys.encode())
    for tensor in (*parts, sizes):
        checksum = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(_bytes(tensor), checksum)
    return f"{checksum:08x}"


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _digest(parts: Iterable[str | bytes | np.ndarray]) -> str:
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
        stores: `"vision"` and `"text"`, those that hold something.

    Raises:
        ValueError: `dtype` is another, or `folder` is a file.
    """

    def __init__(self, folder: str | os.PathLike | None = None, max_bytes: int | None = None, dtype: str | None = None):
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
        self.folder = Path(HF_HOME) / "hivilt" if folder is None else Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"folder (--cache_dir): expected a folder, got the file {self.folder}.")
        self.max_bytes = max_bytes
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.stores: dict[str, StateStore] = {}
        self._seconds: Counter[str] = Counter()
        # The images that were added, by where they are read from, and what tells that their files are still the same.
        self._image_keys: dict[str | TableImage, tuple[str, tuple[int, int]]] = {}
        # What each part was first filled for.
        self._folders: dict[str, Path] = {}
        self._told: set[str] = set()

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
            num_workers: processes that open images.

        Raises:
            FileNotFoundError, ValueError: an image cannot be read.
            ValueError: an encoder is another than before, or gives numbers that are too large for float16.
        """
        base = next(module for module in model.modules() if hasattr(module, "frozen_modules"))
        augments = augmentation is not None and dataset.seed is not None
        frozen = {part for part in ("vision", "text") if _is_frozen(base, f"{part}_model")}
        # What was put in for another model, or before this one trained, is nothing to it.
        self.stores = {part: store for part, store in self.stores.items() if part in frozen}
        way = {"dtype": str(self.dtype), "hivilt": hivilt.__version__, "transformers": transformers.__version__}
        levels = [*map(list, base._vision_levels)]  # without local fusion the coarsest alone
        how = {"vision": ({**way, "levels": levels}, processor.image_processor), "text": (way,)}
        # Also of those that are read, but not added to now.
        for part in sorted(frozen & {*parts, *self.stores}):
            folder = self.folder / f"{part}-{_fingerprint(getattr(base, f'{part}_model'), *how[part])}"
            if self._folders.setdefault(part, folder) != folder:
                self.stores.pop(part, None)
                raise ValueError(
                    f"model: its {part} encoder is another than that of the data sets added before; use a new cache."
                )

        wanted = frozen & {*parts}
        if augments and "vision" in wanted:
            wanted.remove("vision")
            self._tell("vision: not cached in training, since augmentation changes the images each time.")
        if augments and augmentation.random_flip == "swap" and "text" in wanted:
            wanted.remove("text")
            self._tell("text: not cached in training, since random_flip exchanges words.")
        if "vision" in wanted:
            for image in dict.fromkeys(example.image for example in dataset.examples):
                # Anew each time: a file may have changed.
                self._image_keys[image] = _digest([image_bytes(image)]), _stamp(image)
            images = {self._image_keys[example.image][0]: example.image for example in dataset.examples}

            @torch.no_grad()
            def encode_images(keys: list[str]) -> Iterator[tuple[torch.Tensor, ...]]:
                # With a generator of its own: training draws the same as without a cache.
                own = {"generator": torch.Generator(), "collate_fn": partial(_pixel_values, processor)}
                for batch in DataLoader([images[key] for key in keys], batch_size, num_workers=num_workers, **own):
                    yield from zip(*base.get_feature_maps(batch.to(base.device)), strict=True)

            self._fill("vision", dict.fromkeys(images, 1), encode_images, progress)
        if "text" in wanted:
            tokens = processor(text=dataset.texts, padding=False)
            keys = _text_keys(tokens)
            texts = dict(zip(keys, dataset.texts, strict=True))
            lengths = dict(zip(keys, map(len, tokens["input_ids"]), strict=True))

            @torch.no_grad()
            def encode_texts(keys: list[str]) -> Iterator[tuple[torch.Tensor]]:
                for start in range(0, len(keys), batch_size):
                    some = [texts[key] for key in keys[start : start + batch_size]]
                    batch = processor(text=some, return_tensors="pt", padding=True)
                    mask = batch["attention_mask"].bool()
                    for row, kept in zip(base.get_token_states(**batch.to(base.device)).cpu(), mask, strict=True):
                        yield (row[kept],)

            # Texts of like length are encoded together, so that little is padded.
            self._fill("text", dict(sorted(lengths.items(), key=itemgetter(1))), encode_texts, progress)

    def feature_maps(self, images: Sequence[str | TableImage]) -> tuple[torch.Tensor, ...] | None:
        """The model's `feature_maps` `(B_i, height, width, channels)` of images; `None` unless all of them are cached."""
        if "vision" not in self.stores:
            return None
        keys = []
        for image in images:
            key, stamp = self._image_keys.get(image, (None, NO_FILE))
            # A file that was written over since is another image; one that is gone is what it was.
            keys.append(key if _stamp(image) in (stamp, NO_FILE) else None)
        found = self.stores["vision"].read(keys)
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
            part: {
                "cached": len(store),
                "bytes": store.nbytes,
                "encoded": store.num_encoded,
                "seconds": self._seconds[part],
            }
            for part, store in self.stores.items()
            if len(store)
        }

    def _fill(self, part: str, sizes: dict[str, int], encode: Callable, progress: bool) -> None:
        start, folder = time.perf_counter(), self._folders[part]
        if part not in self.stores:
            self.stores[part] = StateStore(folder, self.dtype, self.max_bytes)
        store = self.stores[part]
        before = store.num_encoded
        try:
            store.fill(sizes, encode, _ITEMS_PER_FILE[part], f"Encoding {part}" if progress else None)
        except CacheFull as error:
            self._tell(f"{part}: {error}, so what is missing is encoded in every epoch.", logging.WARNING)
            return
        finally:
            seconds = time.perf_counter() - start
            self._seconds[part] += seconds
        unit, encoded = "images" if part == "vision" else "texts", store.num_encoded - before
        took = f"{encoded:,} of them encoded now" + (f", in {seconds:.0f} s" if encoded else "")
        # Every evaluation looks, and says it once.
        self._tell(f"{part}: {len(sizes):,} {unit} from the cache, {took}; {_size(store.nbytes)} in {folder}")

    def _tell(self, what: str, level: int = logging.INFO) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.log(level, what)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _stamp(image: str | TableImage) -> tuple[int, int]:
    return file_stamp(image) if isinstance(image, str) else NO_FILE


def _is_frozen(base: HiViLTModel, name: str) -> bool:
    """Whether an encoder gives the same each time: it was frozen as a whole, so it has no dropout, and nothing in it trains."""
    encoder = getattr(base, name)
    # An adapter of peft's may still be turned off, exchanged or scaled, which its weights do not tell.
    adapted = any(hasattr(module, "adapter_layer_names") for module in encoder.modules())
    return name in base.frozen_modules and not adapted and not any(p.requires_grad for p in encoder.parameters())


def _fingerprint(encoder: nn.Module, way: Mapping[str, Any], *processors: Any) -> str:
    """Names what an encoder's results depend on: its weights, layers and config, the processor before it, the versions."""
    settings = [_settings(encoder.config.to_dict()), way, *(_settings(one.to_dict()) for one in processors)]
    digest = [json.dumps(settings, sort_keys=True, default=str)]
    digest += [f"{name} {type(module).__name__}" for name, module in encoder.named_modules()]
    for name, tensor in encoder.state_dict().items():
        digest += [f"{name} {tensor.dtype} {tuple(tensor.shape)}", _bytes(tensor)]
    return _digest(digest)


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config's or processor's fields those that say what it computes, and not where it came from."""
    origins = ("transformers_version", "dtype", "architectures", "auto_map", "processor_class")
    return {name: value for name, value in fields.items() if not name.startswith("_") and name not in origins}


def _pixel_values(processor: HiViLTProcessor, images: Sequence[str | TableImage]) -> torch.Tensor:
    resized = [processor.resize(open_image(image)) for image in images]
    return processor(images=resized, return_tensors="pt")["pixel_values"]


def _text_keys(texts: Mapping[str, Any]) -> list[str]:
    """Names each tokenized text by what the encoder reads of it: its tokens and their types, without padding."""
    given = (texts[name] for name in ("input_ids", "token_type_ids", "attention_mask") if name in texts)
    *fields, masks = (value.tolist() if isinstance(value, torch.Tensor) else value for value in given)
    return [
        _digest([repr([list(compress(values, mask)) for values in row])])
        for *row, mask in zip(*fields, masks, strict=True)
    ]
