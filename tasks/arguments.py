"""The flags of each task beside those of all: what `--help` lists, and so without models, data sets and Trainer, which take
seconds to import."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from hivilt.training.arguments import TaskArguments

# Each benchmark of a task, and the flags that it sets by itself; resolution, learning rates and epochs are in runs/.
_VQA_BENCHMARKS = {
    "easy-vqa": {"reword": 0.3},
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
}


@dataclass
class VQAArguments(TaskArguments):
    """What only question answering has."""

    benchmark: str | None = HfArg(
        default=None,
        help="Data set of the field: of data_dir, of dataset_name, or as the Hub has it. Unset: easy-vqa, unless other data "
        "is named.",
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

    task = "hivilt.tasks.question_answering:QuestionAnswering"
    defaults = {
        **TaskArguments.defaults,
        "output_dir": "outputs/vqa",
        "num_train_epochs": 10,
        "per_device_train_batch_size": 8,  # images, of about ten questions each in easy-VQA
        "per_device_eval_batch_size": 32,
        "metric_for_best_model": "accuracy",
    }
    benchmark_defaults = _VQA_BENCHMARKS
    at_least_one = (*TaskArguments.at_least_one, "min_answer_count", "max_answers")

    def __post_init__(self):
        super().__post_init__()
        if not self.names_data():
            self.benchmark = "easy-vqa"
        share = _VQA_BENCHMARKS.get(self.benchmark, {}).get("reword", 0.0)
        if self.reword is None:
            self.reword = share
        if not 0 <= self.reword <= 1 or (self.reword and not share):
            raise ValueError(f"reword: expected a share from 0 to 1 of the questions of easy-vqa, got {self.reword}.")
        if self.image_dir and not self.benchmark:
            raise ValueError("image_dir goes with a benchmark; paths in files of your own start at their folder.")


@dataclass
class RetrievalArguments(TaskArguments):
    """What only retrieval has."""

    benchmark: str | None = HfArg(
        default=None,
        help="Data set of the field: of data_dir, of dataset_name, or as the Hub has it. Unset: openmoji, unless other data "
        "is named.",
        metadata={"choices": list(_CAPTION_BENCHMARKS)},
    )
    caption_column: str = HfArg(default="caption", help="Column of captions, a text or a list; or several, by commas.")
    karpathy_file: str | None = HfArg(default=None, help="JSON in Karpathy's layout; its images are in image_dir.")
    captions_per_image: int = HfArg(default=1, help="Captions of an image in a training batch, drawn anew each epoch.")
    similar_per_batch: int = HfArg(default=4, help="Images with similar captions that share a training batch; 1: none.")
    num_hard_negatives: int = HfArg(default=3, help="Others of the batch that an image or caption is matched against.")
    rerank_k: int = HfArg(default=16, help="Candidates of each query that fusion re-ranks; 0: by embeddings alone.")
    contrastive_chunk_size: int | None = HfArg(
        default=None, help="Train in chunks of this many images and captions, for batches larger than the memory."
    )
    index: str | None = HfArg(default=None, help="Folder of images to embed for searching.")
    index_factory: str = HfArg(default="Flat", help="FAISS index to search with; Flat is exact, 'IVF256,Flat' faster.")
    query: list[str] | None = HfArg(default=None, help="Words to search for, quoted, or an image's path; or several.")
    top_k: int = HfArg(default=10, help="Images that a search prints.")
    rerank: bool = HfArg(default=False, help="Let fusion re-rank the best rerank_k of a search.")

    task = "hivilt.tasks.retrieval:Retrieval"
    defaults = {
        **TaskArguments.defaults,
        "output_dir": "outputs/retrieval",
        "num_train_epochs": 12,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 64,
        "metric_for_best_model": "mean_recall",
    }
    benchmark_defaults = _CAPTION_BENCHMARKS
    at_least_one = (
        *TaskArguments.at_least_one,
        *("captions_per_image", "contrastive_chunk_size", "num_hard_negatives", "similar_per_batch", "top_k"),
    )
    places = (*TaskArguments.places, "karpathy_file", "index")

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.query, str):
            self.query = [self.query]
        if (self.index or self.query is not None) and (self.karpathy_file or self.names_data()):
            raise ValueError("index, query: a search reads no data to train or measure on; drop one or the other.")
        if self.karpathy_file and self.names_data():
            raise ValueError("Data can come from one source, got karpathy_file and another; drop all but one.")
        if not (self.names_data() or self.karpathy_file):
            self.benchmark = "openmoji"
        if self.image_dir and not (self.karpathy_file or self.benchmark):
            raise ValueError(
                "image_dir goes with karpathy_file or a benchmark; an image folder with its own metadata is data_dir."
            )
        if self.rerank_k < 0:
            raise ValueError(f"rerank_k: expected 0 or more candidates, got {self.rerank_k}.")
