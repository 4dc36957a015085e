"""How tools are called."""

from dataclasses import dataclass, field

from vlmkernels.data.images import ImageLimits
from vlmkernels.ops.checks import require_positive


@dataclass(frozen=True)
class ToolOptions:
    """How tools are called.

    Args:
        max_tool_calling_iterations: turns of a trajectory whose calls are run. None: no limit.
        tool_timeout: seconds before a call fails, or the reset of an environment. None: no limit.
        max_tool_images: maximum number of images that a call may return.
        limits: limits of these images.
        tool_format: how the model writes calls, a name in ``FORMATS``. None: found in the chat template.

    Raises:
        ValueError: a value is out of range.
    """

    max_tool_calling_iterations: int | None = None
    tool_timeout: float | None = 60.0
    max_tool_images: int = 16
    limits: ImageLimits = field(default_factory=ImageLimits)
    tool_format: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_tool_calling_iterations", "max_tool_images"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if self.tool_timeout is not None:
            require_positive("tool_timeout", self.tool_timeout)
