"""GRPO without a trainer: a custom training loop on the ops.

    python examples/prepare.py digits
    python examples/own_loop.py --model digits/model --dataset digits/train.jsonl --learning_rate 3e-4

The model generates G completions per prompt, ``group_advantages`` compares their rewards within each group, and
``linear_grpo_loss`` computes the loss from hidden states without materializing the full logits. To stay short, the example
leaves out prefix sharing (each prompt and image runs once per group), several optimizer steps per batch, a reference model and
multiple GPUs. ``vlmkernels.train.GRPOTrainer`` supports all of them.
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmkernels import GRPOLossConfig, group_advantages, linear_grpo_loss
from vlmkernels.data.dataset import load_dataset
from vlmkernels.models.families import media_token_ids

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="path or hub name of a vision-language model")
parser.add_argument("--dataset", required=True, help="JSONL file with prompt, image and answer")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--prompts", type=int, default=32, help="prompts per step")
parser.add_argument("--num_generations", type=int, default=8, help="completions per prompt")
parser.add_argument("--max_new_tokens", type=int, default=16)
parser.add_argument("--learning_rate", type=float, default=1e-6)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
processor = AutoProcessor.from_pretrained(args.model, padding_side="left")
tokenizer = processor.tokenizer
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
rows, generator = load_dataset(args.dataset), torch.Generator().manual_seed(0)
config = GRPOLossConfig(loss_type="dapo", epsilon_high=0.28)
torch.manual_seed(0)

for step in range(1, args.steps + 1):
    chosen = [rows[index] for index in torch.randint(len(rows), (args.prompts,), generator=generator).tolist()]
    repeated = [row for row in chosen for _ in range(args.num_generations)]  # the completions of a group are adjacent
    inputs = processor(
        text=[processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in repeated],
        images=[Image.open(row["image"]).convert("RGB") for row in repeated],
        padding=True,
        return_tensors="pt",
    ).to(device)
    prompt_length = inputs["input_ids"].shape[1]

    with torch.no_grad():
        sequences = model.eval().generate(
            **inputs,
            do_sample=True,
            top_k=0,  # the default of transformers, 50, samples from another distribution than the loss assumes
            max_new_tokens=args.max_new_tokens,
            # A sampled image placeholder would refer to an image that does not exist.
            suppress_tokens=media_token_ids(model.config, processor),
        )
    completion_ids = sequences[:, prompt_length:]  # (B, T)
    ended = completion_ids == tokenizer.eos_token_id
    completion_mask = ended.cumsum(1) - ended.int() == 0  # (B, T), up to and including the end-of-sequence token

    texts = tokenizer.batch_decode(completion_ids.where(completion_mask, tokenizer.pad_token_id), skip_special_tokens=True)
    rewards = torch.tensor([float(text.strip() == row["answer"]) for text, row in zip(texts, repeated, strict=True)])
    advantages = group_advantages(rewards.to(device), args.num_generations, scale="batch").advantages  # (B,)

    inputs["input_ids"] = sequences
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], completion_mask.long()], 1)
    if "mm_token_type_ids" in inputs:  # 0 marks text
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([types, types.new_zeros(completion_ids.shape)], 1)
    hidden = model.train().model(**inputs).last_hidden_state[:, prompt_length - 1 : -1]  # (B, T, H): predict completion_ids
    weight = model.get_output_embeddings().weight  # (V, H)
    result = linear_grpo_loss(hidden, weight, completion_ids, advantages, loss_mask=completion_mask, config=config)

    result.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    lengths = completion_mask.sum(1).float()
    print(f"step {step}  reward {rewards.mean():.3f}  loss {result.loss:+.4f}  length {lengths.mean():.1f}", flush=True)
