#!/usr/bin/env bash
# easy-VQA: questions about colored shapes, from scratch; what `make vqa` runs, spelled out.
#
#   runs/easy_vqa.sh                     the images come with the package easy-vqa
#
# Settings: HiViLT's own, the defaults of run_vqa.py; nobody in the field trains on it. A tenth of the training
# images is held out to choose the epoch by; the test split is read once, at the end.
# Leaves in outputs/vqa: the checkpoint, results.json, predictions.jsonl, training.png, predictions.png.
# Measured (docs/benchmarks.md): 29.0 minutes on one thread of a CPU that had other work besides, 1.1 GiB.
#
# Estimate, not measured, of training alone:
#   images    3,600 x 0.036 GFLOP
#   questions   34,717 x 0.010 GFLOP
#   training    x 3 x 10 epochs = 1.4e+13 FLOP
#   time        0.2 hours at 0.02 TFLOP/s, one CPU thread
#   memory      1 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 8 images with 9.6 questions each: 77 questions a step.
launch run_vqa.py 8 \
  --benchmark easy-vqa --image_size 64 \
  --learning_rate 1.5e-3 --adam_beta2 0.98 --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine \
  --num_train_epochs 10 --dataloader_num_workers 1 --per_device_eval_batch_size 32 \
  --output_dir outputs/vqa \
  "$@"
