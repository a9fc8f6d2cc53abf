"""Trains and evaluates HiViLT on finding images by words and words by images, and searches folders of images.

    python run_retrieval.py                                        OpenMoji, everything with defaults
    python run_retrieval.py --benchmark flickr30k --data_dir F30K   a data set of the field, its official files or the Hub's
    python run_retrieval.py --train_file train.jsonl --test_file test.jsonl --output_dir outputs/mine
    python run_retrieval.py --karpathy_file dataset_flickr30k.json --image_dir flickr30k-images --output_dir outputs/f30k
    python run_retrieval.py --index ~/Pictures --output_dir outputs/index
    python run_retrieval.py --query "red heart" --output_dir outputs/index
    accelerate launch --multi_gpu --num_processes 2 run_retrieval.py   several devices; on CPUs with --use_cpu

Training leaves in --output_dir: the checkpoint with its code and processor, README.md, results.json, predictions.jsonl,
training.png and retrieval.png. A search prints the best images and leaves search.png.
"""

from functools import partial

from hivilt.training.command import run_command, run_task

main = partial(run_task, "hivilt.tasks.arguments:RetrievalArguments")

if __name__ == "__main__":
    run_command(main)
