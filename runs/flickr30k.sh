#!/usr/bin/env bash
# Flickr30k: photographs by captions and captions by photographs, on Karpathy's split.
#
#   runs/flickr30k.sh --data_dir flickr30k                   official files
#   runs/flickr30k.sh                                        the Hub's copy
#
# Data: dataset_flickr30k.json of https://cs.stanford.edu/people/karpathy/deepimagesent/, and flickr30k-images/, which
# https://shannon.cs.illinois.edu/DenotationGraph/ gives for research.
#
# Settings: 384 pixels, crop and RandAugment (2, 7), one hard negative each way and the best 128 re-ranked of ALBEF;
# 512 pairs a step of METER and BridgeTower, and everything but the encoders at 5 times their rate; cosine to 0 and
# weight decay 0.05 of BLIP; no mirroring where a caption says left or right, as X-VLM.
# HiViLT's own: encoders at 2e-5, twice ALBEF's rate, for SigLIP and BERT have not met before; no queue of negatives
# and no distillation, but 512 pairs in chunks of 64, four images with similar captions together; an epoch takes
# each image once, with 2 of its 5 captions, where the field's takes each caption once: 30 of these are 12 of those.
#
# Leaves in outputs/flickr30k: the checkpoint, results.json, predictions.jsonl, retrieval.png, and in the card
# README.md the tables of R@1, R@5 and R@10 by embeddings, by fusion and re-ranked.
#
# Estimate, not measured, of training alone; chunks are computed once more for their gradients:
#   images    29,000 x 114 GFLOP
#   captions    58,000 x 11.0 GFLOP
#   training    x 4 x 30 epochs = 4.7e+17 FLOP
#   time        1.3 hours at 100 TFLOP/s
#   memory      25 GB, a guess; 5 GB of main memory in every process for the states of a split
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 256 images with 2 captions each: 512 pairs a step.
launch run_retrieval.py 256 \
  --benchmark flickr30k \
  "${encoders[@]}" \
  --captions_per_image 2 --num_hard_negatives 1 --contrastive_chunk_size 64 --rerank_k 128 \
  --learning_rate 1e-4 --vision_learning_rate 2e-5 --text_learning_rate 2e-5 \
  --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine --num_train_epochs 30 \
  --random_crop 0.5 --random_flip skip --rand_augment 2 7 \
  --bf16 --dataloader_num_workers 8 --per_device_eval_batch_size 64 \
  --output_dir outputs/flickr30k \
  "$@"
