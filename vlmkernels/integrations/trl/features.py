"""``FeatureCache``: image features of a frozen vision tower, computed once for all passes over a generation batch."""

from dataclasses import replace

import torch

from vlmkernels.integrations.trl.segments import single_images
from vlmkernels.models.image_features import encode_images, image_axes
from vlmkernels.models.inputs import ModelInputs, concat
from vlmkernels.models.positions import POSITION_INPUTS


class FeatureCache:
    """Stores the distinct images since the last ``clear()``, with their pixels and their features.

    If the inputs do not tell which rows belong to an image, it stores samples.

    Args:
        model: the model without adapters, after ``use_image_features``. Call ``clear()`` when its vision tower changes.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.clear()

    def clear(self) -> None:
        """Drop all images."""
        self._seen: ModelInputs | None = None
        self._encoded: ModelInputs | None = None

    def encode(self, batch: ModelInputs) -> ModelInputs:
        """Return ``batch`` with features in place of pixels."""
        if "pixel_values" not in batch.inputs:
            return batch
        images = single_images(batch)
        encoded = self._encode(batch if images is None else images).inputs
        replaced = image_axes(batch).keys() - {*POSITION_INPUTS}
        kept = {name: x for name, x in batch.inputs.items() if name not in replaced}
        features = {name: encoded[name] for name in ("image_features", "deepstack_features") if name in encoded}
        tokens = (batch.inputs["input_ids"] == batch.family.image_token_id).sum(1).cpu()
        return replace(batch, inputs=kept | features, rows=batch.rows | {"image_token": tokens})

    def _encode(self, samples: ModelInputs) -> ModelInputs:
        known = samples if self._seen is None else concat([self._seen, samples], pad_token_id=0)
        num_seen = len(known) - len(samples)
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
