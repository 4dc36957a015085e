"""GRPO training on ``transformers.Trainer``, which provides the loop, optimizers, checkpoints, callbacks and loggers.

One generation batch serves ``steps_per_generation * num_iterations`` micro-batches:

    _prepare_inputs      calls _new_experience when the last batch is used up:
      _sample              encodes prompts, samples completions with the engine and calls the reward functions
      _add_advantages      computes advantages from the rewards of all processes
      _record_sampling     adds the metrics of all sampled completions
      _add_fixed_logps     computes the old and the reference log-probabilities
    compute_loss         runs one micro-batch in splits of at most max_tokens_per_microbatch tokens:
      _split_loss          runs the forward pass; the language-model head computes the loss (``vlmkernels.ops``)

Options change single steps:

    dynamic_sampling, oversampling   call _sample several times for a batch (``vlmkernels.train.dynamic_sampling``)
    image_resolution_schedule        limits the size of the images that _sample encodes (``vlmkernels.data.resolution``)
    perception_loss_weight, ...      _sample masks the images (``vlmkernels.train.masks``), and _split_loss runs both prompts
    image_use_steps                  _sample measures the use of images (``vlmkernels.train.image_use``)
    teacher                          _split_loss runs the teacher first (``vlmkernels.train.distillation``). Without reward
                                     functions there is no GRPO loss, and so no advantages and no fixed log-probabilities.
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
from vlmkernels.doctor.callback import DoctorCallback
from vlmkernels.models.head import completion_loss, term_alone, top_entropy_threshold
from vlmkernels.models.image_features import encode_images
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import frozen_weights_cast_once, inference
from vlmkernels.ops.group_advantages import GroupAdvantages, group_advantages
from vlmkernels.ops.group_advantages.turns import turn_advantages
from vlmkernels.ops.grpo_loss.parts import Part, combine_metrics, in_parts
from vlmkernels.record.callback import RunRecord
from vlmkernels.record.completions import Groups, group_content
from vlmkernels.record.phases import Phases, phase
from vlmkernels.record.progress import RewardProgress
from vlmkernels.record.summary import length_correlation, token_metrics
from vlmkernels.rewards import Scores
from vlmkernels.rollout.base import Rollout
from vlmkernels.rollout.episodes import Episodes
from vlmkernels.rollout.score import Scored, score_rollout
from vlmkernels.train import checkpoint, distillation, parallel, reference, sampler, setup
from vlmkernels.train.agreement import measure_agreement
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.dynamic_sampling import BatchSampler, Sampled
from vlmkernels.train.experience import Experience
from vlmkernels.train.faults import FiniteSteps, name_lost_processes
from vlmkernels.train.image_use import ImageUse, steps_between
from vlmkernels.train.logs import (
    MetricBuffer,
    SampledCompletions,
    completion_groups,
    image_metrics,
    sampling_metrics,
    step_metrics,
)
from vlmkernels.train.masks import PerceptionMasks, check_perception
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
            options; see ``vlmkernels.rewards.compose``. May be None with a teacher.
        args: see ``GRPOConfig``.
        train_dataset, eval_dataset: rows with a length (``datasets.Dataset``, a list of dicts, ...); see
            ``vlmkernels.data.samples``. Every row is checked. eval_dataset may be a dict of datasets.
        processing_class: the processor or tokenizer of the model. By default it is loaded from the path of the model.
        callbacks, optimizers: see ``transformers.Trainer``.
        peft_config: configuration of adapters to train instead of the model's own weights.
        tools, environment_factory: functions that the model may call while it writes a completion, and a function or class that
            creates the environment of each completion, whose methods the model may call; see docs/tools.md.
        teacher: a model with the vocabulary and the image processing of ``model``, or its path. Its divergence from the policy
            on the sampled tokens is added to the loss; see docs/distillation.md. A model is frozen in place.

    Attributes:
        engine: the rollout engine, which samples the completions.
        prepared: how the policy runs; see ``PreparedPolicy``.
        masks: masks images for the perception terms, or None.
        image_use: measures the use of images, or None.
        resolutions: the schedule of image sizes, or None.
        ref_model: the copy that is the reference, or None.
        teacher: how the teacher runs, or None.
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
        teacher: str | PreTrainedModel | None = None,
    ) -> None:
        args = GRPOConfig() if args is None else args
        self.processes = Processes(args.ddp_timeout)
        set_seed(args.seed)  # adapters start from random weights
        with self.processes.stop_together("the set-up"):
            processor, family, num_embeddings = setup.load_processing(model, processing_class, args)
            self.tokenizer = tokenizer_of(processor)
            self.agent = setup.make_agent(tools, environment_factory, args)
            self.rewards = setup.make_rewards(reward_funcs, self.agent, args, has_teacher=teacher is not None)
            distillation.check_arguments(teacher, model, self.rewards, args)
            train_dataset, eval_dataset = data = setup.with_prompts(train_dataset, eval_dataset, self.agent, args)
            self.datasets = setup.check_datasets(data, processor, family, num_embeddings, self.rewards, self.agent, args)
            self.samples = self.datasets.samples(train_dataset, "train_dataset")
            check_perception(args, family, self.datasets.media, has_tools=self.agent is not None)
            model = setup.load_policy(model, processor, peft_config, args)
            loaded = distillation.load_teacher(teacher, model, processor, self.datasets.media, args)
        super().__init__(
            model=model, args=args, data_collator=list, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=processor, callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = True  # compute_loss normalizes over the accumulated batch; see training_step
        parallel.check_parallelism(self.accelerator, model, args.n_gpu)
        described = describe_process(args, model, self.tokenizer, self.rewards, train_dataset, loaded and loaded.model)
        self.processes.compare(**described)
        self.prepared = setup.prepare_policy(model, processor, args, self.accelerator, self.datasets.media)
        self.reference_adapter = reference.adapter_state(model)
        self.ref_model, self.ref_head = setup.load_reference(model, self.prepared, args, self.accelerator)
        media = self.datasets.media
        self.masks = PerceptionMasks(processor, self.prepared, args, media) if args.masks_images else None
        every = steps_between(args, media, has_tools=self.agent is not None)
        self.image_use = None if every is None else ImageUse(processor, self.prepared, args, media, every)
        prepared = model, processor, self.prepared, args, self.accelerator
        self.engine = setup.prepare_engine(*prepared, keeps_pixels=teacher is not None)
        eos = self.engine.sampling.eos_token_id
        self.unwanted_tokens = setup.unwanted_tokens(model, processor, eos, num_embeddings).to(args.device)
        if self.agent is not None:
            options = args.chat_template_kwargs, self.prepared.processor_arguments, eos
            self.agent.prepare(processor, family, *options)
        self.loss_config, self.resolutions = args.loss_config(), args.resolution_schedule()
        self.mismatch = Mismatch(self.loss_config, args.rollout_policy)
        details = run_details(*data, self.datasets.columns, self.rewards, model)
        details["model"]["shares prefix"] = self.prepared.shares_prefix
        self.micro_batches, self.teacher = MicroBatches(self.prepared, args, self.accelerator), None
        if loaded is not None:
            details["teacher"] = distillation.describe_teacher(loaded)
            self.teacher = distillation.prepare_teacher(loaded, self.micro_batches, processor, self.datasets.media)
            details["teacher"]["shares prefix"] = self.teacher.prepared.shares_prefix
        self._finite_steps = FiniteSteps(self.accelerator, args.on_nonfinite)
        self._batch_sampler: BatchSampler | None = None
        self._experience: Experience | None = None
        # With advantages and whether the loss counts any of their tokens, for log_completions.
        self._last_scored: tuple[Scored, torch.Tensor, torch.Tensor] | None = None
        self.metrics = MetricBuffer()
        self._step_time = 0.0
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
        if self.args.diagnose:
            self.add_callback(DoctorCallback(lambda: list(map(group_content, self._last_groups()))))
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
        gathered = parallel.gathered(self.accelerator, self.policy, self.prepared.head)
        # Autocast around all forward passes casts each weight once, instead of once per token.
        with gathered, frozen_weights_cast_once(self.policy), self.accelerator.autocast():
            yield

    def _sample(
        self,
        dataset: SampleDataset,
        rows: list[tuple[int, Sample]],
        num_generations: int,
        temperature: float,
        resolution: Resolution | None = None,
        *,
        is_training: bool = False,
    ) -> tuple[list[tuple[int, Sample]], Rollout, Scored]:
        """Sample completions and call the reward functions on them.

        Args:
            dataset, rows: pairs of an index and a sample that the dataset returned.
            resolution: limits of image sizes, if they follow a schedule; None: the processor's.
            is_training: whether to mask images and to measure their use, if ``args`` say so.

        Returns:
            The rows, in which other samples may have replaced those that cannot be encoded, the rollout and its scores.
        """
        args, prepared = self.args, self.prepared
        with self.phases("data"):
            rows, prompts, episodes = self._encode(dataset, rows, num_generations, resolution)
            prompt_samples = [sample for _, sample in rows] if episodes is None else episodes.samples
            step = self.state.global_step
            masked = self.masks(prompts, step) if is_training and self.masks is not None else None
            measure = self.image_use.prepare(prompts, step) if is_training and self.image_use is not None else None
        pixels = None if self.teacher is None else prompts
        with self.phases("generate"), self._gathered_policy():
            if prepared.reuses_image_features and self.engine.shares_prefix:  # other engines sample from pixels
                prompts = encode_images(prepared.model, prompts)
            self.metrics.add(self.engine.sync_weights(self.policy, self.state.global_step))
            tools = {} if episodes is None else {"episodes": episodes}
            rollout = self.engine(self.policy, prompts, num_generations, temperature, prompt_samples, **tools)
            rollout = replace(rollout, masked_prompts=masked)
            if prepared.reuses_image_features:
                rollout = rollout.with_image_features(prepared.model, pixels)
            if measure is not None:
                with self.phases("image_use"):
                    self.metrics.add(measure(self.policy, self.micro_batches.own(rollout)))
        with self.phases("reward"):
            options = {"columns": not args.remove_unused_columns, "trainer_state": self.state}
            scored = score_rollout(self.rewards, prompt_samples, rollout, self.processing_class, episodes, **options)
        return rows, rollout, scored

    def _encode(
        self, dataset: SampleDataset, rows: list[tuple[int, Sample]], num_generations: int, resolution: Resolution | None
    ) -> tuple[list[tuple[int, Sample]], ModelInputs, Episodes | None]:
        """Encode the prompts of samples, and with tools begin their episodes. For the arguments see ``_sample``."""
        arguments = self.prepared.encoding_arguments(self.processing_class, resolution)
        options = {"policy": self.prepared, "args": self.args, "arguments": arguments}
        encode = partial(setup.encode_prompts, processor=self.processing_class, **options)
        if self.agent is None:
            return *dataset.encode(rows, encode), None
        self.agent.encoder.processor_arguments = arguments  # of images in results
        # The seed is of the CPU's random state, which a checkpoint restores.
        seed = int(torch.randint(2**31, ()))

        def begin(samples: list[Sample]) -> tuple[Episodes, ModelInputs]:
            episodes = self.agent.episodes(samples, num_generations, seed)
            return episodes, encode(episodes.samples)

        rows, (episodes, prompts) = dataset.encode(rows, begin)
        return rows, prompts, episodes

    def _advantages(self, rewards: torch.Tensor, num_generations: int) -> GroupAdvantages:
        weights = self.rewards.weights.to(rewards.device)
        return group_advantages(rewards, num_generations, weights=weights, scale=self.args.scale_rewards)

    def _new_experience(self, indices: list[int]) -> Experience:
        """Sample and score the completions of the next ``steps_per_rollout`` micro-batches.

        Args:
            indices: rows of train_dataset, one per prompt.
        """
        args = self.args
        completions = SampledCompletions(None if self.agent is None else self.agent.tools)
        sample = partial(self._sample_prompts, completions)
        with self.processes.stop_together(f"the completions of step {self.state.global_step}"), inference(self.policy):
            if self._batch_sampler is None:
                rollout, scored = sample(indices)
            else:
                (rollout, scored), metrics = self._batch_sampler(sample, self._wait_for_samples)
                self.metrics.add(metrics)
        loss_mask = rollout.sampled_mask
        if args.mask_truncated_completions:
            loss_mask = loss_mask & ~rollout.truncated.unsqueeze(1)
        num_items = self.accelerator.reduce(loss_mask.sum().float(), "mean").item()
        experience = Experience(rollout, None, loss_mask, max(num_items, 1.0))
        self._last_scored = scored, torch.full((len(loss_mask),), math.nan), loss_mask.any(1)
        if self.rewards:
            self._add_advantages(experience, scored)
        self._record_sampling(completions)
        if self.rewards:
            self._add_fixed_logps(experience)
        return experience

    def _add_advantages(self, experience: Experience, scored: Scored) -> None:
        """Compute the advantages of a rollout from the rewards of all processes."""
        args, rollout, loss_mask = self.args, experience.rollout, experience.loss_mask
        with self.phases("wait"):
            outcomes = self.accelerator.gather(scored.scores.outcomes.to(args.device))
        result = self._advantages(outcomes, args.num_generations)
        start = args.process_index * len(scored.samples)
        advantages = result.advantages[start : start + len(scored.samples)]
        per_token = advantages
        if self.agent is not None and (turns := Scores.cat(gather_object([scored.scores])).turns) is not None:
            of_turns = turn_advantages(turns, args.num_generations, scale=args.scale_rewards)
            of_turns = of_turns[start : start + len(scored.samples)].to(args.device)
            per_token = advantages.unsqueeze(1) + rollout.per_token(of_turns)
        experience.advantages = per_token
        if per_token.dim() == 2:  # of turns: show the mean over the tokens in the loss
            advantages = (per_token * loss_mask).sum(1) / loss_mask.sum(1).clamp(min=1)
        self._last_scored = scored, advantages, loss_mask.any(1)

    def _sample_prompts(self, completions: SampledCompletions, indices: list[int]) -> Sampled:
        """Sample and score completions of these rows of train_dataset, and add them to ``completions``."""
        with self.phases("data"):
            rows = self.samples.__getitems__(indices)
        resolution = None if self.resolutions is None else self.resolutions.at(self.state.global_step)
        sampling = self.args.num_generations, self.args.temperature, resolution
        rows, rollout, scored = self._sample(self.samples, rows, *sampling, is_training=True)
        if self.args.router_replay and rollout.routed_experts is None:
            name = type(self.engine).__name__
            raise ValueError(f"router_replay must be False with an engine that returns no experts, such as {name}, got True")
        if self.args.on_bad_sample == "skip":
            for index, sample in rows:
                self.metrics.add({"frac_samples_replaced": sample.index != index})
        if resolution is not None:
            self.metrics.add(image_metrics(rollout.prompts, self.processing_class))
        self.micro_batches.token_counts.add_sampling(rollout, shares_prefix=self.engine.shares_prefix)
        self.metrics.add(token_metrics(rollout.completion_ids, rollout.sampled_mask, self.unwanted_tokens))
        completions.add(rollout, scored)
        return Sampled(rollout, scored)

    def _wait_for_samples(self) -> None:
        """Take part in the collectives of ``_sample`` on a process that has nothing to sample."""
        with self._gathered_policy():
            pass

    def _record_sampling(self, completions: SampledCompletions) -> None:
        """Add the metrics of all completions that were sampled for a batch, on all processes."""
        gathered, result = completions.gather(), None
        if self.rewards:
            result = self._advantages(gathered.scores.rewards, self.args.num_generations)  # with the sums of rewards of turns
            correlation = length_correlation(result, gathered.lengths, self.args.num_generations)
            self.metrics.add({"reward_length_correlation": correlation})
        self.state.num_input_tokens_seen += int(gathered.lengths.sum() + gathered.prompt_lengths.sum())
        self.metrics.replace("num_tokens", self.state.num_input_tokens_seen)
        self.metrics.add(sampling_metrics(gathered, result, self.rewards.names))

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
        micro_batch, branches = inputs % self.args.steps_per_generation, self.args.masks_images
        splits = self.micro_batches.splits(experience.rollout, micro_batch, branches=branches)
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
                    if old_logps is not None and inputs < self.args.steps_per_generation:
                        samples = split.samples.to(self.args.device, non_blocking=True)
                        self.mismatch.add(experience.rollout, samples, experience.loss_mask[samples], old_logps)
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
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
        """Compute the loss, the metrics and the old log-probabilities (n, C) of a split; without rewards, these are None.

        Args:
            use: see ``inputs`` of ``compute_loss``.
            part: the weight of the split in the loss of its micro-batch.
        """
        args, rollout = self.args, experience.rollout
        samples = split.samples.to(args.device, non_blocking=True)  # indexing with the host's would wait for the device
        window, loss_mask = self.current_gradient_accumulation_steps, experience.loss_mask[samples]
        num_items = experience.num_items * window / args.steps_per_generation
        term = None
        if self.teacher is not None:
            with self.phases("teacher"):
                tokens = loss_mask[rollout.sampled_mask[samples]]
                term = self.teacher.term(rollout, split, tokens, num_items)
        batch, masked = self.micro_batches.loss_batch(rollout, split, loss_mask)
        if not self.rewards:
            return *term_alone(model, batch, term, head=self.prepared.head), None
        is_on_policy = use < min(args.gradient_accumulation_steps, args.steps_per_generation)
        old_logps = None if is_on_policy else experience.old_logps[samples]
        threshold = None  # then the loss uses the quantile of this split's entropies
        if args.top_entropy_quantile < 1 and args.world_size > 1:
            threshold = partial(top_entropy_threshold, self.accelerator, args.top_entropy_quantile)
        loss, metrics, logps, _ = completion_loss(
            model,
            batch,
            loss_mask,
            head=self.prepared.head,
            **self.micro_batches.head_arguments,
            masked=masked,
            advantages=experience.advantages[samples],
            old_logps=old_logps,
            ref_logps=None if experience.ref_logps is None else experience.ref_logps[samples],
            rollout_logps=self.mismatch.rollout_logps(rollout, samples),
            entropy_threshold=threshold,
            num_items=num_items,
            term=term,
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
        num_generations, completions = self.args.num_generations_eval, SampledCompletions(tools)
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
                self._wait_for_samples()
        gathered = completions.gather()
        result = self._advantages(gathered.scores.rewards, num_generations) if self.rewards else None
        metrics = sampling_metrics(gathered, result, self.rewards.names)
        metrics = {f"{metric_key_prefix}_{name}": None if math.isnan(value) else value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, len(gathered.lengths) // num_generations)

    @phase("log")
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log, and store the completions of the last generation batch."""
        args, is_training = self.args, "loss" in logs
        if is_training:
            self.metrics.add(step_metrics(self.phases, self.micro_batches.token_counts, args.world_size))
            logs.update(self.metrics.flush(self.accelerator) | self.mismatch.flush(self.accelerator))
        super().log(logs, start_time)
        if is_training and args.log_completions and self._last_scored and self.is_world_process_zero():
            self.record.save_completions(args, self.state, self._last_groups(), self.callback_handler.callbacks)

    def _last_groups(self) -> Groups:
        return completion_groups(*self._last_scored, self.rewards, self.args) if self._last_scored else []

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """See ``Trainer.train``. True resumes from the last complete checkpoint in ``args.output_dir``."""
        args, path = self.args, resume_from_checkpoint or None
        if self.train_dataset is None:
            raise ValueError("train_dataset must be given to train, got None")
        self._experience = None
        if args.chooses_groups:
            options = self.rewards, len(self.train_dataset), self.tokenizer.pad_token_id
            self._batch_sampler = BatchSampler(args, self.accelerator, self.processes, *options)
        if path:
            # One process first: find_checkpoint may rename a folder.
            with args.main_process_first(local=args.save_on_each_node, desc="the checkpoint"):
                path = checkpoint.find_checkpoint(path, args.output_dir)
            checkpoint.check_checkpoint(path, self.policy, args.world_size)
            self._restore_reference(path)
            if self.is_world_process_zero():
                print(f"resuming from {path}", flush=True)
            kept = {"has_rewards": bool(self.rewards), "has_teacher": self.teacher is not None}
            self._experience = checkpoint.load_experience(path, args.process_index, self.prepared.family, args, **kept)
            if self._batch_sampler is not None:
                self._batch_sampler.stream.restore(path)
        with name_lost_processes(self.accelerator):
            return super().train(path, **kwargs)

    def _restore_reference(self, path: str) -> None:
        kind = reference.kind_of(self.policy, self.args.beta)
        reference.restore(self.policy, path, Path(path) / checkpoint.MANIFEST, kind)
        self.reference_adapter = reference.adapter_state(self.policy)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random states, the position in the prompts, and the generation batch if it is still in use, to resume."""
        super()._save_rng_state(output_dir)
        if self._batch_sampler is not None and self.args.should_save:
            self._batch_sampler.stream.save(output_dir)
        if self._experience is not None and self._experience.uses < self.args.steps_per_rollout:
            checkpoint.save_experience(self._experience, output_dir, self.args.process_index)
