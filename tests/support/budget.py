"""How much a result may differ from the exact one."""

import torch


def assert_within_budget(
    name: str, actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, scale: float | None = None
) -> None:
    """Assert max |actual - exact| <= 2 max |eager - exact| + eps scale, where eps is that of the dtype of ``actual``.

    The budget comes from the data; there is no tolerance to choose.

    Args:
        actual: the result under test.
        eager: the result of the reference in the same dtype.
        exact: the result of the reference in fp64.
        scale: by default max |exact|. Where ``exact`` is a sum whose terms cancel, pass the size of the terms.
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
