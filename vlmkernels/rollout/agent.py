"""What a run needs to sample with tools: the tools, their worker processes, and the model's format of calls and results."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlmkernels.data.samples import Sample, tokenizer_of
from vlmkernels.models.families import Family
from vlmkernels.rollout.episodes import Episodes, environment_of
from vlmkernels.rollout.turns import TurnEncoder
from vlmkernels.tools.calls import CallParser
from vlmkernels.tools.functions import Tools
from vlmkernels.tools.options import ToolOptions
from vlmkernels.tools.pool import ToolPool


class Agent:
    """Starts the conversations of batches.

    Args:
        options: how tools are called.

    Attributes:
        pool: the worker processes. They are forked when this object is built, so build it before a large model is loaded.
    """

    def __init__(self, tools: Tools, options: ToolOptions | None = None) -> None:
        self.tools, self.options = tools, ToolOptions() if options is None else options
        self.pool = ToolPool(
            tools,
            timeout=self.options.tool_timeout,
            max_images=self.options.max_tool_images,
            limits=self.options.limits,
        )

    def prepare(
        self,
        processor: Any,
        family: Family,
        chat_template_kwargs: dict[str, Any] | None = None,
        processor_arguments: dict[str, Any] | None = None,
        end_tokens: Sequence[int] = (),
    ) -> "Agent":
        """Detect the model's formats of tool calls and results. Call it before ``episodes``.

        Args:
            processor, family, chat_template_kwargs, processor_arguments, end_tokens: see ``TurnEncoder``.

        Returns:
            ``self``.

        Raises:
            ValueError: the chat template does not render tools or their results, or its format of calls is unknown.
        """
        self.encoder = TurnEncoder(processor, family, chat_template_kwargs, processor_arguments, end_tokens)
        self.parser = CallParser(tokenizer_of(processor), processor.chat_template, tool_format=self.options.tool_format)
        return self

    def check_row(self, row: Mapping[str, Any], where: str) -> None:
        """Check that the tools can be used with a row of a dataset.

        Args:
            where: name of the dataset and index of the row, for the error message.

        Raises:
            ValueError: the prompt is a string, or ``environment`` is not the name of an environment.
        """
        try:
            environment_of(row, self.tools)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def episodes(self, samples: Sequence[Sample], num_generations: int, seed: int | None = None) -> Episodes:
        """Reset the environments and return the conversations of ``num_generations`` trajectories per sample.

        Args:
            num_generations: trajectories per sample.
            seed: seeds the random numbers of Python, NumPy and torch in each trajectory's worker, so that a resumed run repeats
                a batch. None: not seeded.
        """
        self.pool.clear()  # trajectories of a batch that failed
        return Episodes(
            samples,
            num_generations,
            self.tools,
            self.pool,
            self.encoder,
            self.parser,
            max_iterations=self.options.max_tool_calling_iterations,
            seed=seed,
        )

    def close(self) -> None:
        """End the worker processes."""
        self.pool.close()
