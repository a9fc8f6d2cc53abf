"""HiViLT processor: pictures and texts in, model inputs out; scores in, answers out."""

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import logging

from .configuration_hivilt import code_in_place

logger = logging.get_logger(__name__)

# Of a picture longer than this many times its other side only the middle is resized, where a square is cut out of it.
MAX_RATIO = 32


class HiViLTProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": True, "truncation": True}}


def load_picture(picture: str | os.PathLike | Image.Image | np.ndarray) -> Image.Image:
    """
    Opens a picture as people see it: turned as its EXIF data says, in RGB, on white where it is transparent. One that is
    so already is returned as it is, in memory.

    Args:
        picture (`str` or `os.PathLike` of a local file, `PIL.Image.Image`, or `numpy.ndarray` of `uint8`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no readable picture, the array has not the shape of one, or the name is a web address, which is
            never fetched.
        TypeError: something else.
    """
    if isinstance(picture, (str, os.PathLike)):
        name = os.fspath(picture)
        if name.startswith(("http://", "https://")):
            raise ValueError(f"Pictures are not fetched from the web: download {name} and give the file's path.")
        if not os.path.isfile(name):  # Path.is_file raises, for a folder that may not be looked into
            raise FileNotFoundError(f"There is no picture file {name!r}; check the path and the working directory.")
        try:
            with Image.open(name) as opened:
                return _as_seen(opened)
        except Exception as error:
            raise unreadable(repr(name), error) from error
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8:
        if picture.ndim != 2 and (picture.ndim != 3 or picture.shape[2] not in (3, 4)) or 0 in picture.shape:
            raise ValueError(
                "An array must have shape (height, width), (height, width, 3) or (height, width, 4), got "
                f"{picture.shape}."
            )
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        what = f"{type(picture).__name__} of {picture.dtype}" if hasattr(picture, "dtype") else type(picture).__name__
        raise TypeError(f"A picture must be a file's path, a PIL image or an array of uint8, got {what}.")
    try:
        return _as_seen(picture)
    except Exception as error:
        raise unreadable(repr(getattr(picture, "filename", "") or "a PIL image"), error) from error


def unreadable(what: str, error: Exception) -> ValueError:
    """What to raise for a picture that cannot be decoded. Decoders raise whatever damaged data make them stumble on:
    OSError and SyntaxError, but IndexError, RuntimeError or AssertionError too."""
    return ValueError(f"{what} is not a readable picture ({error or type(error).__name__}); replace or remove it.")


def _as_seen(picture: Image.Image) -> Image.Image:
    if picture.format == "EPS":
        # A program in PostScript, which PIL would have Ghostscript run.
        raise ValueError("EPS is not read")
    picture.load()  # its file may be closed after this
    # Turning and converting copy, even where there is nothing to do.
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        # 16 bits a pixel: a plain conversion would cut everything above 255 to white.
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def well_formed(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_usual(image_processor) -> bool:
    """Whether it is one of transformers' that resize with PIL, crop, rescale and normalize, and do nothing else."""
    kind = type(image_processor)
    usual = issubclass(kind, PilBackend) and kind._preprocess is PilBackend._preprocess
    usual = usual and kind.resize is PilBackend.resize
    return usual and isinstance(image_processor.resample, int) and not image_processor.do_pad


class HiViLTProcessor(ProcessorMixin):
    """
    Joins an image processor and a tokenizer.

    Args:
        image_processor: any transformers image processor that gives `pixel_values`.
        tokenizer: any transformers tokenizer; its `model_max_length` is where texts are cut.
    """

    valid_processor_kwargs = HiViLTProcessorKwargs
    _told_of_truncation = False

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        # Answers by label, read from the checkpoint's config so that there is but one place that names them.
        self.id2label = None
        super().__init__(image_processor, tokenizer, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "image_index"]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | list[list[str]] | None = None,
        **kwargs: Unpack[HiViLTProcessorKwargs],
    ) -> BatchFeature:
        """
        Prepares pictures, texts, or both.

        Args:
            images (a picture or a list of them, *optional*): file paths, PIL images, `uint8` arrays; each once.
            text (`str`, `list[str]` or `list[list[str]]`, *optional*): one text; one for each picture; several for the
                only picture; or for each picture a list of its texts.
            **kwargs: of the image processor and the tokenizer, flat or in `images_kwargs` and `text_kwargs`. By default
                texts are padded to the longest and cut at the tokenizer's `model_max_length`, with one warning.

        Returns:
            `input_ids`, `attention_mask` (and what else the tokenizer gives) with one row a text, `pixel_values` with
            one row a picture, and with both of them `image_index` `(texts,)`, the picture of each text.

        Raises:
            ValueError: neither is given, a text is empty, a picture is unreadable, or they do not pair up.
            TypeError, FileNotFoundError: a text is no string, a picture is no picture or not there.
        """
        if images is None and text is None:
            raise ValueError("Give the processor `images`, `text`, or both.")
        merged = self._merge_kwargs(HiViLTProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        inputs = {}
        if images is not None:
            several = isinstance(images, Sequence) and not isinstance(images, str)
            pictures = list(images) if several else [images]
            if not pictures:
                raise ValueError("`images` is an empty list; give at least one picture.")
        if text is not None:
            texts, image_index = self._flatten(text, len(pictures) if images is not None else None)
            tokens = self.tokenizer(texts[0] if isinstance(text, str) else texts, **merged["text_kwargs"])
            self._tell_of_truncation(tokens, len(texts), merged["text_kwargs"].get("max_length"))
            inputs.update(tokens)
        if images is not None:
            inputs.update(self._prepare_pictures(pictures, merged["images_kwargs"]))
            if text is not None:
                inputs["image_index"] = image_index
        return BatchFeature(inputs, tensor_type=merged["text_kwargs"].get("return_tensors"))

    def resize(self, picture: Image.Image) -> Image.Image:
        """
        A picture as the image processor resizes it. Calling the processor does so too; done to each picture as soon as
        it is opened, only one at a time is in memory at its full size.

        Returns:
            The same pixels as the image processor gets; where it resizes in a way of its own, the picture as it was.
        """
        processor, size = self.image_processor, picture.size
        if _is_usual(processor) and processor.do_resize:
            if processor.size.shortest_edge and not processor.size.longest_edge:
                longest = MAX_RATIO * min(size)
                if processor.do_center_crop and max(size) > longest:
                    # A line of 1 by 60,000 pixels would be resized to gigabytes, of which the middle is kept.
                    sides = [min(side, longest + (side - longest) % 2) for side in size]
                    left, top = ((old - new) // 2 for old, new in zip(size, sides, strict=True))
                    picture = picture.crop((left, top, left + sides[0], top + sides[1]))
                    size = picture.size
                size = tuple(int(processor.size.shortest_edge * side / min(size)) for side in size)
            elif processor.size.height and processor.size.width:
                size = processor.size.width, processor.size.height
        return picture if size == picture.size else picture.resize(size, processor.resample)

    def _prepare_pictures(self, pictures: list, kwargs: dict) -> Mapping:
        """
        What the image processor gives, to the last bit, for half of its work where that is usual.

        Image processors that need no torchvision make an array of a whole picture only to resize it as a picture again,
        and normalize in float64. Here it is resized as it is, and a table, which the image processor fills, has the
        normalized value of each of the 256 that a pixel can have.
        """
        processor = self.image_processor
        special = kwargs.keys() - {"return_tensors"} or any(isinstance(p, torch.Tensor) for p in pictures)
        if special or not _is_usual(processor):
            # Tensors are taken to be prepared already, as image processors take them.
            pictures = [p if isinstance(p, torch.Tensor) else load_picture(p) for p in pictures]
            return processor(pictures, **kwargs)

        pictures = [self.resize(load_picture(p)) for p in pictures]
        levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert("RGB")
        # (3, 1, 256) -> (3, 256)
        table = processor(levels, do_resize=False, do_center_crop=False)["pixel_values"][0][:, 0]
        pixels = processor(pictures, do_rescale=False, do_normalize=False)["pixel_values"]
        if len({picture.shape for picture in pixels}) > 1:
            return processor(pictures, **kwargs)  # no batch; it says so itself
        values = np.empty((len(pixels), *pixels[0].shape), table.dtype)
        for value, picture in zip(values, pixels, strict=True):
            for channel in range(3):
                table[channel].take(picture[channel], out=value[channel], mode="clip")  # straight into the batch
        return {"pixel_values": values}

    @staticmethod
    def _flatten(text: str | list[str] | list[list[str]], num_images: int | None) -> tuple[list[str], list[int]]:
        """All texts in one list, and the picture of each."""
        if not isinstance(text, Iterable):
            raise TypeError(
                f"`text` must be a string, a list of strings, or a list of lists of strings, got {type(text).__name__}."
            )
        nested = [text] if isinstance(text, str) else list(text)
        if nested and all(isinstance(group, (list, tuple)) for group in nested):
            groups = nested
        elif num_images == 1 or num_images is None:
            groups = [nested]
        else:
            groups = [[single] for single in nested]
        if num_images is not None and len(groups) != num_images:
            what = "lists of texts" if groups is nested else "texts"
            raise ValueError(
                f"{len(groups)} {what} cannot be paired with {num_images} pictures. Give one text for each picture, or "
                'for each picture a list of its texts: `text=[["first question", "second question"], ["third"]]`.'
            )
        texts = [well_formed(single) if isinstance(single, str) else single for group in groups for single in group]
        for position, single in enumerate(texts):
            if not isinstance(single, str):
                raise TypeError(f"`text` must hold strings, got {type(single).__name__} at position {position}.")
            if not single.strip():
                raise ValueError(f"The text at position {position} is empty; there is nothing to ask.")
        if not texts:
            raise ValueError("`text` is an empty list; give at least one text.")
        return texts, [index for index, group in enumerate(groups) for _ in group]

    def _tell_of_truncation(self, tokens, num_texts: int, max_length: int | None) -> None:
        num_cut = sum(bool(encoding.overflowing) for encoding in tokens.encodings or ())
        if num_cut and not HiViLTProcessor._told_of_truncation:
            HiViLTProcessor._told_of_truncation = True
            limit = (
                f"the {max_length} tokens of `max_length`"
                if max_length is not None
                else f"{self.tokenizer.model_max_length} tokens, the most that the tokenizer's `model_max_length` allows"
            )
            logger.warning(f"{num_cut} of {num_texts} texts were cut to {limit}. Later cuts are not reported.")

    def post_process_question_answering(
        self, logits: torch.Tensor, top_k: int = 1, id2label: dict[int, str] | None = None, multi_label: bool = False
    ) -> list[list[dict[str, str | float]]]:
        """
        Turns scores into answers.

        Args:
            logits (`torch.Tensor` of shape `(texts, num_labels)`, or a model output that has them): the scores.
            top_k (`int`, defaults to 1): how many answers to give for each text, best first.
            id2label (`dict[int, str]`, *optional*): the answers; unset, those of the config that was saved with this
                processor.
            multi_label (`bool`, defaults to `False`): the head was trained on soft labels, each answer by itself, so
                probabilities are sigmoids and need not sum to one; otherwise they are a softmax.

        Returns:
            For each text a list of `{"answer": str, "score": float}`.

        Raises:
            ValueError: the answers are not known, or are not as many as the scores.
        """
        logits = getattr(logits, "logits", logits)
        id2label = id2label if id2label is not None else self.id2label
        if id2label is None:
            raise ValueError("This processor was loaded without a config: give `id2label=model.config.id2label`.")
        if logits.dim() != 2 or logits.shape[1] != len(id2label):
            raise ValueError(
                f"`logits` must have shape (texts, {len(id2label)}), one score for each answer of `id2label`, got "
                f"{tuple(logits.shape)}."
            )
        probabilities = logits.float().sigmoid() if multi_label else logits.float().softmax(dim=-1)
        scores, labels = probabilities.topk(min(max(top_k, 1), logits.shape[1]), dim=-1)
        return [
            [{"answer": id2label[label], "score": score} for label, score in zip(*row, strict=True)]
            for row in zip(labels.tolist(), scores.tolist(), strict=True)
        ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "HiViLTProcessor":
        """Loads as every processor does, and reads the answers' names from the config beside it, if there is one."""
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
        return processor

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Saves as every processor does, with its code; also into the folder that this very code runs from."""
        with code_in_place(self, save_directory):
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


HiViLTProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["HiViLTProcessor", "load_picture"]
