"""What a run holds out of its training data."""

from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS
from hivilt.tasks.arguments import VQAArguments
from hivilt.tasks.question_answering import QuestionAnswering
from hivilt.training.arguments import parse_arguments
from hivilt.training.splits import prepare_splits
from miniatures import make_vqa_miniature


def test_vqa_rad_holds_out_questions_with_their_rewordings(tmp_path):
    """Its test split asks about training images, but never what training asks in other words."""
    make_vqa_miniature("vqa-rad", tmp_path / "data")
    args, training_args = parse_arguments(
        ["--benchmark", "vqa-rad", "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path), "--use_cpu"],
        VQAArguments,
        {},
    )
    benchmark = VQA_BENCHMARKS["vqa-rad"]
    _, splits, _, _ = prepare_splits(args, training_args, QuestionAnswering(args).read, benchmark.hold_out_by)
    train, held_out = ({one.group for one in splits[split]} for split in ("train", "validation"))
    assert held_out and not train & held_out
    assert {one.image_id for one in splits["validation"]} <= {one.image_id for one in splits["train"]}
