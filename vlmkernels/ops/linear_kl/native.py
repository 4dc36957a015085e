"""The rows of linear_kl with the compiled module: backends "cpp" and "cuda"."""

import torch

from vlmkernels.ops.launch import DTYPES, Launcher, address, unsupported_dtype


class Native(Launcher):
    def unsupported(self, *tensors: torch.Tensor) -> str | None:
        return next(filter(None, map(unsupported_dtype, tensors)), None)

    def side(self, logits, head):
        """Build the struct of one side."""
        return self.module.LinearKlSide(
            logits=address(logits),
            dtype=DTYPES[logits.dtype],
            inverse=head.inverse,
            softcap=head.softcap or 0.0,
            logit_scale=head.logit_scale,
        )

    def run(self, logits, teacher_logits, rows, pair, **stages) -> None:
        params = self.module.LinearKl(
            student=self.side(logits, pair.student),
            teacher=self.side(teacher_logits, pair.teacher),
            num_rows=logits.shape[0],
            vocab=logits.shape[1],
            beta=pair.beta,
            divergence=address(rows.divergence),
            stats=address(rows.stats),
            **stages,
        )
        self.launch("linear_kl", params, logits.device)

    def writing(self, rows, out):
        """Return the fields of the stage that writes the gradient of the student's logits to ``out``."""
        return {
            "write": True,
            "dlogits": address(out),
            "gradient_dtype": DTYPES[out.dtype],
            "dlogits_stride": out.stride(0),
            "upstream": address(rows.upstream),
        }

    def fwd(self, logits, teacher_logits, rows, pair) -> None:
        self.run(logits, teacher_logits, rows, pair, read=True)

    def bwd(self, logits, teacher_logits, rows, pair, out) -> None:
        self.run(logits, teacher_logits, rows, pair, **self.writing(rows, out))

    def sweep(self, logits, teacher_logits, rows, pair, out) -> None:
        self.run(logits, teacher_logits, rows, pair, read=True, **self.writing(rows, out))
