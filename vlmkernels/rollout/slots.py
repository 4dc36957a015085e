"""The slots in which completions are decoded, and the device buffers of a decoding step."""

import torch

from vlmkernels.ops.sample_logps import SampledTokens


def bucket(count: int, limit: int) -> int:
    """Return the smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least ``count``, and at most ``limit``."""
    power = 1 << max(count - 1, 0).bit_length()
    return min(3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power, limit)


class Slots:
    """Which completion each slot holds, and the state of a decoding step.

    A step runs the first ``width`` slots, a bucket size. Among them are slots that no completion holds: their results are
    dropped, which costs less than to move a completion to a free slot and to capture a graph for another number of slots.

    Args:
        count: S, the number of slots.
        num_completions: B.
        budget: C, the maximum number of tokens of a completion.
        device: where the buffers are.

    Attributes:
        completions: for each slot its completion, or None.
        width: the number of slots in a step.
        changed: whether the buffers do not have the state of the slots.
        state: (5, S) int64. For each slot the last token of its completion, the place of the next one (``TokenSampler``), the
            position of the last token, the place of the last token that the budget allows, and the place from which the
            completion may end. A completion that has ended gets the place ``nowhere`` until the host frees the slot.
        values: (2, B * C + 1) fp32, logps and log_kept_mass by place.
    """

    def __init__(self, count: int, num_completions: int, budget: int, device: torch.device) -> None:
        self.completions: list[int | None] = [None] * count
        self.width, self.changed = 0, True
        self.num_completions, self.budget = num_completions, budget
        self.nowhere = num_completions * budget
        self.no_completion = (0, self.nowhere, 0, 0, 0)
        self.state = torch.tensor([self.no_completion] * count).T.contiguous().to(device)
        self.values = torch.zeros(2, self.nowhere + 1, dtype=torch.float32, device=device)

    @property
    def occupied(self) -> list[int]:
        """The completions in slots."""
        return [k for k in self.completions if k is not None]

    def put(self, k: int) -> int:
        """Put a completion into the first free slot, and return the slot."""
        slot = self.completions.index(None)
        self.completions[slot], self.changed = k, True
        return slot

    def free(self, slot: int) -> None:
        """Free a slot."""
        self.completions[slot], self.changed = None, True

    def compact(self) -> tuple[list[int], list[int]]:
        """Move completions into the first slots if a step can then be of a smaller bucket: from which slots to which."""
        smallest = bucket(len(self.occupied), len(self.completions))
        sources = [slot for slot, k in enumerate(self.completions) if k is not None and slot >= smallest]
        targets = [slot for slot, k in enumerate(self.completions[:smallest]) if k is None][: len(sources)]
        for source, target in zip(sources, targets, strict=True):
            self.completions[target], self.completions[source] = self.completions[source], None
        return sources, targets

    def arranged(self) -> list[int | None]:
        """Set ``width`` to the bucket of the occupied slots, and return the completions in the slots of a step."""
        last = max(slot for slot, k in enumerate(self.completions) if k is not None)
        self.width = bucket(last + 1, len(self.completions))
        return self.completions[: self.width]

    def upload(self, rows: list[tuple[int, ...]]) -> None:
        """Copy the state of the slots of a step to the device."""
        self.state[:, : self.width].copy_(torch.tensor(rows).T, non_blocking=True)
        self.changed = False

    def store(self, places: torch.Tensor, sampled: SampledTokens) -> None:
        """Store the values of sampled tokens. Does not wait for the device."""
        self.values.index_copy_(1, places, torch.stack([sampled.logps, sampled.log_kept_mass]).to(self.values.dtype))

    def values_of_completions(self) -> torch.Tensor:
        """Return logps and log_kept_mass, (2, B, C)."""
        return self.values[:, :-1].unflatten(1, (self.num_completions, self.budget))
