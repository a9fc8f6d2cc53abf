#!/usr/bin/env bash
# MS-COCO: photographs by captions and captions by photographs, on Karpathy's split; R@K on 5,000 images, and its
# mean over five folds of 1,000.
#
#   runs/coco.sh --data_dir coco                             official files
#   runs/coco.sh                                             the Hub's copy, an image with each caption
#
# Data: dataset_coco.json of https://cs.stanford.edu/people/karpathy/deepimagesent/, beside train2014/ and val2014/ of
# https://cocodataset.org/#download. Training takes train and restval, 113,287 images, as everyone does.
#
# Settings: those of flickr30k.sh, with the best 256 re-ranked, as ALBEF, BLIP, X-VLM and BridgeTower do.
# HiViLT's own: 10 epochs with 2 of 5 captions, 4 of the field's (ALBEF: 5, BLIP: 6); the epoch is chosen by the first
# 1,000 images of val, since every evaluation keeps the states of its split.
#
# Leaves in outputs/coco: the checkpoint, results.json, predictions.jsonl, retrieval.png, and in the card README.md
# the tables of R@1, R@5 and R@10.
#
# Estimate, not measured, of training alone; chunks are computed once more for their gradients:
#   images    113,287 x 114 GFLOP
#   captions    226,574 x 11.0 GFLOP
#   training    x 4 x 10 epochs = 6.2e+17 FLOP
#   time        1.7 hours at 100 TFLOP/s
#   memory      25 GB, a guess; 24 GB of main memory in every process for the states of the test split
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 256 images with 2 captions each: 512 pairs a step.
launch run_retrieval.py 256 \
  --benchmark coco --max_eval_samples 1000 \
  "${encoders[@]}" \
  --captions_per_image 2 --num_hard_negatives 1 --contrastive_chunk_size 64 --rerank_k 256 \
  --learning_rate 1e-4 --vision_learning_rate 2e-5 --text_learning_rate 2e-5 \
  --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine --num_train_epochs 10 \
  --random_crop 0.5 --random_flip skip --rand_augment 2 7 \
  --bf16 --dataloader_num_workers 8 --per_device_eval_batch_size 64 \
  --output_dir outputs/coco \
  "$@"
