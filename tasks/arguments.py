"""The flags of each task beside those of all: what `--help` lists, and so without models, data sets and Trainer, which take
seconds to import."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from hivilt.training.arguments import TaskArguments

# Each benchmark of a task, and the flags that it sets by itself; resolution, learning rates and epochs are in runs/.
_VQA_BENCHMARKS = {
    "easy-vqa": {"reword": 0.3, "dataloader_num_workers": 1},
    "vqav2": {"metric_for_best_model": "vqa_accuracy"},
    "gqa": {},
    "vizwiz": {"metric_for_best_model": "vqa_accuracy", "min_answer_count": 2},
    "textvqa": {"metric_for_best_model": "vqa_accuracy", "min_answer_count": 2},
    "ok-vqa": {"metric_for_best_model": "vqa_accuracy", "min_answer_count": 2},
    "vqa-rad": {},
    "clevr": {},
    "sort-of-clevr": {},
    "daquar": {},
}
# ALBEF, BLIP and those after them re-rank so many.
_CAPTION_BENCHMARKS = {
    "openmoji": {},
    "flickr30k": {"rerank_k": 128},
    "coco": {"rerank_k": 256},
    "flickr8k": {"rerank_k": 128},
    "textcaps": {},
    "vizwiz-captions": {},
}
_GROUNDING_BENCHMARKS = {
    "scenes": {},
    "refcoco": {},
    "refcoco+": {},
    "refcocog": {},
    "grefcoco": {},
    "flickr30k-entities": {"metric_for_best_model": "recall@1"},
    "daquar-grounding": {},
}
# Those that ask which text goes with which image are measured alone, on models of retrieval.
_MATCHING_BENCHMARKS = {"winoground": {"do_predict": True}, "sugarcrepe": {"do_predict": True}}
_REASONING_BENCHMARKS = {"pairs": {}, "flickr8k-pairs": {}, "nlvr2": {}, "nlvr": {}, **_MATCHING_BENCHMARKS}


def _check_drawn(args: TaskArguments) -> None:
    """Refuses places to read the task's own benchmark from, which is drawn, and images without a benchmark."""
    if args.benchmark == args.own_benchmark and (given := args.data_dir or args.dataset_name):
        raise ValueError(f"benchmark: {args.benchmark} are drawn and read from nowhere; leave out {given!r}.")
    if args.image_dir and not args.benchmark:
        raise ValueError("image_dir goes with a benchmark; paths in files of your own start at their folder.")


@dataclass
class GenerationArguments:
    """How a model writes."""

    decoder_model: str | None = HfArg(
        default=None, help="Pretrained decoder, of the same tokens as text_model. Unset: a small one from scratch."
    )
    num_beams: int | None = HfArg(
        default=None, help="Beams of the search for a text; 1: greedy. Unset: the checkpoint's, of a new model 3."
    )
    max_new_tokens: int | None = HfArg(
        default=None, help="Tokens of a text at most. Unset: the checkpoint's, of a new model 32, for answers 10."
    )
    no_repeat_ngram_size: int | None = HfArg(
        default=None, help="Tokens in a row that no text has twice; 0: any. Unset: the checkpoint's, of a new model 0."
    )

    counts = ("num_beams", "max_new_tokens")
    at_least_zero = ("no_repeat_ngram_size",)
    written = {"num_beams": 3, "max_new_tokens": 32, "no_repeat_ngram_size": 0}  # of a new model


@dataclass
class IndexArguments:
    """Which collection of images is searched or asked in place of training and measuring."""

    index: str | None = HfArg(
        default=None,
        help="Folder of images to encode once, into an index in output_dir; or an index. Unset: that in output_dir.",
    )
    states_gb: float | None = HfArg(
        default=10.0, help="Gigabytes that kept states of images may take; more is refused."
    )
    top_k: int = HfArg(default=10, help="Images of the index that are printed.")

    reads_index = ()  # the flags that ask the index for something

    def _check_index(self) -> None:
        given = [name for name in ("index", *self.reads_index) if getattr(self, name) is not None]
        if given and self.names_data():
            names = ", ".join(("index", *self.reads_index))
            raise ValueError(f"{names}: images of an index are no data to train or measure on; drop one or the other.")
        if self.states_gb is not None and not self.states_gb > 0:
            raise ValueError(f"states_gb: expected more than 0, got {self.states_gb}.")


@dataclass
class VQAArguments(GenerationArguments, IndexArguments, TaskArguments):
    """What only question answering has."""

    benchmark: str | None = HfArg(
        default=None,
        help="Data set of the field: of data_dir, dataset_name, or the Hub. Unset: easy-vqa, unless other data is named.",
        metadata={"choices": list(_VQA_BENCHMARKS)},
    )
    question_column: str = HfArg(default="question", help="Column of questions.")
    question_id_column: str | None = HfArg(default=None, help="Column copied to predictions.jsonl.")
    answer_column: str = HfArg(default="answer", help="Column of an answer, or of a list of them.")
    answer_file: str | None = HfArg(
        default=None,
        help="Answers to choose from, one a line or a JSON list. Unset: the benchmark's, or those of the training data.",
    )
    min_answer_count: int = HfArg(default=1, help="Leave rarer training answers out of the vocabulary.")
    max_answers: int | None = HfArg(default=None, help="Keep only this many most frequent answers.")
    blank_images: bool = HfArg(default=False, help="Measure again with gray images: what the question alone tells.")
    reword: float | None = HfArg(default=None, help="Share of easy-vqa's training questions to reword. Default: 0.3.")
    generate: bool = HfArg(
        default=False, help="Write answers in words, from no list; decoder_model, num_beams, max_new_tokens go with it."
    )
    ask: list[str] | None = HfArg(default=None, help="A question, quoted, about every image of the index; or several.")
    answer: str | None = HfArg(
        default=None, help="Sort the images by the probability of this answer. Unset: by that of each one's best."
    )

    defaults = {
        **TaskArguments.defaults,
        "output_dir": "outputs/vqa",
        "num_train_epochs": 10,
        "per_device_train_batch_size": 8,  # images, of about ten questions each in easy-VQA
        "per_device_eval_batch_size": 32,
        "metric_for_best_model": "accuracy",
    }
    own_benchmark = "easy-vqa"
    benchmark_defaults = _VQA_BENCHMARKS
    written = {**GenerationArguments.written, "max_new_tokens": 10}
    at_least_one = (
        *(*TaskArguments.at_least_one, *GenerationArguments.counts),
        *("min_answer_count", "max_answers", "top_k"),
    )
    places = (*TaskArguments.places, "index")
    reads_index = ("ask",)

    @property
    def task(self) -> str:
        if self.generate:
            return "hivilt.tasks.open_ended_answering:OpenEndedAnswering"
        return "hivilt.tasks.question_answering:QuestionAnswering"

    def __post_init__(self):
        if isinstance(self.ask, str):
            self.ask = [self.ask]
        self._check_index()
        if self.answer is not None and self.ask is None:
            raise ValueError(
                f"answer: got {self.answer!r}, but nothing is asked; give --ask a question, or leave it out."
            )
        super().__post_init__()
        for name in ("answer_file", "max_answers", "calibrate", "index", "ask"):
            if self.generate and (given := getattr(self, name)):
                raise ValueError(
                    f"generate: answers come from no list and have no scores to calibrate or to sort by; leave out {name} ({given!r})."
                )
        for name in ("decoder_model", *self.written):
            if not self.generate and (given := getattr(self, name)):
                raise ValueError(
                    f"{name}: got {given!r}, but answers come from a list; leave it out, or give --generate."
                )
        share = _VQA_BENCHMARKS.get(self.benchmark, {}).get("reword", 0.0)
        if self.reword is None:
            self.reword = share
        if not 0 <= self.reword <= 1 or (self.reword and not share):
            raise ValueError(f"reword: expected a share from 0 to 1 of the questions of easy-vqa, got {self.reword}.")
        if self.image_dir and not self.benchmark:
            raise ValueError("image_dir goes with a benchmark; paths in files of your own start at their folder.")


@dataclass
class CaptionArguments(TaskArguments):
    """What the tasks over captioned images share."""

    benchmark: str | None = HfArg(
        default=None,
        help="Data set of the field: of data_dir, dataset_name, or the Hub. Unset: openmoji, unless other data is named.",
        metadata={"choices": list(_CAPTION_BENCHMARKS)},
    )
    caption_column: str = HfArg(default="caption", help="Column of captions, a text or a list; or several, by commas.")
    karpathy_file: str | None = HfArg(default=None, help="JSON in Karpathy's layout; its images are in image_dir.")
    captions_per_image: int = HfArg(default=1, help="Captions of an image in a training batch, drawn anew each epoch.")

    defaults = {
        **TaskArguments.defaults,
        "num_train_epochs": 12,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 64,
    }
    own_benchmark = "openmoji"
    at_least_one = (*TaskArguments.at_least_one, "captions_per_image")
    places = (*TaskArguments.places, "karpathy_file")

    def names_data(self) -> bool:
        return bool(self.karpathy_file) or TaskArguments.names_data(self)

    def __post_init__(self):
        super().__post_init__()
        if self.karpathy_file and TaskArguments.names_data(self):
            raise ValueError("Data can come from one source, got karpathy_file and another; drop all but one.")
        if self.image_dir and not (self.karpathy_file or self.benchmark):
            raise ValueError(
                "image_dir goes with karpathy_file or a benchmark; an image folder with its own metadata is data_dir."
            )


@dataclass
class RetrievalArguments(IndexArguments, CaptionArguments):
    """What only retrieval has."""

    similar_per_batch: int = HfArg(default=4, help="Images with similar captions that share a training batch; 1: none.")
    num_hard_negatives: int = HfArg(default=3, help="Others of the batch that an image or caption is matched against.")
    rerank_k: int = HfArg(default=16, help="Candidates of each query that fusion re-ranks; 0: by embeddings alone.")
    contrastive_chunk_size: int | None = HfArg(
        default=None, help="Train in chunks of this many images and captions, for batches larger than the memory."
    )
    keep_states: bool = HfArg(
        default=False, help="Keep in the index what fusion needs, so that re-ranking encodes no image. It stays so."
    )
    index_factory: str = HfArg(default="Flat", help="FAISS index to search with; Flat is exact, 'IVF256,Flat' faster.")
    query: list[str] | None = HfArg(default=None, help="Words to search for, quoted, or an image's path; or several.")
    rerank: bool = HfArg(default=False, help="Let fusion re-rank the best rerank_k of a search.")

    task = "hivilt.tasks.retrieval:Retrieval"
    defaults = {**CaptionArguments.defaults, "output_dir": "outputs/retrieval", "metric_for_best_model": "mean_recall"}
    benchmark_defaults = _CAPTION_BENCHMARKS
    at_least_one = (
        *CaptionArguments.at_least_one,
        *("contrastive_chunk_size", "num_hard_negatives", "similar_per_batch", "top_k"),
    )
    places = (*CaptionArguments.places, "index")
    reads_index = ("query",)

    def __post_init__(self):
        if isinstance(self.query, str):
            self.query = [self.query]
        self._check_index()
        super().__post_init__()
        if self.rerank_k < 0:
            raise ValueError(f"rerank_k: expected 0 or more candidates, got {self.rerank_k}.")


@dataclass
class CaptioningArguments(GenerationArguments, CaptionArguments):
    """What only captioning has."""

    prompt: str | None = HfArg(
        default=None,
        help="What the text encoder reads with every image. Unset: the checkpoint's, of a new model 'an image of'.",
    )
    self_critical: bool = HfArg(
        default=False,
        help="Train a checkpoint on, by rewarding the captions that it samples with CIDEr-D: a tenth of the learning rate is "
        "enough.",
    )

    task = "hivilt.tasks.captioning:Captioning"
    defaults = {**CaptionArguments.defaults, "output_dir": "outputs/captioning", "metric_for_best_model": "cider_d"}
    benchmark_defaults = {name: {} for name in _CAPTION_BENCHMARKS}
    at_least_one = (*CaptionArguments.at_least_one, *GenerationArguments.counts)

    def __post_init__(self):
        super().__post_init__()
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError(
                "prompt: expected some words for the text encoder, got none; leave it out for the default."
            )
        if self.self_critical and not self.model_name_or_path:
            raise ValueError(
                "self_critical: a model that cannot write yet finds no caption to reward; train one first, and name it with "
                "--model_name_or_path."
            )
        if self.self_critical and self.random_flip == "swap":
            raise ValueError(
                "self_critical: captions keep their left and right, so images must; take random_flip 'skip'."
            )
        if self.calibrate:
            raise ValueError("calibrate: captions have no scores to calibrate; leave it out.")


@dataclass
class GroundingArguments(TaskArguments):
    """What only visual grounding has."""

    benchmark: str | None = HfArg(
        default=None,
        help="Data set of the field: of data_dir, dataset_name, or the Hub. Unset: scenes, which are drawn, unless other data "
        "is named.",
        metadata={"choices": list(_GROUNDING_BENCHMARKS)},
    )
    expression_column: str = HfArg(default="expression", help="Column of an expression, or of a list of them.")
    boxes_column: str = HfArg(default="boxes", help="Column of the boxes that it means; [] where nothing is meant.")
    box_form: Literal["xyxy", "xywh", "cxcywh"] = HfArg(
        default="xyxy",
        help="What the four numbers of a box are: left, top, right, bottom; or with width and height after left, top, as "
        "COCO has them, or after the middle, as YOLO has them.",
    )
    box_unit: Literal["pixel", "relative"] = HfArg(default="pixel", help="Whether they are relative to the image.")
    expressions_per_image: int | None = HfArg(
        default=None, help="Expressions of an image in a training batch, drawn anew each epoch. Unset: all."
    )
    threshold: float = HfArg(default=0.5, help="Lowest score of a box that is kept where none or several may be meant.")

    task = "hivilt.tasks.grounding:Grounding"
    threads_of_small = 2  # for the rows of the finest grid
    defaults = {
        **TaskArguments.defaults,
        "output_dir": "outputs/grounding",
        "num_train_epochs": 12,
        "per_device_train_batch_size": 16,  # images, of eight expressions each in scenes
        "learning_rate": 3e-3,
        "per_device_eval_batch_size": 32,
        "metric_for_best_model": "accuracy@0.5",
    }
    own_benchmark = "scenes"
    benchmark_defaults = _GROUNDING_BENCHMARKS
    at_least_one = (*TaskArguments.at_least_one, "expressions_per_image")

    def __post_init__(self):
        super().__post_init__()
        _check_drawn(self)
        if self.benchmark and (self.box_form, self.box_unit) != ("xyxy", "pixel"):
            raise ValueError(
                f"box_form, box_unit: got {self.box_form!r} and {self.box_unit!r}, but a benchmark's boxes are known; leave "
                "them out, they are of files of your own."
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: expected a score from 0 to 1, got {self.threshold}.")
        if self.calibrate:
            raise ValueError("calibrate: scores of boxes are not calibrated; leave it out, and choose a threshold.")


@dataclass
class ReasoningArguments(TaskArguments):
    """What only reasoning over images has."""

    benchmark: str | None = HfArg(
        default=None,
        help="Data set of the field: of data_dir, dataset_name, or the Hub. Unset: pairs, which are drawn, unless other data "
        "is named; a new model of them starts from the weights of grounding/. winoground and sugarcrepe measure a checkpoint of "
        "run_retrieval.py.",
        metadata={"choices": list(_REASONING_BENCHMARKS)},
    )
    images_column: str = HfArg(
        default="images", help="Column of a list of images, or columns with commas between, an image each."
    )
    sentence_column: str = HfArg(default="sentence", help="Column of what is said of them.")
    label_column: str = HfArg(default="label", help="Column of what that is: true or false, or other words.")
    statement_id_column: str | None = HfArg(default=None, help="Column copied to predictions.jsonl.")
    first_epochs: int | None = HfArg(
        default=None,
        help="Epochs of a curriculum's first stage, where the data has one; then the learning rate warms up once more. Unset: 2 "
        "of drawn pairs, which begin with what one image tells; files of your own have no stages.",
    )

    defaults = {
        **TaskArguments.defaults,
        "output_dir": "outputs/reasoning",
        "num_train_epochs": 12,
        "learning_rate": 7e-4,
        "warmup_steps": 0.05,  # twice, so that what comes first is learned within its epoch
        "per_device_train_batch_size": 5,  # sets of images, of fourteen statements each in drawn pairs
        "per_device_eval_batch_size": 8,
        "metric_for_best_model": "accuracy",
    }
    own_benchmark = "pairs"
    benchmark_defaults = _REASONING_BENCHMARKS
    at_least_zero = ("first_epochs",)

    @property
    def task(self) -> str:
        if self.benchmark in _MATCHING_BENCHMARKS:
            return "hivilt.tasks.matching:ImageTextMatching"
        return "hivilt.tasks.reasoning:Reasoning"

    def __post_init__(self):
        super().__post_init__()
        _check_drawn(self)
        if self.benchmark == "pairs" and not (
            self.model_name_or_path or self.vision_model or self.text_model or self.fusion
        ):
            # From scratch the first thousands of steps learn nothing of what is true of pairs alone.
            self.model_name_or_path = str(Path(__file__).parents[1] / "grounding")
        if self.first_epochs is None:
            self.first_epochs = 2 if self.benchmark == "pairs" else 0
        if self.benchmark in _MATCHING_BENCHMARKS:
            if not self.model_name_or_path:
                raise ValueError(
                    f"benchmark: {self.benchmark} measures a checkpoint of run_retrieval.py; name one as --model_name_or_path."
                )
            if self.calibrate:
                raise ValueError(
                    f"calibrate: {self.benchmark} has no validation data to fit a temperature on; leave it out."
                )
