"""What the trainer samples with: a rollout engine, chosen by ``use_vllm`` and ``vllm_mode``. See docs/rollout.md."""

from collections.abc import Callable
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from vlmkernels.data.samples import Sample
from vlmkernels.models.inputs import Batch
from vlmkernels.rollout.generate import Generate, Rollout


class RolloutError(RuntimeError):
    """A rollout engine cannot be trusted or reached any more; the message says why."""


class Engine(Protocol):
    """``Generate`` samples with the model itself and needs neither samples nor ``synchronise``; both vLLM engines need both."""

    def synchronise(self, model, step: int) -> dict[str, float]:
        """Give the engine the model's weights of this optimiser step, unless it has them, and check that it got them: metrics.

        Every process calls it. Under FSDP2 the model's parameters are whole (``vlmkernels.train.parallel.gathered``).
        """

    def __call__(
        self, model, prompts: Batch, num_generations: int, temperature: float, samples: list[Sample] | None = None
    ) -> Rollout:
        """Completions of ``prompts``, which are the encoded ``samples``; those of a prompt follow one another. Temperature 0 is
        greedy."""


def make_engine(model, processor, args, accelerator: Accelerator) -> Engine:
    """The engine that ``args`` ask for. Options that it cannot honour, an unreachable server and one of another model are
    refused here, on every process."""
    if not args.use_vllm:
        return Generate(model, processor, args)
    if args.vllm_mode == "server":
        from vlmkernels.rollout.vllm.server import VLLMServer as VLLM
    else:
        from vlmkernels.rollout.vllm.colocate import VLLMColocate as VLLM
    return VLLM(model, processor, args, accelerator)


def on_main_process(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """What ``function()`` returns on the main process, or what it raises there, on every process."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        # As text: not every exception survives pickling.
        sent = [outcome[0], outcome[1] and f"{type(outcome[1]).__name__} on the main process: {outcome[1]}"]
        broadcast_object_list(sent)
        if not accelerator.is_main_process:
            outcome = [sent[0], sent[1] and RolloutError(sent[1])]
    if outcome[1]:
        raise outcome[1]
    return outcome[0]
