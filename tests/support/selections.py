"""Selections of results by ``mask`` and ``rows``, as gather_logps and linear_logps take them."""

import torch

SELECTIONS = ("mask", "rows", "rows+mask", "none selected")


def select(selection: str, targets: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return ``rows`` and ``mask`` of a selection, its targets, and which of 12 rows of logits it uses (on the CPU).

    Args:
        selection: one of ``SELECTIONS``.
        targets: (12,), in [0, 301).
    """
    num, device = len(targets), targets.device
    options, used = {}, torch.ones(num, dtype=torch.bool)
    if selection.startswith("rows"):
        rows = torch.tensor([7, 2, 2, 11, 2, 0, 7])  # out of order, repeated, one target twice
        options["rows"] = rows.to(device)
        targets = torch.tensor([5, 300, 300, 0, 17, 1, 299]).to(device)
        used = torch.zeros(num, dtype=torch.bool).index_fill(0, rows, True)
    if selection.endswith("mask"):
        mask = torch.tensor([True, False, True, True, False, True, False] + [False, True] * 3)[: len(targets)]
        options["mask"] = mask.to(device)
        targets = targets.masked_fill(~options["mask"], -100)
        used = torch.zeros(num, dtype=torch.bool).index_fill(0, rows[mask] if "rows" in options else mask.nonzero()[:, 0], True)
    if selection == "none selected":
        options["mask"], used = torch.zeros(num, dtype=torch.bool, device=device), torch.zeros(num, dtype=torch.bool)
    return options, targets, used
