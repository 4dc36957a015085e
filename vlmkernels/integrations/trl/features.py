"""``FeatureCache``: image features of a frozen vision tower, computed once for all passes over a generation batch."""

from dataclasses import replace

import torch

from vlmkernels.models.image_features import encode_images
from vlmkernels.models.inputs import ModelInputs, concat


class FeatureCache:
    """Stores the distinct prompts since the last ``clear()``, with their pixels and with features in place of pixels.

    Args:
        model: the model without adapters, after ``use_image_features``. Call ``clear()`` when its vision tower changes.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.clear()

    def clear(self) -> None:
        """Drop all prompts."""
        self._seen: ModelInputs | None = None
        self._encoded: ModelInputs | None = None

    def encode(self, prompts: ModelInputs) -> ModelInputs:
        """Return ``prompts`` with features in place of pixels."""
        if "pixel_values" not in prompts.inputs:
            return prompts
        known = prompts if self._seen is None else concat([self._seen, prompts], pad_token_id=0)
        num_seen = len(known) - len(prompts)
        original = known.originals()
        new = [index for index in range(num_seen, len(known)) if original[index] == index]
        if new:
            fresh = known.select(torch.tensor(new))
            fresh = encode_images(self.model, replace(fresh, image_keys=fresh.equal_images()))
            fresh = replace(fresh, image_keys=None)  # keys of different calls cannot be compared
            self._encoded = fresh if self._encoded is None else concat([self._encoded, fresh], pad_token_id=0)
            self._seen = known.select(torch.tensor([*range(num_seen), *new]))
        place = {index: num_seen + k for k, index in enumerate(new)}
        return self._encoded.select(torch.tensor([place.get(index, index) for index in original[num_seen:].tolist()]))
