#!/usr/bin/env bash
# VizWiz-VQA: what blind people asked about photographs they took; a third of the questions cannot be answered.
#
#   runs/vizwiz.sh --data_dir VizWiz
#   CHECKPOINT=outputs/vqav2 runs/vizwiz.sh --data_dir VizWiz        goes on from VQAv2
#
# Data, of https://vizwiz.org/tasks-and-datasets/vqa/, unpacked into one folder: Annotations/{train,val,test}.json,
# and train/, val/ and test/ with the images. The Hub has no training split.
#
# Settings: those of vqav2.sh. HiViLT's own: the classes are the answers of two questions or more; no mirroring, for
# many questions ask what is written; crops keep four fifths of an image or more, for what is asked about is often at
# its border already.
#
# Leaves in outputs/vizwiz: the checkpoint, results.json, predictions.jsonl, submission.json and, for the task of
# telling what cannot be answered, submission_answerability.json.
#
# Estimate, not measured, of training alone:
#   images    20,523 x 114 GFLOP
#   questions   20,523 x 6.5 GFLOP
#   training    x 3 x 10 epochs = 7.4e+16 FLOP
#   time        0.21 hours at 100 TFLOP/s
#   memory      20 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 64 images with one question each: fewer questions a step than the field's 256, of more images.
launch run_vqa.py 64 \
  --benchmark vizwiz \
  "${encoders[@]}" \
  --learning_rate 1e-4 --vision_learning_rate 2e-5 --text_learning_rate 2e-5 \
  --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine --num_train_epochs 10 \
  --random_crop 0.8 --rand_augment 2 7 \
  --bf16 --dataloader_num_workers 8 --per_device_eval_batch_size 128 \
  --output_dir outputs/vizwiz \
  "$@"
