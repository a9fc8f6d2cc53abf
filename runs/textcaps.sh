#!/usr/bin/env bash
# TextCaps: captions of photographs with text in them, which a caption should read.
#
#   runs/textcaps.sh --data_dir TextCaps
#
# Data, of https://textvqa.org/textcaps/dataset/: TextCaps_0.1_{train,val,test}.json, and the images of Open Images in
# train_images/ and test_images/. Captions of the test split are not public: --test_split test captions it.
#
# Settings: learning rates and augmentation are those of vqav2.sh.
# HiViLT's own: the decoder is small and new; 20 epochs with one of five captions; no mirroring, for much is written in these
# images, and crops keep four fifths of an image or more.
#
# Leaves in outputs/textcaps: the checkpoint, results.json, predictions.jsonl and captions.png.
#
# Estimate, not measured, of training alone; the small decoder is not counted:
#   images    21,953 x 114 GFLOP
#   captions    21,953 x 6.5 GFLOP
#   training    x 3 x 20 epochs = 1.6e+17 FLOP
#   time        0.44 hours at 100 TFLOP/s
#   memory      20 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 64 images with one caption each.
launch run_captioning.py 64 \
  --benchmark textcaps \
  "${encoders[@]}" \
  --learning_rate 1e-4 --vision_learning_rate 2e-5 --text_learning_rate 2e-5 \
  --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine --num_train_epochs 20 \
  --random_crop 0.8 --rand_augment 2 7 \
  --label_smoothing_factor 0.1 --num_beams 3 --max_new_tokens 32 \
  --bf16 --dataloader_num_workers 8 --per_device_eval_batch_size 64 \
  --output_dir outputs/textcaps \
  "$@"
