"""What a trainer tells the conformance suite: an adapter, one method for each part of the trainer that the suite can check."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

import torch

from vlmkernels.conformance.batches import AdvantageBatch, LossBatch, Sample
from vlmkernels.ops.grpo_loss.config import GRPOLossConfig

# The methods of an adapter. A contract names the one that it calls; without it the contract is not applicable.
METHODS = (
    "advantages",
    "loss",
    "logps_from_logits",
    "logps_from_hidden",
    "logps",
    "split",
    "positions",
    "process",
    "sample",
)


class NotApplicable(Exception):
    """An adapter raises this for a case that its trainer does not support. The message says what is not supported."""


class NeedsCUDA(Exception):
    """An adapter raises this for a case that its trainer runs only on a GPU. The message says why."""


def group_size(batch: AdvantageBatch) -> int:
    """Return the size of all groups, for trainers whose groups have num_generations completions."""
    size, *others = set(batch.group_sizes)
    if others:
        raise NotApplicable("all groups have num_generations completions")
    return size


class Sampled(NamedTuple):
    """A completion: the ids that the model sampled, and the ids in the loss. Without padding; with the end token, if any."""

    sampled_ids: list[int]
    trained_ids: list[int]


@dataclass(frozen=True)
class Documented:
    """A difference that a project states in its documentation, a docstring or a comment: a choice, not a fault."""

    contract: str | tuple[str, ...]  # one or more of "contract" or "contract[case]", where * matches any text
    reason: str
    source: str  # the page or the file of the project that states it; if it is a comment in the code: "comment in ..."

    def covers(self, contract: str, case: str) -> bool:
        """Whether it explains a difference in this case of a contract."""
        named = (self.contract,) if isinstance(self.contract, str) else self.contract
        patterns = [each.removesuffix("]").partition("[") for each in named]
        return any(fnmatchcase(contract, name) and fnmatchcase(case, cases or "*") for name, _, cases in patterns)


class Adapter:
    """The parts of a trainer. Subclass it in a file and run ``pytest --conformance FILE``.

    Each method is optional: a contract whose method is missing is reported as not applicable. A method calls the code of the
    trainer; it must not repair its results. Tensors are on the CPU, or on ``device``. A method must not change its arguments,
    and must return the same values if it is called again. The attributes say what the trainer supports: the suite checks their
    product, and a method raises ``NotApplicable`` for the combinations that the trainer refuses.

    Attributes:
        name: the name of the project in the report.
        packages: the distributions whose versions the report shows; the first is the project.
        device: where the suite creates tensors and models.
        dtypes: the dtypes of logits, hidden states and heads from which the trainer computes log-probabilities.
        loss_dtypes: the dtypes of log-probabilities from which it computes losses.
        loss_types, levels, kl_estimators, corrections, options: the values of the fields of ``GRPOLossConfig`` that the trainer
            supports. ``kl_estimators`` are for beta > 0. ``options`` are further fields, each checked by itself, as
            ``{"delta": 4.0}``.
        masks: "padding": the completion, then padding; "holes": also tokens within the completion that are not in the loss;
            "nonfinite": values outside of the mask may be NaN or infinite.
        scales, baselines: the arguments ``scale`` and ``baseline`` of ``group_advantages``.
        unequal_groups, unscored, several_rewards: whether groups may differ in size, rewards may be NaN (not scored), and there
            may be several reward functions with weights.
        advantage_eps, advantage_ddof: what the trainer adds to the standard deviation, and its degrees of freedom.
        models: the kinds of models that ``logps`` and the methods after it support, of "text" (Qwen2), "qwen2_5_vl" (M-RoPE;
            the patches of all images in one tensor) and "llava" (one tensor of pixels per image).
        documented: differences that the documentation of the project states.
        needs_cuda: methods that need a GPU, with the reason.
    """

    name: ClassVar[str]
    packages: ClassVar[Sequence[str]] = ()
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[Sequence[torch.dtype]] = (torch.float32,)
    loss_dtypes: ClassVar[Sequence[torch.dtype]] = (torch.float32,)

    loss_types: ClassVar[Sequence[str]] = ("grpo",)
    levels: ClassVar[Sequence[str]] = ("token",)
    kl_estimators: ClassVar[Sequence[str]] = ()
    corrections: ClassVar[Sequence[str]] = ()
    options: ClassVar[Mapping[str, Any]] = {}
    masks: ClassVar[Sequence[str]] = ("padding",)

    scales: ClassVar[Sequence[str]] = ("group",)
    baselines: ClassVar[Sequence[str]] = ("mean",)
    unequal_groups: ClassVar[bool] = False
    unscored: ClassVar[bool] = False
    several_rewards: ClassVar[bool] = False
    advantage_eps: ClassVar[float] = 1e-4
    advantage_ddof: ClassVar[int] = 1

    models: ClassVar[Sequence[str]] = ("text",)
    documented: ClassVar[Sequence[Documented]] = ()
    needs_cuda: ClassVar[Mapping[str, str]] = {}

    source: str = ""  # what ``load`` found this adapter by; set there

    @property
    def expression(self) -> str:
        """The code that makes this adapter, for reproductions."""
        return f"load({self.source!r})" if self.source else f"{type(self).__name__}()"

    @property
    def version(self) -> str:
        """The version of the project."""
        return importlib.metadata.version(self.packages[0]) if self.packages else ""

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        """Return the advantage of each completion, (N,)."""
        raise NotImplementedError

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        """Return the scalar on which this process calls ``backward`` for one micro-batch.

        The loss of the whole batch is the sum over the micro-batches (``batch.accumulation_steps`` of them) of this scalar,
        averaged over the processes (``batch.num_processes``), as DistributedDataParallel averages gradients. It is
        differentiable by ``batch.logps``.
        """
        raise NotImplementedError

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the log-probabilities of ``targets`` (B, T) under ``logits`` (B, T, V) / temperature: (B, T).

        Differentiable by ``logits``. Position t of the logits predicts target t.
        """
        raise NotImplementedError

    def logps_from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """Return the same from the hidden states (B, T, H) and the output head (V, H): (B, T).

        Differentiable by ``hidden`` and ``weight``.
        """
        raise NotImplementedError

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        """Return the log-probabilities of the completion of each sample, (C,) each, as the trainer computes them in its loss.

        The trainer processes prompts and images, pads or packs the samples into one batch, and runs the model. Differentiable
        by the parameters of the model.
        """
        raise NotImplementedError

    def split(
        self, inputs: dict[str, torch.Tensor], num_images: Sequence[int], num_chunks: int
    ) -> list[dict[str, torch.Tensor]]:
        """Cut a processed batch of B samples into ``num_chunks`` micro-batches of adjacent samples.

        Args:
            inputs: the tensors that the processor returned for the whole batch.
            num_images: (B,): the number of images of each sample.
            num_chunks: divides B.
        """
        raise NotImplementedError

    def positions(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the position ids with which the trainer runs the model, (B, S) or (axes, B, S).

        ``inputs`` are those of the model for a padded batch: input_ids, attention_mask and the inputs of images. The last three
        axes are M-RoPE's time, height and width.
        """
        raise NotImplementedError

    def process(self, processor: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return the inputs of the model for the prompts of the samples, without completions, as the trainer makes them."""
        raise NotImplementedError

    def sample(
        self, model: Any, processor: Any, samples: Sequence[Sample], num_generations: int, max_tokens: int, temperature: float
    ) -> list[Sampled]:
        """Sample ``num_generations`` completions for each prompt, and return them in order of prompts."""
        raise NotImplementedError

    @classmethod
    def has(cls, method: str) -> bool:
        """Whether the adapter defines this method."""
        return getattr(cls, method) is not getattr(Adapter, method)
