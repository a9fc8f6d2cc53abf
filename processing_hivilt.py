"""HiViLT processor: images and texts in, model inputs out; scores in, answers and boxes out."""

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Real

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ImageInput, SizeDict
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import logging

from .boxes_hivilt import suppress, to_corners
from .configuration_hivilt import code_in_place
from .encoders_hivilt import end_token

logger = logging.get_logger(__name__)

MAX_RATIO = 32  # of an image longer than this many times its other side only the middle is resized
OVERSHOOT = 1e-3  # how far rounding may take floats out of 0 to 1
MAX_OVERLAP = 0.5  # of boxes that are two things: intersection over union
BYTES, FROM_BYTES = (bytes, bytearray, memoryview), "give PIL.Image.open(io.BytesIO(content))"


class HiViLTProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": True, "truncation": True}}


def load_image(
    image: str | os.PathLike | Image.Image | np.ndarray | torch.Tensor, input_data_format: str | None = None
) -> Image.Image:
    """Opens an image as people see it: turned as its EXIF data says, in RGB, on white where it is transparent. An image
    in memory that is so already is returned itself.

    Arrays and tensors have shape `(height, width)`, or channels first or last: 1, 3 or 4 (RGBA) of them. Where both ends
    could be channels, an array has them last and a tensor first, unless `input_data_format` says `"channels_first"` or
    `"channels_last"`. Their values say what they are, by one rule:

    - `bool`: `False` is 0 and `True` 255;
    - integers: as they are up to 255; where there are larger ones, the upper 8 of 16 bits are taken (values up to 511 only
      of `uint16`: others are of 8 bits and were made brighter);
    - floats from 0 to 1, as `ToTensor` gives them: 1 is 255;
    - floats that are all whole numbers: as integers.

    Images of the modes I, I;16 and F go by the same rule; those of mode F may hold fractions, if any is above 2.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the image is unreadable, an array has not the shape or the values of one (negative, NaN, fractions
            above 1), or the name is a web address, which is never fetched.
        TypeError: something else, encoded bytes among it.
    """
    if isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
        shown = repr(name if len(name) < 300 else f"{name[:40]}...")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
            raise ValueError(f"Images are not fetched from the web: download {name} and give the file's path.")
        if not os.path.isfile(name):  # Path.is_file raises, for a folder that may not be looked into
            raise FileNotFoundError(
                f"There is no image file {shown}; check the path and the working directory. `~` is not expanded; of an "
                f"image's content {FROM_BYTES}."
            )
        try:
            with Image.open(name) as opened:
                return _as_seen(opened)
        except Exception as error:
            raise unreadable(repr(name), error) from error
    if _is_array(image):
        image = Image.fromarray(np.ascontiguousarray(_levels(_channels_last(image, input_data_format))))
    if not isinstance(image, Image.Image):
        came = type(image).__name__ + (f"; {FROM_BYTES}" if isinstance(image, BYTES) else "")
        raise TypeError(f"An image must be a file's path, a PIL image, or an array or tensor of numbers, got {came}.")
    try:
        return _as_seen(image)
    except Exception as error:
        raise unreadable(repr(getattr(image, "filename", "") or "a PIL image"), error) from error


def unreadable(what: str, error: Exception) -> ValueError:
    """What to raise for an image that cannot be decoded, for which decoders raise errors of any type."""
    return ValueError(f"{what} is not a readable image ({error or type(error).__name__}); replace or remove it.")


def _as_seen(image: Image.Image) -> Image.Image:
    if image.format == "EPS":  # a program in PostScript, which PIL would have Ghostscript run
        raise ValueError("EPS is not read")
    image.load()  # its file may be closed after this
    # Turning and converting copy, even where there is nothing to do.
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        # A plain conversion would cut everything above 255 to white.
        image = Image.fromarray(_levels(np.asarray(image), from_file=True))
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # PIL takes two steps there
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_array(value) -> bool:
    """Whether it is a tensor or an array of any library."""
    return isinstance(value, torch.Tensor) or (hasattr(value, "__array__") and hasattr(value, "dtype"))


def _as_numpy(value) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    return np.asarray(value)


def _channels_last(array, input_data_format: str | None) -> np.ndarray:
    """An image's values, `(height, width)` or `(height, width, channels)`, with 3 or 4 channels."""
    values = _as_numpy(array)
    if values.ndim == 3 and 0 not in values.shape:
        # Photographs have three channels; of two ways to see as many, each library's own.
        ends = (0, 2) if isinstance(array, torch.Tensor) else (2, 0)
        if input_data_format is not None:
            ends = (0,) if "first" in str(getattr(input_data_format, "value", input_data_format)) else (2,)
        for channels in (3, 1, 4):
            for end in ends:
                if values.shape[end] == channels:
                    return values.squeeze(end) if channels == 1 else np.moveaxis(values, end, 2)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(
            "An image as an array or tensor must have shape (height, width), (channels, height, width) or (height, "
            f"width, channels), with 1, 3 or 4 channels, got {tuple(array.shape)}."
        )
    return values


def _prepared(array, input_data_format: str | None, is_resized: bool) -> np.ndarray:
    """Values that are scaled already, channels first; refuses those that PIL is to resize and cannot."""
    values = _channels_last(array, input_data_format)
    low, high = float(values.min()), float(values.max())  # NaN if there is one
    is_sound = np.isfinite([low, high]).all() and (not is_resized or 0 <= low <= high <= 1)
    if values.ndim != 3 or values.shape[2] != 3 or not is_sound:
        raise ValueError(
            "Floats that are taken as they are (do_rescale=False) must have three channels and be finite, and lie in [0, 1] "
            f"where they are resized; got shape {tuple(array.shape)} from {low:.6g} to {high:.6g}. Give others in the size that "
            "the model takes, and do_resize=False, do_center_crop=False; do_normalize=False, too, if they are normalized."
        )
    return np.moveaxis(values, 2, 0)


def _levels(values: np.ndarray, from_file: bool = False) -> np.ndarray:
    """The values of an image as `uint8`, by the rule of [`load_image`]."""
    kind = values.dtype.kind
    if kind == "b":
        return values * np.uint8(255)
    if values.dtype == np.uint8:
        return values
    if kind not in "iuf":
        raise TypeError(f"An image as an array must hold numbers, got {values.dtype}.")
    low, high = float(values.min()), float(values.max())  # NaN if there is one
    if kind == "f" and low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        return np.rint(values.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
    # Fractions that reach a little above 1 are of an image from 0 to 1 that was resized, or normalized.
    has_fractions = kind == "f" and not (from_file and high > 2) and (values != np.rint(values)).any()
    # As 16 bits it would be black.
    is_brightened = 255 < high < 512 and not from_file and values.dtype != np.uint16
    if not 0 <= low <= high < 2**16 or has_fractions or is_brightened:
        raise ValueError(
            "An image's values must be integers from 0 to 255 (or to 65,535: 16 bits) or floats from 0 to 1, got "
            f"{values.dtype} from {low:.6g} to {high:.6g}. Clip or scale them; give low values of 16 bits as uint16, and "
            "values that are scaled and normalized already with do_rescale=False, do_normalize=False, do_resize=False."
        )
    if 255 < high < 2**14:
        logger.warning_once(
            f"An image's values reach {high:.0f}, which is dark of 16 bits. Of 10 or 12 bits they are to be scaled: give "
            "`values / 1023` or `values / 4095`, floats from 0 to 1."
        )
    return np.rint(values).astype(np.uint8) if high <= 255 else (values.astype(np.int64) >> 8).astype(np.uint8)


def _in_lists(values, length: int):
    """Rows of an array or of a list, `(rows * length, ...)` -> `(rows, length, ...)`."""
    if _is_array(values):
        return values.reshape(-1, length, *values.shape[1:])
    return [values[start : start + length] for start in range(0, len(values), length)]


def well_formed(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_usual(image_processor) -> bool:
    """Whether it is one of transformers' that resize with PIL, crop, rescale and normalize, and do nothing else."""
    kind = type(image_processor)
    return (
        issubclass(kind, PilBackend)
        and kind._preprocess is PilBackend._preprocess
        and kind.resize is PilBackend.resize
        # Set since, as a dict or a number, it is for the image processor itself to read.
        and isinstance(image_processor.size, SizeDict)
        and isinstance(image_processor.resample, int)
        and not image_processor.do_pad
    )


def _height_and_width(size: Iterable[float]) -> tuple[float, float]:
    try:
        height, width = map(float, size)
    except (TypeError, ValueError):
        height = width = 0.0
    if not (0 < height < float("inf") and 0 < width < float("inf")):
        raise ValueError(
            f"`target_sizes` must hold (height, width) in pixels, both above 0, got {size!r:.200}; of a PIL image give "
            "(image.height, image.width)."
        )
    return height, width


class HiViLTProcessor(ProcessorMixin):
    """Joins an image processor and a tokenizer.

    Args:
        image_processor: any transformers image processor that gives `pixel_values`.
        tokenizer: any transformers tokenizer; its `model_max_length` is where texts are cut.
    """

    valid_processor_kwargs = HiViLTProcessorKwargs
    _told_of_truncation = False
    _told_of_unknown = False
    _shows_whole_images = None  # the settings with which the image processor was seen to

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        # Answers by label, and whether they exclude each other: of the config beside it, the only place that says so.
        self.id2label = self.problem_type = None
        if tokenizer is not None and "attention_mask" not in tokenizer.model_input_names:
            # SigLIP's names none, and its padding would be words. A copy: elsewhere it goes on without.
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
        super().__init__(image_processor, tokenizer, **kwargs)

    # For pipelines, whose code is of a checkpoint while this one's may be of the package.
    load_image = staticmethod(load_image)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | list[list[str]] | None = None,
        **kwargs: Unpack[HiViLTProcessorKwargs],
    ) -> BatchFeature:
        """Prepares images, texts, or both.

        ```python
        processor(images=image, text="what is it?")                                   # one of each
        processor(images=[image, other], text=["what is it?", "is it red?"])          # row by row
        processor(images=image, text=["what is it?", "is it red?"])                   # two about one image
        processor(images=[image, other], text=[["what is it?", "is it red?"], ["where?"]])
        processor(images=[[image, other]], text="both are red")                       # one about two images
        processor(images=[[image, other], [image, third]], text=["both are red", "one is red"])
        ```

        Where each text has images of its own, as in the first, second and fifth, texts can be encoded row by row and stacked by
        any collator: pad to one length for that (`padding="max_length", max_length=24`), or let
        `DataCollatorWithPadding(processor.tokenizer)` pad. The others are batches by themselves: `image_index` counts the
        images of this call, so they are not to be joined.

        Args:
            images: an image or a list of them, each once: file paths, PIL images, arrays or tensors, as [`load_image`]
                opens them. An array or tensor with 4 dimensions is a batch. `[[image], [other]]` is `[image, other]`. For texts
                about several images a list of lists, as many in each; one that several lists share, the same object or path, is
                prepared once.
            text: one text; one for each image; several for the only image; or for each image a list of its texts; likewise for
                lists of images.
            **kwargs: of the image processor and the tokenizer, flat or in `images_kwargs` and `text_kwargs`. By default
                texts are padded to the longest and cut at the tokenizer's `model_max_length`, with one warning. With
                `do_rescale=False`, here or as the image processor's own, floats go to it as they are, whatever their
                range; add `do_resize=False` unless they are from 0 to 1.

        Returns:
            `input_ids`, `attention_mask` (and what else the tokenizer gives) with one row a text, `pixel_values` with
            one row an image, and `image_index`, the image of each text, `(texts,)`, or its `n` images, `(texts, n)`. Without
            `image_index` each text has images of its own, in order; those of a list of texts with `n` each come as
            `(texts, n, channels, height, width)`.

        Raises:
            ValueError: neither is given, a text is empty, they do not pair up, lists of images are not of one length, or as
                [`load_image`].
            TypeError, FileNotFoundError: a text is no string, or as [`load_image`].
        """
        if images is None and text is None:
            raise ValueError("Give the processor `images`, `text`, or both.")
        merged = self._merge_kwargs(HiViLTProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        images, lists = (None, None) if images is None else self._flatten_images(images)
        inputs, image_index = {}, None
        if text is not None:
            num_rows = None if images is None else len(lists or images)
            texts, image_index = self._flatten(text, num_rows, "lists of images" if lists else "images")
            inputs = self.tokenizer(texts[0] if isinstance(text, str) else texts, **merged["text_kwargs"])
            self._tell_of_truncation(inputs, len(texts), merged["text_kwargs"].get("max_length"))
            self._tell_of_unknown(inputs, texts)
        if lists:
            image_index = [lists[row] for row in image_index or range(len(lists))]
            if len(lists) == len(image_index) == 1:
                # One that occurs twice comes twice, so that such rows can be stacked.
                images, image_index = [images[place] for place in lists[0]], None
            elif sum(image_index, []) == list(range(len(images))):
                image_index = None
        if images is not None:
            prepared = self._prepare_images(images, merged["images_kwargs"])
            if lists and image_index is None and text is not None and not isinstance(text, str):
                prepared = {name: _in_lists(values, len(lists[0])) for name, values in prepared.items()}
            inputs = {**prepared, **inputs}
            if image_index is not None:
                inputs["image_index"] = image_index
        return BatchFeature(inputs, tensor_type=merged["text_kwargs"].get("return_tensors"))

    def resize(self, image: Image.Image) -> Image.Image:
        """An image with the pixels that the image processor resizes it to; as it was, where that has a way of its own.

        Calling the processor does so too. Where it is done as soon as an image is opened, only one is in memory at full size.
        """
        processor, size = self.image_processor, image.size
        if _is_usual(processor) and processor.do_resize:
            if processor.size.shortest_edge and not processor.size.longest_edge:
                longest = MAX_RATIO * min(size)
                if processor.do_center_crop and max(size) > longest:
                    # A line of 1 by 60,000 pixels would be resized to gigabytes, of which the middle is kept.
                    left, top = (max(side - longest, 0) // 2 for side in size)
                    image = image.crop((left, top, size[0] - left, size[1] - top))
                    size = image.size
                size = tuple(int(processor.size.shortest_edge * side / min(size)) for side in size)
            elif processor.size.height and processor.size.width:
                size = processor.size.width, processor.size.height
        return image if size == image.size else image.resize(size, processor.resample)

    def _prepare_images(self, images: list, kwargs: dict) -> Mapping:
        """What the image processor gives, to the last bit, for half of its work where that is usual."""
        processor = self.image_processor
        data_format = kwargs.pop("input_data_format", None)
        do_resize, do_rescale = (
            getattr(processor, name, None) if kwargs.get(name) is None else kwargs[name]
            for name in ("do_resize", "do_rescale")
        )
        scaled = [do_rescale is False and _is_array(image) and _as_numpy(image).dtype.kind == "f" for image in images]
        usual = not kwargs.keys() - {"return_tensors"} and _is_usual(processor) and not any(scaled)
        for place, image in enumerate(images):
            if scaled[place]:
                images[place] = _prepared(image, data_format, isinstance(processor, PilBackend) and do_resize)
            else:
                image = load_image(image, data_format)
                # At once, so that only one is in memory at its full size.
                images[place] = self.resize(image) if usual else image
        if not usual:
            return processor(images, **kwargs)

        # It would make arrays of whole images to resize, and normalize in float64: of 256 values a table does as well.
        levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert("RGB")
        # (3, 1, 256) -> (3, 256)
        table = processor(levels, do_resize=False, do_center_crop=False)["pixel_values"][0][:, 0]
        pixels = processor(images, do_rescale=False, do_normalize=False)["pixel_values"]
        if len({image.shape for image in pixels}) > 1:
            return processor(images, **kwargs)  # no batch; it says so itself
        values = np.empty((len(pixels), *pixels[0].shape), table.dtype)
        for value, image in zip(values, pixels, strict=True):
            for channel in range(3):
                table[channel].take(image[channel], out=value[channel], mode="clip")  # straight into the batch
        return {"pixel_values": values}

    @staticmethod
    def _flatten_images(images: ImageInput) -> tuple[list, list[list[int]]]:
        """All images in one list, and the places in it of those of each list of several; no lists where there are none."""
        if _is_array(images):
            images = list(images) if images.ndim in (1, 4) else [images]
        if not isinstance(images, Sequence) or isinstance(images, (str, *BYTES)):
            images = [images]
        groups = [list(image) if isinstance(image, (list, tuple)) else [image] for image in images]
        lengths = [len(group) for group in groups]
        if len(set(lengths)) > 1:
            other = next(place for place, length in enumerate(lengths) if length != lengths[0])
            raise ValueError(
                f"`images` must hold lists of as many images each, but has {lengths[0]} at position 0 and {lengths[other]} at "
                f"position {other}. Give each text all its images, and texts about another number of images in another call."
            )
        if lengths and lengths[0] > 1:
            keys = [
                [os.fspath(image) if isinstance(image, (str, os.PathLike)) else id(image) for image in group]
                for group in groups
            ]
            once = dict(zip(sum(keys, []), sum(groups, []), strict=True))
            places = {key: place for place, key in enumerate(once)}
            return list(once.values()), [[places[key] for key in row] for row in keys]
        flat = []
        for image in sum(groups, []):
            flat += list(image) if _is_array(image) and image.ndim == 4 else [image]
        if not flat:
            raise ValueError("`images` is an empty list; give at least one image.")
        return flat, []

    @staticmethod
    def _flatten(
        text: str | list[str] | list[list[str]], num_rows: int | None, rows: str
    ) -> tuple[list[str], list[int] | None]:
        """All texts in one list, and the row of each, an image or a list of images; `None` where they pair with these."""
        if not isinstance(text, Iterable) or isinstance(text, (Mapping, Set)):
            raise TypeError(
                f"`text` must be a string, a list of strings, or a list of lists of strings, got {type(text).__name__}."
            )
        nested = [text] if isinstance(text, str) else list(text)
        if nested and all(isinstance(group, (list, tuple)) for group in nested):
            groups = nested
        elif num_rows == 1 or num_rows is None:
            groups = [nested]
        else:
            groups = [[single] for single in nested]
        if num_rows is not None and len(groups) != num_rows:
            what = "lists of texts" if groups is nested else "texts"
            raise ValueError(
                f"{len(groups)} {what} cannot be paired with {num_rows} {rows}. Give one text for each of them, or "
                'for each a list of its texts: `text=[["first question", "second question"], ["third"]]`.'
            )
        texts = [single for group in groups for single in group]
        for position, single in enumerate(texts):
            if not isinstance(single, str):
                raise TypeError(f"`text` must hold strings, got {type(single).__name__} at position {position}.")
            if not single.strip():
                raise ValueError(f"The text at position {position} is empty; there is nothing to ask.")
        if not texts:
            raise ValueError("`text` is an empty list; give at least one text.")
        row_index = [row for row, group in enumerate(groups) for _ in group]
        paired = row_index == list(range(num_rows or 0))
        return [well_formed(single) for single in texts], None if paired else row_index

    def tokenize_targets(self, texts: str | list[str]) -> torch.LongTensor:
        """The `labels` of texts, or of one, that a decoder is to write, `(texts, N_d)`: their tokens and the one that ends a
        text, -100 after it. A text that is too long for the tokenizer is cut.

        Raises:
            ValueError: the tokenizer has no token that ends a text.
        """
        tokenizer = self.tokenizer
        if (end := end_token(tokenizer)) is None:
            raise ValueError(
                f"The {type(tokenizer).__name__} has no `eos_token` or `sep_token` to end texts with; name one."
            )
        texts = [texts] if isinstance(texts, str) else texts
        tokens = tokenizer([well_formed(text) for text in texts], add_special_tokens=False)["input_ids"]
        labels = [torch.tensor([*ids[: tokenizer.model_max_length - 1], end]) for ids in tokens]
        return torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)

    def _tell_of_truncation(self, tokens, num_texts: int, max_length: int | None) -> None:
        num_cut = sum(bool(encoding.overflowing) for encoding in tokens.encodings or ())
        if num_cut and not HiViLTProcessor._told_of_truncation:
            HiViLTProcessor._told_of_truncation = True
            limit = f"the {max_length} tokens of `max_length`"
            if max_length is None:
                limit = f"{self.tokenizer.model_max_length} tokens, the tokenizer's `model_max_length`"
            logger.warning(f"{num_cut} of {num_texts} texts were cut to {limit}. Later cuts are not reported.")

    def _tell_of_unknown(self, tokens, texts: list[str]) -> None:
        unknown = self.tokenizer.unk_token_id
        if unknown is None or HiViLTProcessor._told_of_unknown:
            return
        for text, encoding in zip(texts, tokens.encodings or (), strict=False):
            if unknown in (ids := encoding.ids):
                HiViLTProcessor._told_of_unknown = True
                start, end = encoding.offsets[ids.index(unknown)]
                logger.warning(
                    f"The tokenizer does not know {text[start:end]!r} in {text!r}, so the model does not see what it is. Later "
                    "ones are not reported."
                )
                return

    def post_process_question_answering(
        self,
        logits: torch.Tensor,
        top_k: int = 1,
        id2label: dict[int, str] | None = None,
        multi_label: bool | None = None,
        config: PreTrainedConfig | None = None,
    ) -> list[list[dict[str, str | float]]]:
        """Turns scores into answers: for each text the `top_k` best, as `{"answer": str, "score": float}`, best first.

        Args:
            logits: tensor or array of shape `(texts, num_labels)`, or a model output that has them.
            id2label: the answers; unset, those of the config.
            multi_label: whether each answer was learnt by itself, so that probabilities are sigmoids and need not sum to
                one, otherwise a softmax. Unset, whether the config's `problem_type` is `"multi_label_classification"`; where
                no config is known a softmax, which a warning tells once.
            config: of the model that the scores are of; unset, the one that was saved with this processor. Give it of a model
                whose answers were changed since.

        Raises:
            ValueError: the answers are not known, or are not as many as the scores.
        """
        logits = getattr(logits, "logits", logits)
        logits = torch.from_numpy(logits) if isinstance(logits, np.ndarray) else logits  # as Trainer predicts
        known = self if config is None else config
        id2label = known.id2label if id2label is None else id2label
        if multi_label is None:
            if config is None and known.problem_type is None and id2label is not None:
                logger.warning_once(
                    "`id2label` does not tell whether several answers may be right, so that probabilities sum to one here: "
                    "give `config=model.config`, which does, or `multi_label`."
                )
            multi_label = known.problem_type == "multi_label_classification"
        if id2label is None:
            raise ValueError(
                "There are no answers to name: this processor was loaded without the config of a question answering "
                "checkpoint. Open one, or give `config=model.config` of the model that the scores are of."
            )
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[1] != len(id2label):
            raise ValueError(
                f"`logits` must have shape (texts, {len(id2label)}), one score for each answer of `id2label`, got "
                f"{tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__}."
            )
        logits = logits.float()
        probabilities = logits.sigmoid() if multi_label else logits.softmax(dim=-1)
        # Ordered by the scores: of probabilities the smallest are all 0 and the largest sigmoids all 1.
        labels = logits.topk(min(max(top_k, 1), logits.shape[1]), dim=-1).indices
        scores = probabilities.gather(1, labels)
        return [
            [{"answer": id2label[label], "score": score} for label, score in zip(*row, strict=True)]
            for row in zip(labels.tolist(), scores.tolist(), strict=True)
        ]

    def post_process_grounding(
        self,
        outputs: Mapping | Sequence,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        threshold: float = 0.5,
        top_k: int | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Turns what [`HiViLTForVisualGrounding`] gives into the boxes that each text means.

        Args:
            outputs: a model output with `logits` `(texts, rows)` and `pred_boxes` `(texts, rows, 4)`, or these two alone, as
                tensors or arrays.
            target_sizes: `(height, width)` of each text's image in pixels, as people see it: [`load_image`] turns it as its
                EXIF data says. Unset, boxes are in parts of the image.
            threshold: a box whose score is not above it is left out, in [0, 1].
            top_k: most boxes of each text. Unset, all.

        Returns:
            For each text a dict of `scores` `(n,)` in [0, 1] and `boxes` `(n, 4)`, left, top, right and bottom, float32 on the
            CPU, the best first; `n` may be 0. A box whose IoU with a better one is above 0.5 is left out.

        Raises:
            ValueError: outputs are of another shape or not finite, sizes are not as many as texts, or as
                [`HiViLTProcessor.check_whole_images`].
        """
        self.check_whole_images()
        given = [outputs.get(name) for name in ("logits", "pred_boxes")] if isinstance(outputs, Mapping) else outputs
        logits, boxes, *others = (torch.as_tensor([] if one is None else one).detach().float().cpu() for one in given)
        if others or logits.dim() != 2 or boxes.shape != (*logits.shape, 4):
            raise ValueError(
                "`outputs` must have `logits` (texts, rows) and `pred_boxes` (texts, rows, 4), as `HiViLTForVisualGrounding` "
                f"gives them; got shapes {', '.join(str(tuple(one.shape)) for one in (logits, boxes, *others))}."
            )
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            raise ValueError("`outputs` are not finite: look for such values in the weights and in the images.")
        if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be a number in [0, 1], got {threshold!r}.")
        if top_k is not None and not (isinstance(top_k, Integral) and top_k >= 1):
            raise ValueError(f"`top_k` must be a whole number from 1 on, or None for all boxes, got {top_k!r}.")
        if target_sizes is not None and len(target_sizes) != len(logits):
            raise ValueError(
                f"`target_sizes` must hold the (height, width) of the image of each of the {len(logits)} texts, got "
                f"{len(target_sizes)}. An image that several texts are about comes as often."
            )
        sizes = [_height_and_width(size) for size in (() if target_sizes is None else target_sizes)]
        found = []
        for row, (scores, corners) in enumerate(zip(logits.sigmoid(), to_corners(boxes).clamp(0, 1), strict=True)):
            # By the logits: of the largest, scores are all 1.
            order = logits[row].argsort(descending=True, stable=True)
            order = order[scores[order] > threshold]
            kept = order[suppress(corners[order], MAX_OVERLAP, top_k)]
            corners = corners[kept]
            if target_sizes is not None:
                height, width = sizes[row]
                corners = corners * torch.tensor([width, height, width, height])
            found.append({"scores": scores[kept], "boxes": corners})
        return found

    def check_whole_images(self) -> None:
        """Refuses an image processor that crops or pads, given an image that says its own places: boxes in parts of the image
        would lie elsewhere in `pixel_values`. To squash an image leaves them where they are.

        Raises:
            ValueError: a part of the image is not seen, or more than it; names the image processor's own flag, if it has one.
        """
        processor = self.image_processor
        settings = processor.to_json_string()
        if settings == self._shows_whole_images:
            return
        width, height = 192, 128
        across, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
        ramps = Image.fromarray(np.rint(255 * np.stack([across, down, across], axis=-1)).astype(np.uint8))
        plain = [Image.new("RGB", ramps.size, color) for color in ("black", "white")]
        seen = self(images=[*plain, ramps], return_tensors="pt")["pixel_values"].double().numpy()
        # It pads images to the largest of a batch, and these are all alike.
        if seen.ndim == 4 and not getattr(processor, "do_pad", None):
            rows, columns = seen.shape[2:]
            # Whatever normalizes them, what black and white become says how far from the left and the top each pixel is.
            black, white = seen[:2, :2, rows // 2, columns // 2, None, None]
            places = (seen[2, :2] - black) / (white - black)
            expected = np.meshgrid((np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows)
            # 256 levels and the edges of a resized image are good for less than a hundredth.
            if np.abs(places - np.stack(expected)).max() < 0.015:
                self._shows_whole_images = settings
                return
        flags = [name for name in ("do_center_crop", "do_pad") if getattr(processor, name, None)]
        changes = dict.fromkeys(flags, False)
        if "do_center_crop" in flags and {"height", "width"} <= (crop := dict(processor.crop_size)).keys():
            changes["size"] = {side: crop[side] for side in ("height", "width")}
        way_out = (
            f"Give it {json.dumps(changes)}" if flags else "Take one that squashes them, such as ViTImageProcessor"
        )
        raise ValueError(
            f"image_processor: {type(processor).__name__} crops or pads images"
            f"{', by ' + ' and '.join(flags) if flags else ''}, so boxes would lie elsewhere in what the model sees. {way_out}."
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "HiViLTProcessor":
        """Loads as every processor does, and reads the answers and their kind from the config beside it, if there is one."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        try:
            config, _ = PreTrainedConfig.get_config_dict(
                pretrained_model_name_or_path, **{name: kwargs[name] for name in hub if name in kwargs}
            )
        except OSError:
            return processor  # saved by itself
        if config.get("id2label") is not None:
            processor.id2label = {int(label): answer for label, answer in config["id2label"].items()}
        processor.problem_type = config.get("problem_type")
        return processor

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Saves as every processor does, with its code; also into the folder that this very code runs from."""
        with code_in_place(self, save_directory):
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


HiViLTProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["HiViLTProcessor"]
