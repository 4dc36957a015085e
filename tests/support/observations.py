"""Results of tools for the tiny models, whose chat template has no tools."""

import torch
from PIL import Image

from vlmkernels.models.families import Family
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.rollout.turns import Observation


def result_text(text: str, num_images: int) -> str:
    """What follows a turn: a message with images and a text, and the header of the next turn."""
    images = "<|vision_start|><|image_pad|><|vision_end|>" * num_images
    return f"\n<|im_start|>tool\n{images}{text}<|im_end|>\n<|im_start|>assistant\n"


def observation(text: str, images: list[Image.Image], processor, family: Family) -> Observation:
    """Encode a text of ``result_text`` by itself."""
    inputs = processor(text=[text], **({"images": [images]} if images else {}), return_tensors="pt")
    one = ModelInputs.from_processor(dict(inputs), family, torch.tensor([len(images)]))
    return Observation(one, processor.tokenizer(text)["input_ids"], images)
