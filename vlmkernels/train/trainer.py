"""GRPO training on ``transformers.Trainer``, which provides the loop, optimizers, checkpoints, callbacks and loggers.

One generation batch serves ``steps_per_generation * num_iterations`` micro-batches:

    _prepare_inputs      calls _new_experience when the last batch is used up:
      _sample              encodes prompts, samples completions with the engine and calls the reward functions
      _add_advantages      computes advantages from the rewards of all processes
      _record_sampling     adds the metrics of all sampled completions
      add_fixed_logps      computes the old and the reference log-probabilities (``vlmkernels.train.objective``)
    compute_loss         runs one micro-batch in splits of at most max_tokens_per_microbatch tokens:
      split_loss           runs the models; the language-model head computes the loss (``vlmkernels.ops``)

Options change single steps:

    dynamic_sampling, oversampling   call _sample several times for a batch (``vlmkernels.train.dynamic_sampling``)
    image_resolution_schedule        limits the size of the images that _sample encodes (``vlmkernels.data.resolution``)
    perception_loss_weight, ...      add masked images to a rollout (``vlmkernels.train.batch_images``), and terms to the loss
    image_use_steps                  measures the use of images of a rollout (``vlmkernels.train.batch_images``)
    teacher                          adds its divergence to the loss (``vlmkernels.train.distillation``). Without reward
                                     functions there is no GRPO loss, and so no advantages and no fixed log-probabilities.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from vlmkernels.models.image_features import encode_images
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import frozen_weights_cast_once, inference
from vlmkernels.record.callback import RunRecord
from vlmkernels.record.completions import Groups, group_content
from vlmkernels.record.phases import Phases, phase
from vlmkernels.record.progress import RewardProgress
from vlmkernels.record.summary import length_correlation, token_metrics
from vlmkernels.rewards import Scores
from vlmkernels.rollout.base import Rollout
from vlmkernels.rollout.episodes import Episodes
from vlmkernels.rollout.score import Scored, score_rollout
from vlmkernels.train import checkpoint, parallel, reference, sampler, setup
from vlmkernels.train.advantages import batch_advantages, compare_groups
from vlmkernels.train.agreement import measure_agreement
from vlmkernels.train.batch_images import BatchImages
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.dynamic_sampling import BatchSampler, Sampled
from vlmkernels.train.experience import FIXED, Experience
from vlmkernels.train.faults import FiniteSteps, name_lost_processes
from vlmkernels.train.logs import (
    MetricBuffer,
    SampledCompletions,
    completion_groups,
    image_metrics,
    sampling_metrics,
    step_metrics,
)
from vlmkernels.train.objective import Objective
from vlmkernels.train.prepare import encode_prompts
from vlmkernels.train.processes import Processes
from vlmkernels.train.run_models import prepare_models
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
        prepared: how the policy runs; see ``PreparedModel``.
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
            run = setup.load_run(
                model, reward_funcs, args, train_dataset, eval_dataset, processing_class, peft_config, tools,
                environment_factory, teacher,
            )  # fmt: skip
        self.rewards, self.agent, self.datasets = run.rewards, run.agent, run.datasets
        self.samples = run.datasets.samples(run.datasets.train_dataset, "train_dataset")
        self.tokenizer = tokenizer_of(run.processor)

        super().__init__(
            model=run.model, args=args, data_collator=list, train_dataset=run.datasets.train_dataset,
            eval_dataset=run.datasets.eval_dataset, processing_class=run.processor, callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = True  # compute_loss normalizes over the accumulated batch; see training_step
        setup.check_processes(run, args, self.accelerator, self.processes)
        self.phases, self.metrics = Phases(args.device), MetricBuffer()

        models = prepare_models(run.model, run.teacher, run.processor, run.datasets.media, args, self.accelerator)
        self.prepared, self.ref_model, self.teacher = models.policy.prepared, models.ref_model, models.teacher
        self.reference_adapter = reference.adapter_state(run.model)
        self.objective = Objective(models, args, self.accelerator, self.phases, has_rewards=bool(self.rewards))
        self.token_counts = models.token_counts

        self.engine = setup.prepare_engine(run, self.prepared, args, self.accelerator)
        eos = self.engine.sampling.eos_token_id
        self.unwanted_tokens = setup.unwanted_tokens(run.model, run.processor, eos, run.num_embeddings).to(args.device)
        self.resolutions = args.resolution_schedule()
        self.images = BatchImages(
            run.processor, self.prepared, args, run.datasets.media, self.phases, has_tools=run.agent is not None,
            keeps_pixels=run.teacher is not None,
        )  # fmt: skip
        self.masks, self.image_use = self.images.masks, self.images.image_use
        with self.processes.stop_together("the agreement of rollout and training"):  # only the main process samples
            agreement = measure_agreement(run.model, run.processor, self.engine, self.prepared, args, self.accelerator)

        self.record = RunRecord(setup.describe_run(run, models, agreement))
        self._add_callbacks()
        self._finite_steps = FiniteSteps(self.accelerator, args.on_nonfinite)
        self._batch_sampler: BatchSampler | None = None
        self._experience: Experience | None = None
        # With advantages and whether the loss counts any of their tokens, for log_completions.
        self._last_scored: tuple[Scored, torch.Tensor, torch.Tensor] | None = None
        self._step_time = 0.0
        set_seed(args.seed, device_specific=True)  # processes sample different completions

    def _add_callbacks(self) -> None:
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
        images: BatchImages | None = None,
    ) -> tuple[list[tuple[int, Sample]], Rollout, Scored]:
        """Sample completions and call the reward functions on them.

        Args:
            dataset, rows: pairs of an index and a sample that the dataset returned.
            resolution: limits of image sizes, if they follow a schedule; None: the processor's.
            images: what training adds to the rollout; None: nothing.

        Returns:
            The rows, in which other samples may have replaced those that cannot be encoded, the rollout and its scores.
        """
        with self.phases("data"):
            rows, prompts, episodes = self._encode(dataset, rows, num_generations, resolution)
            samples = [sample for _, sample in rows] if episodes is None else episodes.samples
            complete = None if images is None else images.prepare(prompts, self.state.global_step)
        with self.phases("generate"), self._gathered_policy():
            if self.prepared.reuses_image_features and self.engine.shares_prefix:  # other engines sample from pixels
                prompts = encode_images(self.prepared.model, prompts)
            self.metrics.add(self.engine.sync_weights(self.policy, self.state.global_step))
            tools = {} if episodes is None else {"episodes": episodes}
            rollout = self.engine(self.policy, prompts, num_generations, temperature, samples, **tools)
            if complete is not None:
                rollout, metrics = complete(self.policy, rollout)
                self.metrics.add(metrics)
        with self.phases("reward"):
            options = {"columns": not self.args.remove_unused_columns, "trainer_state": self.state}
            scored = score_rollout(self.rewards, samples, rollout, self.processing_class, episodes, **options)
        return rows, rollout, scored

    def _encode(
        self, dataset: SampleDataset, rows: list[tuple[int, Sample]], num_generations: int, resolution: Resolution | None
    ) -> tuple[list[tuple[int, Sample]], ModelInputs, Episodes | None]:
        """Encode the prompts of samples, and with tools begin their episodes. For the arguments see ``_sample``."""
        arguments = self.prepared.encoding_arguments(self.processing_class, resolution)
        options = {"prepared": self.prepared, "args": self.args, "arguments": arguments}
        encode = partial(encode_prompts, processor=self.processing_class, **options)
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
        experience.made_with = {name: getattr(args, name) for name in FIXED}
        self._last_scored = scored, torch.full((len(loss_mask),), math.nan), loss_mask.any(1)
        if self.rewards:
            self._add_advantages(experience, scored)
        self._record_sampling(completions)
        if self.rewards:
            self.objective.add_fixed_logps(self.model_wrapped, self.policy, experience)
        return experience

    def _add_advantages(self, experience: Experience, scored: Scored) -> None:
        """Compute the advantages of a rollout from the rewards of all processes."""
        with self.phases("wait"):
            outcomes = self.accelerator.gather(scored.scores.outcomes.to(self.args.device))
            turns = None if self.agent is None else Scores.cat(gather_object([scored.scores])).turns
        batch = experience.rollout, experience.loss_mask
        experience.advantages, shown = batch_advantages(outcomes, turns, *batch, self.rewards, self.args)
        self._last_scored = scored, shown, experience.loss_mask.any(1)

    def _sample_prompts(self, completions: SampledCompletions, indices: list[int]) -> Sampled:
        """Sample and score completions of these rows of train_dataset, and add them to ``completions``."""
        with self.phases("data"):
            rows = self.samples.__getitems__(indices)
        resolution = None if self.resolutions is None else self.resolutions.at(self.state.global_step)
        sampling = self.args.num_generations, self.args.temperature, resolution
        rows, rollout, scored = self._sample(self.samples, rows, *sampling, self.images)
        if self.args.router_replay and rollout.routed_experts is None:
            name = type(self.engine).__name__
            raise ValueError(f"router_replay must be False with an engine that returns no experts, such as {name}, got True")
        if self.args.on_bad_sample == "skip":
            for index, sample in rows:
                self.metrics.add({"frac_samples_replaced": sample.index != index})
        if resolution is not None:
            self.metrics.add(image_metrics(rollout.prompts, self.processing_class))
        self.token_counts.add_sampling(rollout, shares_prefix=self.engine.shares_prefix)
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
            rewards = gathered.scores.rewards  # with the sums of rewards of turns
            result = compare_groups(rewards, self.rewards, self.args.num_generations, self.args)
            correlation = length_correlation(result, gathered.lengths, self.args.num_generations)
            self.metrics.add({"reward_length_correlation": correlation})
        self.state.num_input_tokens_seen += int(gathered.lengths.sum() + gathered.prompt_lengths.sum())
        self.metrics.replace("num_tokens", self.state.num_input_tokens_seen)
        self.metrics.add(sampling_metrics(gathered, result, self.rewards.names))

    # Training

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
        with self.phases("backward"):  # the phases of _prepare_inputs and the objective are nested in it
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
        experience, window = self._experience, self.current_gradient_accumulation_steps
        splits, total, metrics = self.objective.splits(experience, inputs, window), 0.0, []
        for number, (split, part) in enumerate(splits, 1):
            is_last = number == len(splits)
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                loss, split_metrics = self.objective.split_loss(model, experience, inputs, split, part, window)
                if split_metrics is not None:
                    metrics.append(split_metrics)
                if not is_last:
                    parallel.backward(self.accelerator, loss)
                    loss = loss.detach()
            total = total + loss
        combined = self.objective.combine(splits, metrics)
        self._finite_steps.observe(total, combined)
        self.metrics.add(combined)
        return total

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
        result = None
        if self.rewards:
            result = compare_groups(gathered.scores.rewards, self.rewards, num_generations, self.args)
        metrics = sampling_metrics(gathered, result, self.rewards.names)
        metrics = {f"{metric_key_prefix}_{name}": None if math.isnan(value) else value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, len(gathered.lengths) // num_generations)

    @phase("log")
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log, and store the completions of the last generation batch."""
        args, is_training = self.args, "loss" in logs
        if is_training:
            self.metrics.add(step_metrics(self.phases, self.token_counts, args.world_size))
            logs.update(self.metrics.flush() | self.objective.mismatch.flush(self.accelerator))
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
