#!/usr/bin/env bash
# VQAv2: questions about photographs of MS-COCO, one of 3,129 answers; as for the leaderboard, trained on train and
# val, with answers to all of test.
#
#   runs/vqav2.sh --data_dir VQAv2                           official files
#   runs/vqav2.sh                                            the Hub's copies, an image with each question
#   runs/vqav2.sh --data_dir VQAv2 --train_split train       to compare on val: chosen by it, and its accuracy printed
#
# Data, of https://visualqa.org/download.html, unpacked into one folder: v2_OpenEnded_mscoco_*_questions.json,
# v2_mscoco_*_annotations.json, and MS-COCO's train2014/, val2014/ and test2015/.
#
# Settings: 384 pixels, crops from half the image on, RandAugment (2, 7), encoders at 2e-5 and 256 questions a step
# of ALBEF; cosine to 0, weight decay 0.05 and 10 epochs of BLIP; warm-up over a tenth and Adam's beta2 of 0.98, the
# default here, of ViLT and METER; no mirroring where a question or an answer says left or right, as X-VLM. All but the
# encoders learn 5 times as fast as they do, the ratio of METER and BridgeTower for their fusion.
# HiViLT's own: the head learns as fast as the fusion (METER and BridgeTower: 50 times as fast as the encoders, for
# which there is no flag); a tenth of the images is held out to choose the epoch by, where they hold out 1,000; no
# questions of Visual Genome. And fusion is new here, where theirs has seen 4 to 129 million captioned images
# before.
#
# Leaves in outputs/vqav2: the checkpoint, results.json, predictions.jsonl, and submission.json for the server, whose
# test-dev and test-standard are both parts of test.
#
# Estimate, not measured, of training alone:
#   images    110,958 x 114 GFLOP
#   questions   592,300 x 6.5 GFLOP
#   training    x 3 x 10 epochs = 4.9e+17 FLOP
#   time        1.4 hours at 100 TFLOP/s
#   memory      25 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 48 images with 5.3 questions each: 256 questions a step.
launch run_vqa.py 48 \
  --benchmark vqav2 --train_split train+val --test_split test \
  "${encoders[@]}" \
  --learning_rate 1e-4 --vision_learning_rate 2e-5 --text_learning_rate 2e-5 \
  --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine --num_train_epochs 10 \
  --random_crop 0.5 --random_flip skip --rand_augment 2 7 \
  --bf16 --dataloader_num_workers 8 --per_device_eval_batch_size 64 \
  --output_dir outputs/vqav2 \
  "$@"
