"""Direct calls of an op's implementation, past the dispatcher of torch."""

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def needs_dispatcher(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on these tensors has to go through the registered operator.

    The operator is what torch.compile, torch.export, fake and meta tensors, functorch transforms, dispatch modes, tensor
    subclasses and the profiler act on. Where none of these is involved, a ``torch.autograd.Function`` that calls the
    implementation computes the same without the dispatcher, whose work in Python takes longer than the kernels of a small op.

    The first tensor must be given; all are on one type of device, but for scalars.
    """
    if (
        torch.compiler.is_compiling()  # first: torch.compile does not trace what follows
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or tensors[0].is_meta
    ):
        return True
    for x in tensors:  # noqa: SIM110 (a generator costs more)
        # A lazily negated tensor and a symbolic zero have no memory that holds their values.
        if x is not None and (type(x) not in _PLAIN or x.is_neg() or x._is_zerotensor()):
            return True
    return False
