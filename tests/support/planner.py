"""A machine with round figures and a small workload, for tests of the planner."""

from vlmkernels.plan import Machine, Workload
from vlmkernels.plan.machine import CALLS

CPU = Machine(
    "cpu", "by hand", "fp32", ((1, 1e9), (100, 3e9)), attention=1e9, attention_backward=1e9, bandwidth=1e9, weights=1e9,
    fresh=1e9, calls=dict.fromkeys(CALLS, 0.001), overlaps=False, memory=1e9,
)  # fmt: skip
SMALL = Workload(
    prompts=2, group_size=3, prompt_tokens=20, completion_tokens=6, width=112, height=56, precision="fp32", weights="fp32"
)
