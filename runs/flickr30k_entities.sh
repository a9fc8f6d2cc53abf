#!/usr/bin/env bash
# Flickr30k Entities: phrases of captions by the boxes of what they mean; recall@1, @5 and @10 by the any-box protocol.
#
#   runs/flickr30k_entities.sh --data_dir flickr30k_entities
#
# Data: Annotations/, Sentences/ and {train,val,test}.txt of https://github.com/BryanPlummer/flickr30k_entities, and
# flickr30k-images/, which https://shannon.cs.illinois.edu/DenotationGraph/ gives for research.
#
# Settings: those of refcoco.sh.
# HiViLT's own: 10 epochs of images with all their phrases, 14 on average. A phrase is looked for by itself, without the
# caption that it is of. Phrases mean something in their image, so a model of them always answers.
#
# Leaves in outputs/flickr30k_entities: the checkpoint, results.json, predictions.jsonl, grounding.png, and in the card
# README.md recall by type of phrase.
#
# Estimate, not measured, of training alone:
#   images    29,783 x 114 GFLOP
#   expressions    427,193 x 11.5 GFLOP
#   training    x 3 x 10 epochs = 2.5e+17 FLOP
#   time        0.69 hours at 100 TFLOP/s
#   memory      25 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 16 images with 14 phrases each on average: 229 phrases a step.
launch run_grounding.py 16 \
  --benchmark flickr30k-entities \
  "${encoders[@]}" \
  --learning_rate 1e-4 --vision_learning_rate 1e-5 --text_learning_rate 1e-5 \
  --weight_decay 1e-4 --warmup_steps 0.05 --lr_scheduler_type cosine --num_train_epochs 10 \
  --random_crop 0.5 --random_flip swap \
  --bf16 --dataloader_num_workers 8 --per_device_eval_batch_size 64 \
  --output_dir outputs/flickr30k_entities \
  "$@"
