"""A cost model of a GRPO step, which predicts its tokens, operations, time and memory before the run. See docs/scale.md.

| module | purpose |
| --- | --- |
| ``shape`` | the sizes of a model, read from its configuration |
| ``mixers`` | attention, windows and recurrences of the layers of a decoder, and pairs of tokens |
| ``workload`` | the configuration of a step, and its numbers of tokens |
| ``machine``, ``calibration`` | the rates of a device, from data sheets or measured on this CPU |
| ``layers`` | bytes per token of a transformer layer |
| ``costs``, ``memory`` | operations and memory traffic of each pass; peak memory |
| ``step`` | the phases of a step, with their time and limiting resource |
| ``fit`` | a search for a plan that fits into given memory |
"""

from vlmkernels.plan.calibration import calibrate
from vlmkernels.plan.fit import Fit, fit
from vlmkernels.plan.machine import MACHINES, Machine
from vlmkernels.plan.shape import MODELS, ModelShape
from vlmkernels.plan.step import Plan, plan
from vlmkernels.plan.workload import Workload

__all__ = ["MACHINES", "MODELS", "Fit", "Machine", "ModelShape", "Plan", "Workload", "calibrate", "fit", "plan"]
