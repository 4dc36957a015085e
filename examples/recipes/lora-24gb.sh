#!/usr/bin/env bash
# LoRA on one GPU with 24 GB.
#
#     MODEL=Qwen/Qwen2.5-VL-3B-Instruct DATASET=train.jsonl bash examples/recipes/lora-24gb.sh
#     MODEL=Qwen/Qwen3-VL-2B-Instruct   DATASET=train.jsonl bash examples/recipes/lora-24gb.sh
#
# DATASET has rows with prompt, image and answer (docs/data.md). Flags after the name of the script override the flags below.
#
# Not run on a 24 GB GPU yet. `vlmkernels plan` predicts a peak of 13.8 GiB and a step of 27 s for the 3B model, and 10.0 GiB and
# 19 s for the 2B model, with images of 672 x 672 on an RTX 4090. Both include a reserve of 1.5 GiB:
#     vlmkernels plan --model qwen2.5-vl-3b --machine rtx-4090 --image_size 672 --lora_r 32 --checkpointing \
#         --microbatch_tokens 8192 --weights bf16
# `vlmkernels plan --fit 24GB --model qwen2.5-vl-3b` finds other configurations that fit.
set -eu

arguments=(
    --model "${MODEL:?set MODEL to a hub name or a path}"
    --dataset "${DATASET:?set DATASET to a .jsonl or .parquet file}"
    --output_dir "${OUTPUT:-lora-run}"
    --reward exact_match --reward think_answer_format

    # Adapters on the attention layers of the decoder. The vision tower is frozen, so each image is encoded once per batch.
    # The frozen weights are in bf16; the adapters are in fp32, as PEFT creates them.
    --model_init_kwargs '{"dtype": "bfloat16"}'
    --lora_r 32 --lora_alpha 64 --lora_target_modules q_proj k_proj v_proj o_proj
    --activation_checkpointing true

    # 8 prompts x 8 completions per step, in splits of at most 8,192 tokens.
    --num_generations 8
    --per_device_train_batch_size 64 --gradient_accumulation_steps 1
    --max_tokens_per_microbatch 8192
    --max_completion_length 512

    --learning_rate 2e-5 --lr_scheduler_type constant_with_warmup --warmup_steps 10
    --max_image_pixels 2000000
    --logging_steps 1 --log_completions true
    --save_steps 50 --save_total_limit 2
)
exec vlmkernels train "${arguments[@]}" "$@"
