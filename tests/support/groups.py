"""Prompts, completions and models for tests that run groups of completions behind one prompt."""

from functools import cache

import torch
import transformers
from packaging.version import Version

from support import tiny, tiny_families
from vlmkernels.data.samples import encode, read_sample
from vlmkernels.models.families import family_of
from vlmkernels.models.inputs import ModelInputs

MODELS = {"qwen2-vl": tiny.qwen2_vl, "qwen2.5-vl": tiny.vlm, "qwen3-vl": tiny.qwen3_vl, "qwen2": tiny.text_model}
EOS, PAD, LENGTH = [5, 12, 30, 37], 0, 12
# The families whose groups may share one prompt.
REFUSED = {"lfm2_vl"} if Version(transformers.__version__) < Version("5.22") else set()
SHARING = [name for name in tiny_families.BUILDERS if name not in REFUSED]


@cache
def processed(name: str, *chosen: int) -> ModelInputs:
    """The chosen samples (by default all) of a case of ``tiny_families``, from one call of its processor."""
    case = tiny_families.case(name)
    samples = [case.samples[index] for index in chosen] or case.samples
    counts = [
        torch.tensor([len(media) for media in kind]) for kind in zip(*((s.images, s.videos) for s in samples), strict=True)
    ]
    return ModelInputs.from_processor(case.inputs(*chosen), family_of(case.model.config), *counts)


def prompts_of(images, model):
    """Prompts of different lengths. images: the number of images of each."""
    samples = []
    for index, number in enumerate(images):
        row = {"prompt": [{"role": "user", "content": "what is " + "it?" * (index + 1)}]}
        if number:
            row["images"] = [tiny.image(10 * index + k, width=28 * (1 + k)) for k in range(number)]
        samples.append(read_sample(row, index))
    return encode(samples, tiny.processor() if any(images) else tiny.tokenizer(), family_of(model.config))


def completions_of(lengths, vocab=30):
    """Random completions of the given lengths: (B, C) ids and mask, right-padded."""
    rng = torch.Generator().manual_seed(sum(lengths))
    width = max(lengths, default=0)
    ids = torch.randint(vocab, (len(lengths), width), generator=rng)
    return ids, torch.arange(width) < torch.tensor(lengths, dtype=torch.int64).unsqueeze(1)


def amplified(model):
    """The model with 4 times larger layer weights, so that its predictions depend on the previous tokens."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers." in name and weight.dim() == 2:
                weight *= 4
    return model.eval()
