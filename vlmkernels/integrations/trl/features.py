"""Image features of a frozen vision tower, made once for all passes over a generation batch."""

from dataclasses import replace

import torch

from vlmkernels.models.image_features import encode_images
from vlmkernels.models.inputs import Batch, concat


class Features:
    """Prompts seen so far, each once: as they came, and with features in place of pixels."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.forget()

    def forget(self) -> None:
        self._seen: Batch | None = None
        self._encoded: Batch | None = None

    def of(self, prompts: Batch) -> Batch:
        """``prompts``, each of them once, with features in place of pixels."""
        if "pixel_values" not in prompts.inputs:
            return prompts
        batches = [prompts] if self._seen is None else [self._seen, prompts]
        known = concat(batches, pad_token_id=0)
        held, original = len(known) - len(prompts), known.originals()
        new = [index for index in range(held, len(known)) if original[index] == index]
        if new:
            fresh = known.select(torch.tensor(new))
            fresh = encode_images(self.model, replace(fresh, image_keys=fresh.equal_images()))
            self._encoded = fresh if self._encoded is None else concat([self._encoded, fresh], pad_token_id=0)
            self._seen = known.select(torch.tensor([*range(held), *new]))
        place = {index: held + k for k, index in enumerate(new)}
        return self._encoded.select(torch.tensor([place.get(index, index) for index in original[held:].tolist()]))
