# Sourced by the recipes, from the root of the repository: what they have in common, and how a run is started.
#
#   NUM_PROCESSES=8   GPUs, one process each; a step has as many images as with one (default 1)
#   FSDP=1            shard the weights over them as runs/fsdp.yaml says (see runs/README.md)
#   CHECKPOINT=...    a HiViLT to go on from, a folder or a name on the Hub, instead of the two encoders of photographs

NUM_PROCESSES=${NUM_PROCESSES:-1}
FSDP=${FSDP:-0}

# Recipes on photographs begin with SigLIP at the field's 384 pixels, and with BERT, as ALBEF and BLIP do.
encoders=(--vision_model google/siglip-base-patch16-384 --text_model google-bert/bert-base-uncased)
if [[ -n "${CHECKPOINT:-}" ]]; then
  encoders=(--model_name_or_path "$CHECKPOINT")
fi

stop() {
  echo "$1" >&2
  exit 2
}

# launch SCRIPT IMAGES FLAG...: trains with so many images a step, on all processes together.
launch() {
  local script=$1 images=$2 starter
  shift 2
  [[ "$NUM_PROCESSES" =~ ^[1-9][0-9]*$ ]] || stop "NUM_PROCESSES: expected a number from 1 on, got '$NUM_PROCESSES'."
  ((images % NUM_PROCESSES == 0)) ||
    stop "NUM_PROCESSES: $NUM_PROCESSES processes cannot share the $images images of a step; take a divisor of it."
  local flags=(--per_device_train_batch_size $((images / NUM_PROCESSES)))

  if [[ "$FSDP" == 1 ]]; then
    starter=(accelerate launch --config_file runs/fsdp.yaml --num_processes "$NUM_PROCESSES")
    # What saves memory instead of chunks, which FSDP cannot have (see RetrievalTrainer).
    local place
    for ((place = 1; place < $#; place++)); do
      if [[ "${!place}" == --contrastive_chunk_size ]]; then
        set -- "${@:1:place-1}" --gradient_checkpointing "${@:place+2}"
      fi
    done
  elif ((NUM_PROCESSES > 1)); then
    # accelerate would start one process where it sees fewer GPUs than two.
    starter=(accelerate launch --multi_gpu --num_processes "$NUM_PROCESSES")
  else
    starter=(python)
    # One process uses one GPU, however many there are.
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
  fi
  "${starter[@]}" "$script" "${flags[@]}" "$@"
}
