"""The rows of linear_logps with the compiled module: backends "cpp" and "cuda"."""

import torch

from vlmkernels.ops.launch import DTYPES, Launcher, address, unsupported_dtype


class Native(Launcher):
    def unsupported(self, hidden: torch.Tensor) -> str | None:
        return unsupported_dtype(hidden)

    def params(self, logits, hidden_dtype, selected, head, **fields):
        """Build the Params struct from the fields that every stage reads, and ``fields``."""
        return self.module.LinearLogps(
            logits=address(logits),
            dtype=DTYPES[logits.dtype],
            num_rows=logits.shape[0],
            vocab=logits.shape[1],
            targets=address(selected.targets),
            inverse=head.inverse,
            softcap=head.softcap or 0.0,
            logit_scale=head.logit_scale,
            operand_dtype=DTYPES[hidden_dtype],
            logp=address(selected.logp),
            entropy=address(selected.entropy),
            stats=address(selected.stats),
            **fields,
        )

    def reading(self, logits, hidden, head):
        """Return the fields of the stage that reads the logits."""
        fields = {"read": True}
        if logits.dtype != torch.float32:
            fields |= {
                "hidden": address(hidden),
                "weight": address(head.weight),
                "bias": address(head.bias),
                "width": hidden.shape[1],
                "hidden_stride": hidden.stride(0),
                "weight_stride": head.weight.stride(0),
                "weight_step": head.weight.stride(1),
            }
        return fields

    def writing(self, out):
        """Return the fields of the stage that writes the gradient of the logits to ``out``."""
        return {"write": True, "dlogits": address(out), "dlogits_stride": out.stride(0)}

    def fwd(self, logits, hidden, selected, head) -> None:
        params = self.params(logits, hidden.dtype, selected, head, **self.reading(logits, hidden, head))
        self.launch("linear_logps", params, logits.device)

    def bwd(self, logits, selected, head, out) -> None:
        fields = {"dlogp": address(selected.dlogp), "dentropy": address(selected.dentropy), **self.writing(out)}
        params = self.params(logits, out.dtype, selected, head, **fields)
        self.launch("linear_logps", params, logits.device)
