"""What scoring a split as large as VQAv2's costs: seconds of `vqa_accuracies` for each normalization, on one core.

    python benchmarks/vqa_accuracy_speed.py                        200,000 questions with ten answers each
    python benchmarks/vqa_accuracy_speed.py --questions 1000 --output_dir /tmp/quick

The answers are synthetic, some with punctuation, articles and number words: "repeated" draws them from 30,000, the
frequent ones as often as Zipf's law has it; in "distinct", which no real split is, no string comes twice. Normalized
answers are forgotten between runs. It leaves a JSON file, with the processor in its name, in benchmarks/results.
"""

import random
from functools import partial
from itertools import accumulate
from typing import get_args

from common import make_parser, seconds
from hivilt.evaluation.vqa import Normalization, normalize_answer, normalize_answer_mmf, vqa_accuracies
from hivilt.training.results import environment, write_result_file

FORMS = ["w{}", "w{}", "w{}", "w{} w7", "W{}", "a w{}", "two w{}", "w{}.", "w{}-w7", "w{}, w7", "w{}'s w7", "{},000?"]
VOCABULARY = 30_000


def make_answers(distinct: bool, number: int) -> list[str]:
    """So many answers; the same at every call."""
    draw = random.Random(0)
    if distinct:
        return [draw.choice(FORMS).format(n) for n in range(number)]
    vocabulary = [draw.choice(FORMS).format(n) for n in range(VOCABULARY)]
    weights = list(accumulate(1 / (rank + 1) for rank in range(VOCABULARY)))
    return draw.choices(vocabulary, cum_weights=weights, k=number)


def main(argv: list[str] | None = None) -> dict:
    """Measures, prints and writes; returns what the JSON file holds."""
    parser = make_parser(__doc__)
    parser.add_argument("--questions", type=int, default=200_000)
    args = parser.parse_args(argv)

    results = {"environment": environment(), "questions": args.questions, "answers_per_question": 10, "seconds": {}}
    for case in ("repeated", "distinct"):
        drawn = make_answers(case == "distinct", 11 * args.questions)
        predictions = drawn[: args.questions]
        answers = [drawn[start : start + 10] for start in range(args.questions, len(drawn), 10)]
        results["seconds"][case] = {}
        for normalization in get_args(Normalization):
            normalize_answer.cache_clear()
            normalize_answer_mmf.cache_clear()
            score = partial(vqa_accuracies, predictions, answers, normalization)
            results["seconds"][case][normalization] = seconds(score)
        shown = ", ".join(f"{name} {value:.2f}" for name, value in results["seconds"][case].items())
        print(f"{args.questions:,} questions, {case} answers, seconds: {shown}", flush=True)

    write_result_file(args.output_dir, "vqa_accuracy_speed", results)
    return results


if __name__ == "__main__":
    main()
