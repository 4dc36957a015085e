"""GRPO training on ``transformers.Trainer``, which provides the loop, optimizers, checkpoints, callbacks and loggers.

One generation batch serves ``steps_per_generation * num_iterations`` micro-batches:

    _prepare_inputs      calls _new_experience when the last batch is used up:
      _sample              encodes prompts, samples completions with the engine and calls the reward functions
      group_advantages     computes advantages from the rewards of all processes
      _add_fixed_logps     computes the old and the reference log-probabilities
    compute_loss         runs one micro-batch in splits of at most max_tokens_per_microbatch tokens:
      _split_loss          runs the forward pass; the language-model head computes the loss (``vlmkernels.ops``)
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from vlmkernels.data.dataset import SampleDataset
from vlmkernels.data.resolution import Resolution
from vlmkernels.data.samples import Sample, tokenizer_of
from vlmkernels.models.head import completion_loss, top_entropy_threshold
from vlmkernels.models.image_features import encode_images
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import inference
from vlmkernels.ops.group_advantages import GroupAdvantages, group_advantages
from vlmkernels.ops.group_advantages.turns import turn_advantages
from vlmkernels.ops.grpo_loss.parts import Part, combine_metrics, in_parts
from vlmkernels.record.callback import RunRecord
from vlmkernels.record.phases import Phases, phase
from vlmkernels.record.progress import RewardProgress
from vlmkernels.rewards import Scores
from vlmkernels.rollout.base import Rollout
from vlmkernels.rollout.episodes import Episodes
from vlmkernels.rollout.score import Scored, score_rollout
from vlmkernels.train import checkpoint, parallel, reference, sampler, setup
from vlmkernels.train.agreement import measure_agreement
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.experience import Experience
from vlmkernels.train.faults import FiniteSteps, name_lost_processes
from vlmkernels.train.logs import (
    EvaluatedCompletions,
    MetricBuffer,
    completion_groups,
    image_metrics,
    sampling_metrics,
    step_metrics,
    tool_counts,
    tool_metrics,
)
from vlmkernels.train.micro_batches import MicroBatches, Split
from vlmkernels.train.mismatch import Mismatch
from vlmkernels.train.processes import Processes, describe_process
from vlmkernels.train.run_details import run_details
from vlmkernels.train.updates import UpdateCheck


class GRPOTrainer(checkpoint.CheckpointedTrainer):
    """Trains a vision-language or text model with GRPO. The constructor has the arguments of ``trl.GRPOTrainer``.

    Args:
        model: a model or its path. With beta > 0 the reference is a frozen copy of the model as it is given, or of its adapter
            if it has one, or, with peft_config, the model without adapters.
        reward_funcs: one or more functions, names of built-in functions, import paths, or dicts of a name, a weight and
            options; see ``vlmkernels.rewards.compose``.
        args: see ``GRPOConfig``.
        train_dataset, eval_dataset: rows with a length (``datasets.Dataset``, a list of dicts, ...); see
            ``vlmkernels.data.samples``. Every row is checked. eval_dataset may be a dict of datasets.
        processing_class: the processor or tokenizer of the model. By default it is loaded from the path of the model.
        callbacks, optimizers: see ``transformers.Trainer``.
        peft_config: configuration of adapters to train instead of the model's own weights.
        tools, environment_factory: functions that the model may call while it writes a completion, and a function or class that
            creates the environment of each completion, whose methods the model may call; see docs/tools.md.

    Attributes:
        engine: the rollout engine, which samples the completions.
        prepared: how the policy runs; see ``PreparedPolicy``.
        ref_model: the copy that is the reference, or None.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: str | Callable | dict | list[str | Callable | dict] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        tools: Sequence[Callable] | None = None,
        environment_factory: Callable | Mapping[str, Callable] | None = None,
    ) -> None:
        args = GRPOConfig() if args is None else args
        self.processes = Processes(args.ddp_timeout)
        set_seed(args.seed)  # adapters start from random weights
        with self.processes.stop_together("the set-up"):
            processor, family, num_embeddings = setup.load_processing(model, processing_class, args)
            self.tokenizer = tokenizer_of(processor)
            self.agent = setup.make_agent(tools, environment_factory, args)
            self.rewards = setup.make_rewards(reward_funcs, self.agent, args)
            train_dataset, eval_dataset = data = setup.with_prompts(train_dataset, eval_dataset, self.agent, args)
            self.datasets = setup.check_datasets(data, processor, family, num_embeddings, self.rewards, self.agent, args)
            self.samples = self.datasets.samples(train_dataset, "train_dataset")
            model = setup.load_policy(model, processor, peft_config, args)
        super().__init__(
            model=model, args=args, data_collator=list, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=processor, callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = True  # compute_loss normalizes over the accumulated batch; see training_step
        parallel.check_parallelism(self.accelerator, model, args.n_gpu)
        self.processes.compare(**describe_process(args, model, self.tokenizer, self.rewards, train_dataset))
        self.prepared = setup.prepare_policy(model, processor, args, self.accelerator, self.datasets.media)
        self.reference_adapter = reference.adapter_state(model)
        self.ref_model, self.ref_head = setup.load_reference(model, self.prepared, args, self.accelerator)
        self.engine = setup.prepare_engine(model, processor, self.prepared, args, self.accelerator)
        if self.agent is not None:
            options = args.chat_template_kwargs, self.prepared.processor_arguments, self.engine.sampling.eos_token_id
            self.agent.prepare(processor, family, *options)
        self.loss_config, self.resolutions = args.loss_config(), args.resolution_schedule()
        self.mismatch = Mismatch(self.loss_config, args.rollout_policy)
        self.micro_batches = MicroBatches(self.prepared, args, self.accelerator)
        self._finite_steps = FiniteSteps(self.accelerator, args.on_nonfinite)
        self._experience: Experience | None = None
        # With advantages and whether the loss counts any of their tokens, for log_completions.
        self._last_scored: tuple[Scored, torch.Tensor, torch.Tensor] | None = None
        self.metrics = MetricBuffer()
        self._step_time = 0.0
        details = run_details(*data, self.datasets.columns, self.rewards, model)
        details["model"]["shares prefix"] = self.prepared.shares_prefix
        with self.processes.stop_together("the agreement of rollout and training"):  # only the main process samples
            found = measure_agreement(model, processor, self.engine, self.prepared, args, self.accelerator)
        if found is not None:
            print(found, flush=True)
            details["model"]["agreement of rollout and training"] = found._asdict()
        self._add_callbacks(details)
        set_seed(args.seed, device_specific=True)  # processes sample different completions

    def _add_callbacks(self, details: dict[str, Any]) -> None:
        self.phases, self.record = Phases(self.args.device), RunRecord(details)
        self.processes.waiting = partial(self.phases, "wait")
        self.add_callback(self.phases)
        self.add_callback(UpdateCheck(self.accelerator, self.metrics.add))
        self.add_callback(self.record)
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(RewardProgress)

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of prompt indices. A row is read when its completions are sampled, not once per micro-batch."""
        loader = sampler.prompt_dataloader(len(self.train_dataset), self.args, lambda: self.state.global_step)
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return this process's share of the evaluation rows, in order, with their indices."""
        samples = self.datasets.evaluation(self.eval_dataset, eval_dataset)
        size = max(1, self.args.per_device_eval_batch_size // self.args.num_generations_eval)
        share = range(self.args.process_index, len(samples), self.args.world_size)
        return DataLoader(samples, batch_size=size, sampler=share, collate_fn=list)

    # Sampling and scoring

    @property
    def policy(self) -> PreTrainedModel:
        """The policy without wrappers of accelerate and DeepSpeed."""
        return self.accelerator.unwrap_model(self.model_wrapped)

    @contextmanager
    def _gathered_policy(self) -> Iterator[None]:
        """Gather the parameters of the policy for sampling. Every process must enter it."""
        self.processes.barrier("sampling")
        # Autocast around all forward passes casts each weight once, instead of once per token.
        with parallel.gathered(self.accelerator, self.policy, self.prepared.head), self.accelerator.autocast():
            yield

    def _sample(
        self,
        dataset: SampleDataset,
        rows: list[tuple[int, Sample]],
        num_generations: int,
        temperature: float,
        resolution: Resolution | None,
    ) -> tuple[list[tuple[int, Sample]], Rollout, Scored]:
        """Sample completions and call the reward functions on them.

        Args:
            dataset, rows: pairs of an index and a sample that the dataset returned.
            resolution: limits of image sizes, if they follow a schedule.

        Returns:
            The rows, in which other samples may have replaced those that cannot be encoded, the rollout and its scores.
        """
        args, prepared = self.args, self.prepared
        with self.phases("data"):
            arguments = prepared.encoding_arguments(self.processing_class, resolution)
            options = {"policy": prepared, "args": args, "arguments": arguments}
            encode = partial(setup.encode_prompts, processor=self.processing_class, **options)
            if self.agent is None:
                episodes, (rows, prompts) = None, dataset.encode(rows, encode)
                prompt_samples = [sample for _, sample in rows]
            else:
                self.agent.encoder.processor_arguments = arguments  # of images in results
                # The seed is of the CPU's random state, which a checkpoint restores.
                seed = int(torch.randint(2**31, ()))

                def begin(samples: list[Sample]) -> tuple[Episodes, ModelInputs]:
                    episodes = self.agent.episodes(samples, num_generations, seed)
                    return episodes, encode(episodes.samples)

                rows, begun = dataset.encode(rows, begin)
                episodes, prompts = begun
                prompt_samples = episodes.samples
        with self.phases("generate"), self._gathered_policy():
            if prepared.reuses_image_features and self.engine.shares_prefix:  # other engines sample from pixels
                prompts = encode_images(prepared.model, prompts)
            self.metrics.add(self.engine.sync_weights(self.policy, self.state.global_step))
            tools = {} if episodes is None else {"episodes": episodes}
            rollout = self.engine(self.policy, prompts, num_generations, temperature, prompt_samples, **tools)
            if prepared.reuses_image_features:
                rollout = rollout.with_image_features(prepared.model)
        with self.phases("reward"):
            options = {"columns": not args.remove_unused_columns, "trainer_state": self.state}
            scored = score_rollout(self.rewards, prompt_samples, rollout, self.processing_class, episodes, **options)
        return rows, rollout, scored

    def _advantages(self, rewards: torch.Tensor, num_generations: int) -> GroupAdvantages:
        weights = self.rewards.weights.to(rewards.device)
        return group_advantages(rewards, num_generations, weights=weights, scale=self.args.scale_rewards)

    def _new_experience(self, indices: list[int]) -> Experience:
        """Sample and score the completions of the next ``steps_per_rollout`` micro-batches.

        Args:
            indices: rows of train_dataset, one per prompt.
        """
        args = self.args
        with self.processes.stop_together(f"the completions of step {self.state.global_step}"), inference(self.policy):
            with self.phases("data"):
                rows = self.samples.__getitems__(indices)
            resolution = None if self.resolutions is None else self.resolutions.at(self.state.global_step)
            sampling = args.num_generations, args.temperature, resolution
            rows, rollout, scored = self._sample(self.samples, rows, *sampling)
            if args.router_replay and rollout.routed_experts is None:
                name = type(self.engine).__name__
                raise ValueError(
                    f"router_replay must be False with an engine that returns no experts, such as {name}, got True"
                )
        if args.on_bad_sample == "skip":
            replaced = [sample.index != index for index, sample in rows]
            self.metrics.add({"frac_samples_replaced": sum(replaced) / len(replaced)})
        if resolution is not None:
            self.metrics.add(image_metrics(rollout.prompts, self.processing_class))
        self.micro_batches.token_counts.add_sampling(rollout, shares_prefix=self.engine.shares_prefix)
        with self.phases("wait"):
            rewards = self.accelerator.gather(scored.scores.rewards.to(args.device))
            outcomes = self.accelerator.gather(scored.scores.outcomes.to(args.device))
        result = self._advantages(outcomes, args.num_generations)
        start = args.process_index * len(scored.samples)
        advantages = result.advantages[start : start + len(scored.samples)]
        loss_mask = rollout.sampled_mask
        if args.mask_truncated_completions:
            loss_mask = loss_mask & ~rollout.truncated.unsqueeze(1)
        num_items = self.accelerator.reduce(loss_mask.sum().float(), "mean").item()
        per_token = advantages
        if self.agent is not None and (turns := Scores.cat(gather_object([scored.scores])).turns) is not None:
            of_turns = turn_advantages(turns, args.num_generations, scale=args.scale_rewards)
            of_turns = of_turns[start : start + len(scored.samples)].to(args.device)
            per_token = advantages.unsqueeze(1) + rollout.per_token(of_turns)
        experience = Experience(rollout, per_token, loss_mask, max(num_items, 1.0))
        if per_token.dim() == 2:  # of turns: show the mean over the tokens in the loss
            advantages = (per_token * loss_mask).sum(1) / loss_mask.sum(1).clamp(min=1)
        self._last_scored = scored, advantages, loss_mask.any(1)
        self._record_rollout(rollout, rewards, scored)
        self._add_fixed_logps(experience)
        return experience

    def _record_rollout(self, rollout: Rollout, rewards: torch.Tensor, scored: Scored) -> None:
        """Add the metrics of a rollout. ``rewards`` cover all processes, ``scored`` only this one."""
        result = self._advantages(rewards, self.args.num_generations)  # with the sums of rewards of turns
        lengths = self.accelerator.gather(rollout.sampled_mask.sum(1))
        truncated = self.accelerator.gather(rollout.truncated)
        prompt_lengths = rollout.prompts.inputs["attention_mask"].sum(1)[rollout.group.to(lengths.device)]
        self.state.num_input_tokens_seen += int(lengths.sum() + self.accelerator.gather(prompt_lengths).sum())
        self.metrics.replace("num_tokens", self.state.num_input_tokens_seen)
        self.metrics.add(sampling_metrics(rewards, result, lengths, truncated, scored.scores, self.rewards.names))
        if self.agent is not None:
            self.metrics.add(tool_metrics(self._gather_tool_counts(rollout, scored), self.agent.tools))

    def _gather_tool_counts(self, rollout: Rollout, scored: Scored) -> torch.Tensor:
        return self.accelerator.gather(tool_counts(rollout, scored.episodes, self.agent.tools).to(self.args.device)).cpu()

    # Log-probabilities and loss

    def _add_fixed_logps(self, experience: Experience) -> None:
        """Compute the log-probabilities that stay the same while the batch is used.

        Micro-batches before the first optimizer step are on policy: their own forward pass gives their old log-probabilities.
        """
        args, rollout = self.args, experience.rollout
        off_policy = range(args.gradient_accumulation_steps, args.steps_per_generation)
        if off_policy or args.num_iterations > 1:
            timed = self.phases("old_logps") if off_policy else nullcontext()
            with timed, inference(self.model_wrapped):
                old_logps = self.micro_batches.logps(self.model_wrapped, self.prepared.head, rollout, off_policy)
            experience.old_logps = old_logps
        if args.beta > 0:
            model, as_reference = self.ref_model, nullcontext()
            if model is None:
                model, as_reference = self.model_wrapped, reference.as_reference(self.policy)
            rollout = replace(rollout, routed_experts=None)  # of the policy: the reference routes as it did in its training
            with self.phases("ref_logps"), inference(model), as_reference:
                ref_logps = self.micro_batches.logps(model, self.ref_head, rollout, range(args.steps_per_generation))
            experience.ref_logps = ref_logps

    @phase("other")
    def _prepare_inputs(self, inputs: list[int]) -> int:
        """Turn the prompt indices of a generation batch into the number of the micro-batch to train on.

        Samples a new generation batch if the last one is used up.
        """
        if self._experience is None or self._experience.uses == self.args.steps_per_rollout:
            self._experience = self._new_experience(inputs)
        self._experience.uses += 1
        return self._experience.uses - 1

    def training_step(self, model: torch.nn.Module, inputs: list[int], num_items_in_batch: Any = None) -> torch.Tensor:
        """Train on one micro-batch, and check losses and gradients before an optimizer step."""
        start = time.perf_counter()
        with self.phases("backward"):  # the phases of _prepare_inputs and _split_loss are nested in it
            # If num_items_in_batch is given, Trainer does not divide the loss by the accumulation steps again.
            loss = super().training_step(model, inputs, num_items_in_batch=1)
        self._step_time += time.perf_counter() - start
        if self.accelerator.sync_gradients:
            self.metrics.add({"step_time": self._step_time})
            self._step_time = 0.0
            self.phases.between_steps("optimizer")
            is_skipped = self._finite_steps(self.policy, self.state.global_step + 1)
            if self.args.on_nonfinite == "skip":
                self.metrics.add({"frac_steps_skipped": is_skipped})
        return loss

    def compute_loss(
        self, model: torch.nn.Module, inputs: int, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Compute the loss of a micro-batch, weighted by its share of the accumulated batch.

        Splits before the last run their backward pass here; ``Trainer`` runs the backward pass of the last split.

        Args:
            model: the policy, perhaps wrapped.
            inputs: how many micro-batches of this generation batch were trained on before this one.
        """
        experience, total = self._experience, 0.0
        splits = self.micro_batches.splits(experience.rollout, inputs % self.args.steps_per_generation)
        counted = [split.samples for split in splits if not split.is_padding]
        sizes, tokens = [len(samples) for samples in counted], [1]
        if len(counted) > 1:  # with one split the number of tokens does not matter, and reading it would wait for the device
            tokens = [int(experience.loss_mask[samples].sum()) for samples in counted]
        parts = in_parts(self.loss_config, sizes, tokens, self.current_gradient_accumulation_steps)
        parts += parts[-1:] * (len(splits) - len(counted))
        metrics = []
        for number, (split, part) in enumerate(zip(splits, parts, strict=True), 1):
            is_last = number == len(splits)
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                loss, split_metrics, old_logps = self._split_loss(model, experience, inputs, split, part)
                if split.is_padding:
                    loss = 0.0 * loss
                else:
                    metrics.append(split_metrics)
                    if inputs < self.args.steps_per_generation:
                        loss_mask = experience.loss_mask[split.samples]
                        self.mismatch.add(experience.rollout, split.samples, loss_mask, old_logps)
                if not is_last:
                    parallel.backward(self.accelerator, loss)
                    loss = loss.detach()
            total = total + loss
        combined = combine_metrics(self.loss_config, sizes, metrics)
        self._finite_steps.observe(total, combined)
        self.metrics.add(combined)
        return total

    @phase("forward")
    def _split_loss(
        self, model: torch.nn.Module, experience: Experience, use: int, split: Split, part: Part
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Compute the loss, the metrics and the old log-probabilities (n, C) of a split.

        Args:
            use: see ``inputs`` of ``compute_loss``.
            part: the weight of the split in the loss of its micro-batch.
        """
        args, rollout, samples = self.args, experience.rollout, split.samples
        is_on_policy = use < min(args.gradient_accumulation_steps, args.steps_per_generation)
        old_logps = None if is_on_policy else experience.old_logps[samples]
        window, loss_mask = self.current_gradient_accumulation_steps, experience.loss_mask[samples]
        batch = self.micro_batches.scoring_batch(rollout, split).select(loss_mask[rollout.sampled_mask[samples]])
        threshold = None  # then the loss uses the quantile of this split's entropies
        if args.top_entropy_quantile < 1 and args.world_size > 1:
            threshold = partial(top_entropy_threshold, self.accelerator, args.top_entropy_quantile)
        loss, metrics, logps, _ = completion_loss(
            model,
            batch,
            loss_mask,
            head=self.prepared.head,
            **self.micro_batches.head_arguments,
            advantages=experience.advantages[samples],
            old_logps=old_logps,
            ref_logps=None if experience.ref_logps is None else experience.ref_logps[samples],
            rollout_logps=self.mismatch.rollout_logps(rollout, samples),
            entropy_threshold=threshold,
            num_items=experience.num_items * window / args.steps_per_generation,
            **part._asdict(),
        )
        if is_on_policy:
            old_logps = torch.zeros_like(loss_mask, dtype=logps.dtype).masked_scatter_(loss_mask, logps)
            if experience.old_logps is not None:
                experience.old_logps[samples] = old_logps
        return loss, metrics, old_logps

    # Evaluation and logs

    @phase("evaluate")
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sample and score the rows, without a loss. The metrics are named as in training, with a prefix."""
        tools = None if self.agent is None else self.agent.tools
        num_generations, completions = self.args.num_generations_eval, EvaluatedCompletions(tools)
        resolution = None if self.resolutions is None else self.resolutions.last  # the same at all steps
        sampling = num_generations, self.args.eval_temperature, resolution
        self.callback_handler.eval_dataloader = dataloader
        num_batches = parallel.max_over_ranks(self.accelerator, len(dataloader))
        with self.processes.stop_together(f"the evaluation at step {self.state.global_step}"), inference(self.policy):
            for rows in dataloader:
                rows, rollout, scored = self._sample(dataloader.dataset, rows, *sampling)
                # A sample that replaces an unusable row runs, so that ranks stay in lockstep, but it is not evaluated.
                is_own = torch.tensor([sample.index == index for index, sample in rows])
                completions.add(rollout, scored, is_own.repeat_interleave(num_generations))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            for _ in range(num_batches - len(dataloader)):  # other ranks have more rows
                with self._gathered_policy():
                    pass
        scores, lengths, truncated, of_tools = completions.gather()
        result = self._advantages(scores.rewards, num_generations)
        metrics = sampling_metrics(scores.rewards, result, lengths, truncated, scores, self.rewards.names) | of_tools
        metrics = {f"{metric_key_prefix}_{name}": None if math.isnan(value) else value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, len(lengths) // num_generations)

    @phase("log")
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log, and store the completions of the last generation batch."""
        args, is_training = self.args, "loss" in logs
        if is_training:
            self.metrics.add(step_metrics(self.phases, self.micro_batches.token_counts, args.world_size))
            logs.update(self.metrics.flush(self.accelerator) | self.mismatch.flush(self.accelerator))
        super().log(logs, start_time)
        if is_training and args.log_completions and self._last_scored and self.is_world_process_zero():
            groups = completion_groups(*self._last_scored, self.rewards, args)
            self.record.save_completions(args, self.state, groups, self.callback_handler.callbacks)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """See ``Trainer.train``. True resumes from the last complete checkpoint in ``args.output_dir``."""
        args, path = self.args, resume_from_checkpoint or None
        if self.train_dataset is None:
            raise ValueError("train_dataset must be given to train, got None")
        self._experience = None
        if path:
            # One process first: find_checkpoint may rename a folder.
            with args.main_process_first(local=args.save_on_each_node, desc="the checkpoint"):
                path = checkpoint.find_checkpoint(path, args.output_dir)
            checkpoint.check_checkpoint(path, self.policy, args.world_size)
            self._restore_reference(path)
            if self.is_world_process_zero():
                print(f"resuming from {path}", flush=True)
            self._experience = checkpoint.load_experience(path, args.process_index, self.prepared.family, args)
        with name_lost_processes(self.accelerator):
            return super().train(path, **kwargs)

    def _restore_reference(self, path: str) -> None:
        kind = reference.kind_of(self.policy, self.args.beta)
        reference.restore(self.policy, path, Path(path) / checkpoint.MANIFEST, kind)
        self.reference_adapter = reference.adapter_state(self.policy)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random states, and the generation batch if it is still in use, so that a resumed run continues it."""
        super()._save_rng_state(output_dir)
        if self._experience is not None and self._experience.uses < self.args.steps_per_rollout:
            checkpoint.save_experience(self._experience, output_dir, self.args.process_index)
