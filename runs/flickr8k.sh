#!/usr/bin/env bash
# Flickr8k: photographs by captions and captions by photographs; small, a rehearsal for flickr30k.sh.
#
#   runs/flickr8k.sh --data_dir flickr8k                     official files
#   runs/flickr8k.sh                                         the Hub's copy
#
# Data: dataset_flickr8k.json of https://cs.stanford.edu/people/karpathy/deepimagesent/, or Flickr8k.token.txt with
# Flickr_8k.{train,dev,test}Images.txt, and the images in Flicker8k_Dataset/ or images/; or Kaggle's captions.txt and
# Images/, with one of the former beside them for the official split.
#
# Settings: those of flickr30k.sh. HiViLT's own: half as many pairs a step, for a fifth of the images.
#
# Leaves in outputs/flickr8k: the checkpoint, results.json, predictions.jsonl, retrieval.png, and in the card
# README.md the tables of R@1, R@5 and R@10.
#
# Estimate, not measured, of training alone; chunks are computed once more for their gradients:
#   images    6,000 x 114 GFLOP
#   captions    12,000 x 11.0 GFLOP
#   training    x 4 x 30 epochs = 9.8e+16 FLOP
#   time        0.27 hours at 100 TFLOP/s
#   memory      25 GB, a guess; 5 GB of main memory in every process for the states of a split
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 128 images with 2 captions each: 256 pairs a step.
launch run_retrieval.py 128 \
  --benchmark flickr8k \
  "${encoders[@]}" \
  --captions_per_image 2 --num_hard_negatives 1 --contrastive_chunk_size 64 --rerank_k 128 \
  --learning_rate 1e-4 --vision_learning_rate 2e-5 --text_learning_rate 2e-5 \
  --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine --num_train_epochs 30 \
  --random_crop 0.5 --random_flip skip --rand_augment 2 7 \
  --bf16 --dataloader_num_workers 8 --per_device_eval_batch_size 64 \
  --output_dir outputs/flickr8k \
  "$@"
