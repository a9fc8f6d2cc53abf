#!/usr/bin/env bash
# VQA-RAD: questions of doctors about radiology images, on pretrained encoders. benchmarks/vqa_rad.py measures it
# from scratch instead, with three seeds and with blank images.
#
#   runs/vqa_rad.sh --data_dir vqa_rad                       official files
#   runs/vqa_rad.sh                                          the Hub's copy, 35 MB
#
# Data, of https://osf.io/89kps (CC0), in one folder: "VQA_RAD Dataset Public.json" and "VQA_RAD Image Folder/". The
# Hub's copy does not tell closed questions from open ones, of which 251 of the 272 in the test split are found; nor
# which questions say the same, so that what is held out may be a training question in other words.
#
# Settings: pixels and learning rates of vqav2.sh, RandAugment (2, 5) of BLIP. HiViLT's own: 30 epochs, since there
# are but 313 images; small crops and no mirroring, for the sides of a body differ; encoders of everyday images
# and texts, where systems made for it (MEVF and after) begin with medical ones.
#
# Leaves in outputs/vqa_rad: the checkpoint, results.json with open and closed accuracy, predictions.jsonl.
#
# Estimate, not measured, of training alone; a tenth of the questions is held out, not of the images:
#   images    313 x 114 GFLOP
#   questions   1,617 x 6.5 GFLOP
#   training    x 3 x 30 epochs = 4.2e+15 FLOP
#   time        0.012 hours at 100 TFLOP/s
#   memory      8 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 8 images with 5.2 questions each: 41 questions a step.
launch run_vqa.py 8 \
  --benchmark vqa-rad \
  "${encoders[@]}" \
  --learning_rate 1e-4 --vision_learning_rate 2e-5 --text_learning_rate 2e-5 \
  --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine --num_train_epochs 30 \
  --random_crop 0.8 --rand_augment 2 5 \
  --bf16 --dataloader_num_workers 4 --per_device_eval_batch_size 32 \
  --output_dir outputs/vqa_rad \
  "$@"
