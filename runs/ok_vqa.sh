#!/usr/bin/env bash
# OK-VQA: questions about photographs of MS-COCO that ask for knowledge besides.
#
#   CHECKPOINT=outputs/vqav2 runs/ok_vqa.sh --data_dir OKVQA --num_train_epochs 6     from VQAv2, as the field does
#   runs/ok_vqa.sh --data_dir OKVQA                          from the encoders alone
#   runs/ok_vqa.sh                                           the Hub's copies, 2.4 GB
#
# Data, of https://okvqa.allenai.org/download.html, unpacked into one folder: OpenEnded_mscoco_*_questions.json,
# mscoco_*_annotations.json, and MS-COCO's train2014/ and val2014/.
#
# Settings: those of vqav2.sh. LAVIS goes on from ALBEF's VQAv2 checkpoint for 6 epochs at 2e-5, 16 questions a GPU.
# Such a checkpoint, if trained on VQAv2's train and val, has seen the images of this test split, though not its
# questions; one trained with --train_split train has not.
# HiViLT's own: 64 questions a step; the classes are the answers of two questions or more; the official val is the
# test split, as everywhere, and a tenth of the training images is held out to choose the epoch by.
#
# Leaves in outputs/ok_vqa: the checkpoint, results.json, predictions.jsonl.
#
# Estimate, not measured, of training alone:
#   images    8,098 x 114 GFLOP
#   questions   8,108 x 6.5 GFLOP
#   training    x 3 x 10 epochs = 2.9e+16 FLOP
#   time        0.081 hours at 100 TFLOP/s
#   memory      20 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 64 images with one question each.
launch run_vqa.py 64 \
  --benchmark ok-vqa \
  "${encoders[@]}" \
  --learning_rate 1e-4 --vision_learning_rate 2e-5 --text_learning_rate 2e-5 \
  --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine --num_train_epochs 10 \
  --random_crop 0.5 --random_flip skip --rand_augment 2 7 \
  --bf16 --dataloader_num_workers 8 --per_device_eval_batch_size 128 \
  --output_dir outputs/ok_vqa \
  "$@"
