#!/usr/bin/env bash
# RefCOCO: things in photographs by what people call them, on the split of UNC; Acc@0.5 on val, testA and testB.
#
#   runs/refcoco.sh --data_dir refcoco
#   runs/refcoco.sh --benchmark refcoco+ --data_dir refcoco+ --output_dir outputs/refcoco+
#   runs/refcoco.sh --benchmark refcocog --data_dir refcocog --output_dir outputs/refcocog
#   runs/refcoco.sh --benchmark grefcoco --data_dir grefcoco --threshold 0.7 --output_dir outputs/grefcoco
#
# Data: refs(unc).p and instances.json of https://github.com/lichengunc/refer, whose issues name copies, beside train2014/
# of https://cocodataset.org/#download. The Hub's copies have no training split.
#
# Settings: weight decay 1e-4, and rates of 1e-4 and a tenth of it for the encoders, of TransVG (arXiv 2104.08541).
# HiViLT's own: 30 epochs of images with all their expressions, where TransVG takes 90; left and right in the text change
# places where an image is mirrored; a crop keeps the middle of each thing. Colors stay, since expressions name them.
# Expressions of gRefCOCO may mean several things or none; those of the others mean one, so models of them always answer.
#
# Leaves in outputs/refcoco: the checkpoint, results.json, predictions.jsonl, grounding.png, and a card README.md.
#
# Estimate, not measured, of training alone:
#   images    16,994 x 114 GFLOP
#   expressions    120,624 x 11.5 GFLOP
#   training    x 3 x 30 epochs = 3e+17 FLOP
#   time        0.83 hours at 100 TFLOP/s
#   memory      25 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 32 images with 7 expressions each on average: 227 expressions a step.
launch run_grounding.py 32 \
  --benchmark refcoco \
  "${encoders[@]}" \
  --learning_rate 1e-4 --vision_learning_rate 1e-5 --text_learning_rate 1e-5 \
  --weight_decay 1e-4 --warmup_steps 0.05 --lr_scheduler_type cosine --num_train_epochs 30 \
  --random_crop 0.5 --random_flip swap \
  --bf16 --dataloader_num_workers 8 --per_device_eval_batch_size 64 \
  --output_dir outputs/refcoco \
  "$@"
