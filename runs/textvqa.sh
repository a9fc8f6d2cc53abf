#!/usr/bin/env bash
# TextVQA: questions about what is written in photographs, answered from a list.
#
#   runs/textvqa.sh --data_dir TextVQA                       official files
#   runs/textvqa.sh                                          the Hub's copies, about 8 GB
#   CHECKPOINT=outputs/vqav2 runs/textvqa.sh --data_dir TextVQA      goes on from VQAv2
#
# Data, of https://textvqa.org/dataset/, unpacked into one folder: TextVQA_0.5.1_{train,val,test}.json, for the words
# that Rosetta read TextVQA_Rosetta_OCR_v0.2_{train,val,test}.json, and train_images/ and test_images/.
#
# Settings: those of vqav2.sh. HiViLT's own: it reads as many words of the image as M4C does, 50, after the
# question, but chooses from the answers of two training questions or more and cannot copy a word, so that the log
# names a limit. No flag sets the length of texts: they are cut where the text encoder ends, which for BERT is 512
# tokens and far enough; a text encoder from scratch would cut them at 64. No mirroring and no crops, which change
# what is written.
#
# Leaves in outputs/textvqa: the checkpoint, results.json, predictions.jsonl, submission.json. Papers report val.
#
# Estimate, not measured, of training alone; 120 tokens a question, with the words:
#   images    21,953 x 114 GFLOP
#   questions   34,602 x 25.4 GFLOP
#   training    x 3 x 10 epochs = 1e+17 FLOP
#   time        0.28 hours at 100 TFLOP/s
#   memory      30 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 64 images with 1.6 questions each: 101 questions a step.
launch run_vqa.py 64 \
  --benchmark textvqa \
  "${encoders[@]}" \
  --learning_rate 1e-4 --vision_learning_rate 2e-5 --text_learning_rate 2e-5 \
  --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine --num_train_epochs 10 \
  --rand_augment 2 7 \
  --bf16 --dataloader_num_workers 8 --per_device_eval_batch_size 64 \
  --output_dir outputs/textvqa \
  "$@"
