"""What a step costs before it is run: tokens, operations, bytes and seconds of a configuration, by a model of the costs."""

from vlmkernels.plan.machine import MACHINES, Machine, calibrate
from vlmkernels.plan.shape import MODELS, ModelShape
from vlmkernels.plan.step import Plan, plan
from vlmkernels.plan.workload import Workload

__all__ = ["MACHINES", "MODELS", "Machine", "ModelShape", "Plan", "Workload", "calibrate", "plan"]
