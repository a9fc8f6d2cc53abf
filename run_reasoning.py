"""Trains and evaluates HiViLT on statements about several images together, such as pairs.

    python run_reasoning.py                                        drawn pairs, everything with defaults
    python run_reasoning.py --benchmark nlvr2 --data_dir nlvr2     a data set of the field, its official files or the Hub's
    python run_reasoning.py --train_file train.jsonl --test_file test.jsonl --output_dir outputs/mine

A model of drawn pairs starts from the weights of grounding/.
"""

from functools import partial

from hivilt.training.command import run_command, run_task

main = partial(run_task, "hivilt.tasks.arguments:ReasoningArguments")

if __name__ == "__main__":
    run_command(main)
