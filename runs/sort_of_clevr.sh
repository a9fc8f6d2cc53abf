#!/usr/bin/env bash
# Sort-of-CLEVR: relational and non-relational questions about six colored shapes, 10 answers, from scratch.
#
#   python -m hivilt.data.sort_of_clevr sort_of_clevr && runs/sort_of_clevr.sh --data_dir sort_of_clevr
#
# Data: drawn by the first command after Santoro et al. 2017 (arXiv:1706.01427), who published none.
#
# Settings: HiViLT's own, after run_vqa.py's defaults; the paper's networks read questions as bits, not as sentences.
# Images of 75 pixels, half of them mirrored, and left with right exchanged in their questions: without, it learns the
# images by heart from the ninth epoch on, and ends 1.4 points lower (12 epochs, relational held-out questions). A tenth
# of the training images is held out to choose the epoch by; the 200 test images are looked at once, at the end.
# Leaves in outputs/sort_of_clevr: the checkpoint, results.json with accuracy by family of questions, predictions.jsonl.
# Measured: 0.9740 of the relational and 0.9995 of the other test questions, in 97 minutes on one CPU thread, 1.1 GiB.
#
# Estimate, not measured, of training alone:
#   images    8,820 x 0.054 GFLOP
#   questions   176,400 x 0.0164 GFLOP
#   training    x 3 x 15 epochs = 1.5e+14 FLOP
#   time        2.1 hours at 0.02 TFLOP/s, one CPU thread
#   memory      1 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 16 images with 20 questions each: 320 questions a step.
launch run_vqa.py 16 \
  --benchmark sort-of-clevr --image_size 75 \
  --learning_rate 1e-3 --adam_beta2 0.98 --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine \
  --num_train_epochs 15 --random_flip swap --per_device_eval_batch_size 32 \
  --output_dir outputs/sort_of_clevr \
  "$@"
