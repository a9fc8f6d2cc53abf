#!/usr/bin/env bash
# GQA, balanced: compositional questions about photographs, one of 1,842 answers.
#
#   runs/gqa.sh --data_dir GQA                               official files
#   runs/gqa.sh                                              the Hub's copies; train's images are 10 GB
#
# Data, of https://cs.stanford.edu/people/dorarad/gqa/download.html, unpacked into one folder:
# {train,val,testdev}_balanced_questions.json, and images/.
#
# Settings: those of vqav2.sh, but 5 epochs (LXMERT: 4) over twice as many questions, and no mirroring, as
# BridgeTower: with 13 questions an image, nearly every one has a question about left or right.
# HiViLT's own: the field trains on train and val and chooses the epoch by testdev, which it then reports; here val
# chooses, and testdev is answered once, at the end. --train_split train+val trains on both and chooses by a tenth of
# their images. Accuracy on val is much higher than on testdev, whose images are others: do not quote it.
#
# Leaves in outputs/gqa: the checkpoint, results.json with accuracy by type, predictions.jsonl, and submission.json in
# the server's format, for testdev; --test_split test writes it for test.
#
# Estimate, not measured, of training alone; images of train, about:
#   images    72,140 x 114 GFLOP
#   questions   943,000 x 6.5 GFLOP
#   training    x 3 x 5 epochs = 2.2e+17 FLOP
#   time        0.6 hours at 100 TFLOP/s
#   memory      25 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 24 images with 13.1 questions each: 314 questions a step, where the field has 256 or 512.
launch run_vqa.py 24 \
  --benchmark gqa --train_split train --validation_split val --test_split testdev \
  "${encoders[@]}" \
  --learning_rate 1e-4 --vision_learning_rate 2e-5 --text_learning_rate 2e-5 \
  --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine --num_train_epochs 5 \
  --random_crop 0.5 --rand_augment 2 7 \
  --bf16 --dataloader_num_workers 8 --per_device_eval_batch_size 32 \
  --output_dir outputs/gqa \
  "$@"
