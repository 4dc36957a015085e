"""The rows of linear_logps through the compiled module, for the backends "cpp" and "cuda"."""

import torch

from vlmkernels.ops.launch import DTYPES, Launcher, address, unsupported_dtype


class Native(Launcher):
    def unsupported(self, hidden: torch.Tensor) -> str | None:
        return unsupported_dtype(hidden)

    def params(self, logits, hidden_dtype, targets, head, logp, entropy, stats, **fields):
        """The Params struct, with what every stage takes."""
        return self.module.LinearLogps(
            logits=address(logits),
            dtype=DTYPES[logits.dtype],
            num_rows=logits.shape[0],
            vocab=logits.shape[1],
            targets=address(targets),
            inverse=head.inverse,
            softcap=head.softcap or 0.0,
            logit_scale=head.logit_scale,
            operand_dtype=DTYPES[hidden_dtype],
            logp=address(logp),
            entropy=address(entropy),
            stats=address(stats),
            **fields,
        )

    def reading(self, logits, hidden, head):
        """Fields of the stage that reads the logits."""
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
        """Fields of the stage that writes the gradient by the logits to ``out``."""
        return {"write": True, "dlogits": address(out), "dlogits_stride": out.stride(0)}

    def fwd(self, logits, hidden, targets, head, logp, entropy, stats) -> None:
        fields = self.reading(logits, hidden, head)
        params = self.params(logits, hidden.dtype, targets, head, logp, entropy, stats, **fields)
        self.launch("linear_logps", params, logits.device)

    def bwd(self, logits, targets, dlogp, dentropy, logp, entropy, stats, head, out) -> None:
        fields = {"dlogp": address(dlogp), "dentropy": address(dentropy), **self.writing(out)}
        params = self.params(logits, out.dtype, targets, head, logp, entropy, stats, **fields)
        self.launch("linear_logps", params, logits.device)
