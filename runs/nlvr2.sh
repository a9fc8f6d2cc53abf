#!/usr/bin/env bash
# NLVR2: whether a sentence is true of two photographs; accuracy and consistency on dev and test-P.
#
#   runs/nlvr2.sh --data_dir nlvr2                           official files
#   runs/nlvr2.sh --data_dir nlvr2 --test_split test2        test-U
#   CHECKPOINT=outputs/vqav2 runs/nlvr2.sh --data_dir nlvr2  from a model that answers questions
#
# Data: data/ of https://github.com/lil-lab/nlvr (folder nlvr2), whose form gives the images of train/, dev/ and test1/; they
# go to images/. The Hub's copies have no training split.
#
# Settings: 384 pixels and 10 epochs, crops from half an image on and RandAugment (2, 7), of ALBEF and BridgeTower; encoders at
# 2e-5 of ALBEF; cosine to 0 and weight decay 0.05 of BLIP. Mirrored images change places, and left and right in the sentence
# with them, after BLIP. All but the encoders learn 5 times as fast as they do, the ratio of METER for its fusion.
# HiViLT's own: all sentences about a pair are in one batch, and fusion is new here, where theirs has seen 4 to 129 million
# captioned images before; CHECKPOINT brings one that has seen some.
#
# Leaves in outputs/nlvr2: the checkpoint, results.json, predictions.jsonl, predictions.png, and a card README.md.
#
# Estimate, not measured, of training alone; as many sentences a pair as in dev:
#   images    100,400 x 114 GFLOP
#   statements   86,373 x 8.8 GFLOP
#   training    x 3 x 10 epochs = 3.7e+17 FLOP
#   time        1 hours at 100 TFLOP/s
#   memory      35 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 64 pairs of images with 1.7 sentences each: 110 statements a step, where the field has 64 to 256.
launch run_reasoning.py 64 \
  --benchmark nlvr2 \
  "${encoders[@]}" \
  --learning_rate 1e-4 --vision_learning_rate 2e-5 --text_learning_rate 2e-5 \
  --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine --num_train_epochs 10 \
  --random_crop 0.5 --random_flip swap --rand_augment 2 7 \
  --bf16 --dataloader_num_workers 8 --per_device_eval_batch_size 64 \
  --output_dir outputs/nlvr2 \
  "$@"
