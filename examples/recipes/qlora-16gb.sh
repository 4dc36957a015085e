#!/usr/bin/env bash
# QLoRA on one GPU with 16 GB: lora-24gb.sh with the linear layers in 4 bits. Needs bitsandbytes: pip install '.[qlora]'
#
#     MODEL=Qwen/Qwen2.5-VL-7B-Instruct DATASET=train.jsonl bash examples/recipes/qlora-16gb.sh
#
# Not run on a 16 GB GPU yet. `vlmkernels plan` predicts a peak of 11.9 GiB and a step of 43 s with images of 672 x 672 and the
# rates of an RTX 4090, with a reserve of 1.5 GiB:
#     vlmkernels plan --model qwen2.5-vl-7b --machine rtx-4090 --image_size 672 --lora_r 32 --checkpointing \
#         --microbatch_tokens 4096 --weights nf4
set -eu

exec bash "$(dirname "$0")/lora-24gb.sh" \
    --output_dir "${OUTPUT:-qlora-run}" \
    --model_init_kwargs '{"dtype": "bfloat16", "quantization_config": {"load_in_4bit": true}}' \
    --max_tokens_per_microbatch 4096 \
    "$@"
