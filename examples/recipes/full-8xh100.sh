#!/usr/bin/env bash
# Full fine-tuning on 8 x H100: seven GPUs train with FSDP2, one serves vLLM.
#
#     MODEL=Qwen/Qwen2.5-VL-3B-Instruct DATASET=train.jsonl bash examples/recipes/full-8xh100.sh
#     MODEL=Qwen/Qwen3-VL-2B-Instruct   DATASET=train.jsonl bash examples/recipes/full-8xh100.sh
#
# DATASET has rows with prompt, image and answer (docs/data.md). Flags after the name of the script override the flags below.
#
# Not run on 8 x H100 yet: the trainer was measured on one H200; FSDP2 and the vLLM server were tested on CPUs.
# `vlmkernels plan` predicts a peak of 22.6 GiB per training GPU for the 3B model and 17.7 GiB for the 2B model:
#     vlmkernels plan --model qwen2.5-vl-3b --gpus 7 --prompts 56 --engine vllm_server --server_gpus 1 \
#         --completion_tokens 1024 --checkpointing --microbatch_tokens 16384
set -eu

: "${MODEL:?set MODEL to a hub name or a path}" "${DATASET:?set DATASET to a .jsonl or .parquet file}"
here=$(cd "$(dirname "$0")" && pwd)

# The development mode lets any client load weights over HTTP, so keep the server on the loopback interface.
CUDA_VISIBLE_DEVICES=7 VLLM_SERVER_DEV_MODE=1 vllm serve "$MODEL" --host 127.0.0.1 --port 8000 --enable-scale-out &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT

arguments=(
    --model "$MODEL" --dataset "$DATASET" --output_dir "${OUTPUT:-full-run}"
    --reward exact_match --reward think_answer_format
    --rollout_engine vllm_server --vllm_server_base_url http://127.0.0.1:8000 --vllm_weights_dir /dev/shm/vlmkernels-weights

    # 56 prompts x 8 completions per step: 8 prompts on each training GPU, in splits of at most 16,384 tokens.
    --num_generations 8
    --per_device_train_batch_size 64 --gradient_accumulation_steps 1
    --max_tokens_per_microbatch 16384
    --max_completion_length 1024
    --activation_checkpointing true

    --learning_rate 1e-6 --lr_scheduler_type constant_with_warmup --warmup_steps 10
    --logging_steps 1 --log_completions true
    --save_steps 50 --save_total_limit 2
)
CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6 accelerate launch --config_file "$here/../../configs/fsdp2.yaml" --num_processes 7 \
    -m vlmkernels.cli train "${arguments[@]}" "$@"
