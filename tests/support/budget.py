"""How far a result may be from the exact one."""

import torch


def assert_within_budget(
    name: str, actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, scale: float | None = None
) -> None:
    """max |actual - exact| <= 2 max |eager - exact| + eps scale, with eps of the dtype of ``actual``.

    ``scale`` is max |exact|, or that of the terms that it is the sum of, where they cancel.

    ``exact`` is the fp64 reference, ``eager`` the reference in the dtype under test: the budget comes from the data, not from
    a tolerance that somebody chose.
    """
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, eager has {eager.dtype}"
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, exact has {tuple(exact.shape)}"
    if not exact.numel():
        return
    exact = exact.double()
    error = (actual.double() - exact).abs().max().item()
    scale = exact.abs().max().item() if scale is None else scale
    allowed = 2 * (eager.double() - exact).abs().max().item() + torch.finfo(actual.dtype).eps * scale
    assert error <= allowed, f"{name}: error {error:.3e} is over the budget of {allowed:.3e}"
