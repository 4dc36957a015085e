"""Image-text alignment: CLIPScore with any CLIP or SigLIP model of transformers."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlmkernels.ops.checks import require_positive
from vlmkernels.rewards.answers import Messages, find_answer, text_of
from vlmkernels.rewards.batch import Unparsed

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin


def clip_score(image_features: torch.Tensor, text_features: torch.Tensor, *, scale: float = 2.5) -> torch.Tensor:
    """Compute CLIPScore from features: ``scale * max(cos(image, text), 0)``.

    Args:
        image_features, text_features: (N, D).
        scale: factor of the cosine similarity.

    Returns:
        (N,) fp32.

    Source: https://arxiv.org/abs/2104.08718
    """
    cosine = torch.nn.functional.cosine_similarity(image_features.float(), text_features.float())
    return scale * cosine.clamp(min=0)


class ClipScore:
    """CLIPScore of a completion's answer with its image. A sample without the image is not scored; a completion without
    an answer gets 0.

    An image with several completions is encoded once. Answers are truncated to the model's maximum length.

    Args:
        model: path of a CLIP or SigLIP model and its processor, or a loaded model.
        processor: processor of the model. Default: loaded from ``model``, if that is a path.
        device: device of the model. Default: CUDA if available, else the CPU.
        batch_size: number of images, or texts, per forward pass.
        prefix: text in front of each answer. The default is the paper's.
        scale: factor of the cosine similarity. The default is the paper's.
        image: index of the image in samples with several images.
    """

    __name__ = "clip_score"
    columns = ()

    def __init__(
        self,
        *,
        model: "str | PreTrainedModel",
        processor: "ProcessorMixin | None" = None,
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

            if processor is None:
                processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)  # type: ignore[no-untyped-call]
            loaded = AutoModel.from_pretrained(model, trust_remote_code=False)
        else:
            loaded = model
        if processor is None:
            raise ValueError("processor must be given when model is a loaded model, got None")
        for name in ("get_image_features", "get_text_features"):
            if not hasattr(loaded, name):
                raise TypeError(f"model must be a CLIP or SigLIP model with {name}, got {type(loaded).__name__}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, self.processor = loaded.eval().to(self.device), processor
        self.batch_size, self.prefix, self.scale, self.image = batch_size, prefix, scale, image

    def __call__(
        self, completions: Sequence[str | Messages], images: "list[list[Image]]", **columns: Any
    ) -> list[float | None]:
        texts = [find_answer(text_of(completion)) for completion in completions]
        chosen = [i for i, (t, own) in enumerate(zip(texts, images, strict=True)) if t and len(own) > self.image]
        scores: list[float | None] = [Unparsed(0.0) if len(own) > self.image else None for own in images]
        if not chosen:
            return scores
        unique = {id(images[i][self.image]): images[i][self.image] for i in chosen}
        row = {key: index for index, key in enumerate(unique)}
        with torch.inference_mode():
            of_images = self._encode(list(unique.values()), self._image_features)
            of_texts = self._encode([f"{self.prefix}{texts[i]}" for i in chosen], self._text_features)
            rows = [row[id(images[i][self.image])] for i in chosen]
            values = clip_score(of_images[rows], of_texts, scale=self.scale)
        for index, value in zip(chosen, values.tolist(), strict=True):
            scores[index] = value
        return scores

    def _encode(self, items: Sequence[Any], features: Callable[[Any], Any]) -> torch.Tensor:
        batches = [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        outputs = [features(batch) for batch in batches]
        return torch.cat([x if isinstance(x, torch.Tensor) else x.pooler_output for x in outputs])

    def _image_features(self, images: "list[Image]") -> Any:
        inputs = self.processor(images=images, return_tensors="pt")
        return self.model.get_image_features(**inputs.to(self.device))

    def _text_features(self, texts: list[str]) -> Any:
        length = self.model.config.get_text_config().max_position_embeddings
        inputs = self.processor(text=texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.model.get_text_features(**inputs.to(self.device))
