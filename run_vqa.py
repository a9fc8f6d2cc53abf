"""Trains and evaluates HiViLT on questions about images.

    python run_vqa.py                                              easy-VQA, everything with defaults
    python run_vqa.py --benchmark gqa --data_dir GQA               a data set of the field, its official files or the Hub's
    python run_vqa.py --train_file train.jsonl --test_file test.jsonl --output_dir outputs/mine
    python run_vqa.py --model_name_or_path outputs/vqa --test_file test.csv --do_predict --output_dir outputs/test
    python run_vqa.py --index ~/Pictures --ask "is there a dog?" --output_dir outputs/asked
    python run_vqa.py settings.yaml                                the same flags in one file
    accelerate launch --multi_gpu --num_processes 2 run_vqa.py     several devices; on CPUs with --use_cpu

It leaves in --output_dir: the checkpoint with its code, processor and pipeline, README.md, results.json,
predictions.jsonl, training.png and predictions.png; for a benchmark with a server also submission.json. Of a folder that is
asked it prints the first answers and leaves answers.jsonl.
"""

from functools import partial

from hivilt.training.command import run_command, run_task

main = partial(run_task, "hivilt.tasks.arguments:VQAArguments")

if __name__ == "__main__":
    run_command(main)
