#!/usr/bin/env bash
# DAQUAR: questions that people wrote about photographs of rooms, on pretrained encoders.
#
#   runs/daquar.sh --data_dir daquar                         official files
#
# Data, of the project's page at the Max Planck Institute for Informatics or a copy of it, in one folder:
# qa.894.raw.{train,test}.txt, or all_qa_pairs.txt with {train,test}_images_list.txt; and images/ with the frames of NYU
# Depth V2, image1.png to image1449.png. No copy on the Hub is known. WUPS is measured where NLTK and its WordNet are
# installed: pip install nltk; python -m nltk.downloader wordnet.
#
# Settings: pixels and learning rates of vqav2.sh, RandAugment (2, 5) of BLIP. HiViLT's own: 20 epochs, since there are
# but 715 images; small crops and no mirroring, for most questions ask what is left or right of something.
#
# Leaves in outputs/daquar: the checkpoint, results.json with accuracy and WUPS, predictions.jsonl.
#
# Estimate, not measured, of training alone; a tenth of the images is held out:
#   images    715 x 114 GFLOP
#   questions   6,085 x 6.5 GFLOP
#   training    x 3 x 20 epochs = 7.3e+15 FLOP
#   time        0.02 hours at 100 TFLOP/s
#   memory      8 GB, a guess
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/launch.sh

# 8 images with 8.5 questions each: 68 questions a step.
launch run_vqa.py 8 \
  --benchmark daquar \
  "${encoders[@]}" \
  --learning_rate 1e-4 --vision_learning_rate 2e-5 --text_learning_rate 2e-5 \
  --weight_decay 0.05 --warmup_steps 0.1 --lr_scheduler_type cosine --num_train_epochs 20 \
  --random_crop 0.8 --rand_augment 2 5 \
  --bf16 --dataloader_num_workers 4 --per_device_eval_batch_size 32 \
  --output_dir outputs/daquar \
  "$@"
