"""Image-text alignment: CLIPScore, by any CLIP or SigLIP model of transformers."""

import torch

from vlmkernels.ops.checks import require, require_positive
from vlmkernels.rewards.answers import find_answer, text_of
from vlmkernels.rewards.batch import Unparsed


def clip_score(image_features: torch.Tensor, text_features: torch.Tensor, *, scale: float = 2.5) -> torch.Tensor:
    """``scale * max(cos(image, text), 0)``, (N,) fp32. image_features, text_features: (N, D).

    Source: https://arxiv.org/abs/2104.08718
    """
    cosine = torch.nn.functional.cosine_similarity(image_features.float(), text_features.float())
    return scale * cosine.clamp(min=0)


class ClipScore:
    """CLIPScore of a completion's answer with its image. Each image is encoded once, however many completions it has. None
    where there is no image, 0 where the answer cannot be parsed.

    Args:
        model: the path of a CLIP or SigLIP model and its processor, or the model itself, with ``processor``.
        device: where it runs; by default CUDA where there is one.
        batch_size: images, and texts, at a time.
        prefix: what precedes a text, the paper's "A photo depicts" by default.
        scale: the paper's 2.5.
        image: the index of the image, where a sample has several.

    Texts are cut at the model's length, so a text that only begins well scores well.
    """

    __name__ = "clip_score"

    def __init__(
        self,
        *,
        model,
        processor=None,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        prefix: str = "A photo depicts ",
        scale: float = 2.5,
        image: int = 0,
    ):
        require_positive("batch_size", batch_size)
        require_positive("scale", scale)
        if isinstance(model, str):
            from transformers import AutoModel, AutoProcessor

            processor = AutoProcessor.from_pretrained(model, trust_remote_code=False) if processor is None else processor
            model = AutoModel.from_pretrained(model, trust_remote_code=False)
        require(processor is not None, "processor", "be given with a model that is no path", None)
        for name in ("get_image_features", "get_text_features"):
            require(hasattr(model, name), "model", f"be a CLIP or SigLIP model, with {name}", type(model).__name__, TypeError)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, self.processor = model.eval().to(self.device), processor
        self.batch_size, self.prefix, self.scale, self.image = batch_size, prefix, scale, image

    columns = ()

    def __call__(self, completions: list, images: list, **columns) -> list[float | None]:
        texts = [find_answer(text_of(completion)) for completion in completions]
        chosen = [i for i, (t, own) in enumerate(zip(texts, images, strict=True)) if t and len(own) > self.image]
        scores: list[float | None] = [Unparsed(0.0) if len(own) > self.image else None for own in images]
        if not chosen:
            return scores
        unique = {id(images[i][self.image]): images[i][self.image] for i in chosen}
        row = {key: index for index, key in enumerate(unique)}
        with torch.inference_mode():
            pictures = self._encode(list(unique.values()), self._image_features)
            words = self._encode([self.prefix + texts[i] for i in chosen], self._text_features)
            values = clip_score(pictures[[row[id(images[i][self.image])] for i in chosen]], words, scale=self.scale)
        for index, value in zip(chosen, values.tolist(), strict=True):
            scores[index] = value
        return scores

    def _encode(self, items: list, features) -> torch.Tensor:
        parts = [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        found = [features(part) for part in parts]
        return torch.cat([f if isinstance(f, torch.Tensor) else f.pooler_output for f in found])

    def _image_features(self, images: list):
        inputs = self.processor(images=images, return_tensors="pt")
        return self.model.get_image_features(**inputs.to(self.device))

    def _text_features(self, texts: list[str]):
        length = self.model.config.get_text_config().max_position_embeddings
        inputs = self.processor(text=texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.model.get_text_features(**inputs.to(self.device))
