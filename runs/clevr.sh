#!/usr/bin/env bash
# CLEVR: questions about rendered solids that take several steps to answer, 28 answers, from scratch.
#
#   runs/clevr.sh --data_dir CLEVR                           the official release, which the Hub lacks
#
# Data: CLEVR_v1.0.zip of https://cs.stanford.edu/people/jcjohns/clevr/, unpacked into a folder.
#
# Settings: HiViLT's own, after run_vqa.py's defaults; none of ALBEF, BLIP, METER and their like reports it. Images
# at 224 pixels, as in Johnson et al. 2017 and FiLM (arXiv:1709.07871), which look at them through a pretrained
# ResNet-101; here a ResNet of 0.6 M parameters learns with the rest. No augmentation: crops lose what is counted, and
# mirrored images have other answers. Batch norms see the images of one process, so that a run on several differs
# a little.
#
# Leaves in outputs/clevr: the checkpoint, results.json with accuracy by family of questions on val, by which the
# epoch was chosen, and predictions.jsonl for test, whose answers are not public.
#
# Estimate, not measured, of training alone; small layers keep a GPU far from its speed:
#   images    70,000 x 0.44 GFLOP
#   questions   699,989 x 0.097 GFLOP
#   training    x 3 x 20 epochs = 5.9e+15 FLOP
#   time        1.6 hours at 1 TFLOP/s
#   memory      6 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 64 images with 10 questions each: 640 questions a step.
launch run_vqa.py 64 \
  --benchmark clevr --image_size 224 \
  --learning_rate 1e-3 --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine --num_train_epochs 20 \
  --dataloader_num_workers 8 --per_device_eval_batch_size 64 \
  --output_dir outputs/clevr \
  "$@"
