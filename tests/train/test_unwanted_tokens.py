"""The tokens that ``completions/frac_special_tokens`` counts."""

import torch
from support import tiny

from vlmkernels.train.setup import unwanted_tokens


def test_media_padding_and_ids_without_a_token():
    model, processor = tiny.vlm(), tiny.processor()
    tokenizer, rows = processor.tokenizer, model.get_input_embeddings().num_embeddings
    names = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    ids = tokenizer.convert_tokens_to_ids(names)
    missing = set(range(model.config.get_text_config().vocab_size)) - set(tokenizer.get_vocab().values())
    unwanted = unwanted_tokens(model, processor, [tokenizer.eos_token_id], rows)
    assert set(unwanted.nonzero()[:, 0].tolist()) == {*ids, *missing}
    assert unwanted.dtype == torch.bool
    ends = unwanted_tokens(model, processor, [tokenizer.eos_token_id, ids[0]], rows)  # padding that ends a completion
    assert set(ends.nonzero()[:, 0].tolist()) == {*ids[1:], *missing}
