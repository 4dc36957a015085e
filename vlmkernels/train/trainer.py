"""GRPO training on ``transformers.Trainer``, which brings the loop, optimisers, checkpoints, callbacks and loggers.

What is decided here is only the order of things: sample a generation batch (``rollout``), score it (``rewards``), turn scores
into advantages and log-probabilities into a loss (``vlmkernels.ops``), and use the batch for
``steps_per_generation * num_iterations`` micro-batches.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from accelerate.utils import gather_object, is_peft_model, set_seed
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from vlmkernels.data.samples import Sample, check_dataset, column_names, encode, read_sample, undecoded
from vlmkernels.models.attention import use_group_attention
from vlmkernels.models.families import TEXT, family_of
from vlmkernels.models.group import ScoringBatch, why_not_shared
from vlmkernels.models.head import completion_logps, completion_loss, logit_arguments, output_head
from vlmkernels.models.image_features import encode_images, takes_features, use_image_features, why_not_frozen
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.models.loading import disable_dropout, frozen_copy, inference, load_model, load_processor
from vlmkernels.models.vision import use_vision_ops
from vlmkernels.ops.checks import require
from vlmkernels.ops.group_advantages import GroupAdvantages, group_advantages
from vlmkernels.ops.grpo_loss.parts import Part, combine_metrics, in_parts
from vlmkernels.record.callback import RunRecord
from vlmkernels.record.phases import Phases, phase
from vlmkernels.record.progress import RewardProgress
from vlmkernels.record.summary import completion_metrics, reward_metrics
from vlmkernels.rewards import Rewards, Scores
from vlmkernels.rollout.base import make_engine
from vlmkernels.rollout.generate import Rollout, tokenizer_of
from vlmkernels.rollout.score import Scored, page_groups, score
from vlmkernels.train.checkpoint import (
    check_checkpoint,
    find_checkpoint,
    load_experience,
    load_weights,
    save_checkpoint,
    save_experience,
)
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.experience import Experience
from vlmkernels.train.faults import FiniteSteps, Samples, lost_processes_named
from vlmkernels.train.mismatch import Mismatch
from vlmkernels.train.parallel import (
    backward,
    check_parallelism,
    gathered,
    in_step,
    most,
    prepare_head,
    prepared_reference,
    whole,
)
from vlmkernels.train.processes import Processes, described
from vlmkernels.train.sampler import PromptSampler
from vlmkernels.train.work import Work, step_metrics

logger = logging.get_logger(__name__)


class GRPOTrainer(Trainer):
    """Trains a vision-language (or text) model with GRPO; the constructor is that of ``trl.GRPOTrainer``.

    Args:
        model: a model, or the path of one. With beta > 0 a frozen copy of it is the reference; a model with LoRA adapters is
            its own reference, with them disabled.
        reward_funcs: one or more functions, names of built-in ones, import paths, or dicts of a name, a weight and options; see
            ``vlmkernels.rewards.compose``.
        args: see ``GRPOConfig``.
        train_dataset, eval_dataset: rows with a length (``datasets.Dataset``, a list of dicts, ...); see
            ``vlmkernels.data.samples``. Every row is checked here. eval_dataset may be a dict of several.
        processing_class: the model's processor or tokenizer; default, that of the model's path.
        callbacks, optimizers: as in ``transformers.Trainer``.
        peft_config: adapters to train instead of the model.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: str | Callable | dict | list[str | Callable | dict],
        args: GRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config=None,
    ):
        args = GRPOConfig() if args is None else args
        self.processes = Processes(args.ddp_timeout)
        set_seed(args.seed)  # adapters start from random weights
        with self.processes.together("the set-up"):
            model = load_model(model, args.model_init_kwargs) if isinstance(model, str) else model
            if processing_class is None:
                processing_class = load_processor(model.config._name_or_path, args.model_init_kwargs)
            processing_class = with_fast_images(processing_class)
            self.tokenizer = tokenizer_of(processing_class)
            if self.tokenizer.pad_token is None:
                self.tokenizer.pad_token = self.tokenizer.eos_token
            self.family = family_of(model.config)
            if self.family is not TEXT and args.ddp_find_unused_parameters is None:
                args.ddp_find_unused_parameters = True  # a micro-batch without images leaves the vision tower without gradients
            self.rewards = Rewards(reward_funcs, args.reward_weights)
            media = self._check_datasets(train_dataset, eval_dataset, processing_class, args)
            self._samples = Samples(
                train_dataset, args.image_limits(), args.on_bad_sample, self._bad_samples.get("train_dataset")
            )

        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if args.disable_dropout:
            disable_dropout(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_parallelism(self.accelerator, model, args.n_gpu)
        self.processes.compare(**described(args, model, self.tokenizer, self.rewards, undecoded(train_dataset)))
        # compute_loss normalises over the accumulated batch itself; see training_step.
        self.model_accepts_loss_kwargs = True
        self.loss_config = args.loss_config()
        self.mismatch = Mismatch(self.loss_config, args.rollout_policy)
        self.head = output_head(model)
        prepare_head(self.accelerator, self.head)
        with whole(model):
            self.logit_arguments = logit_arguments(model, self.head)
        self.text_model = model.get_base_model() if is_peft_model(model) else model
        self.processor_arguments = use_vision_ops(self.text_model, processing_class)
        self.shares_prefix = self._choose_prefix_sharing()
        # Features of a vision tower that does not change serve all passes over a generation batch.
        self.encodes_once = self.shares_prefix and self.family is not TEXT and why_not_frozen(self.text_model) is None
        use_image_features(self.text_model)  # also where a resumed generation batch alone has some
        self.idle_media = None
        if in_step(self.accelerator) and self.family is not TEXT:
            media -= {"image"} if self.encodes_once else set()
            rule = "let every process of DDP run its vision tower, which needs mm_encoder_outputs (transformers >= 5.18)"
            require(not media or takes_features(self.text_model), "model", rule, type(self.text_model).__name__)
            self.idle_media = {kind: self._a_medium(kind, processing_class) for kind in sorted(media)} or None
        self.ref_head, self.ref_model = self.head, None
        if args.beta > 0 and not is_peft_model(model):
            with whole(model):
                reference = frozen_copy(model)
            self.ref_head = output_head(reference)
            self.ref_model = prepared_reference(self.accelerator, reference)
        self.generate = make_engine(model, processing_class, args, self.accelerator)
        self._experience: Experience | None = None
        self._metrics: dict[str, list] = defaultdict(list)
        self._step_time = 0.0
        self._finite_steps = FiniteSteps(self.accelerator, args.on_nonfinite)
        self.phases, self.work = Phases(args.device), Work()
        self.processes.waiting = partial(self.phases, "wait")
        self.add_callback(self.phases)
        self.record = RunRecord()
        self.add_callback(self.record)
        self._last_scored: tuple[Scored, torch.Tensor] | None = None
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(RewardProgress)
        set_seed(args.seed, device_specific=True)  # processes sample different completions

    # Set-up

    def _check_datasets(self, train_dataset, eval_dataset, processor, args: GRPOConfig) -> set[str]:
        """Returns which kinds of media the training rows have."""
        kinds, self._bad_samples = {}, {}
        named = {"train_dataset": train_dataset}
        named |= (
            {f"eval_dataset[{k!r}]": v for k, v in eval_dataset.items()}
            if isinstance(eval_dataset, dict)
            else {"eval_dataset": eval_dataset}
        )
        for name, dataset in named.items():
            if dataset is not None:
                check_row = None if args.remove_unused_columns else self.rewards.check_row
                bad = self._bad_samples[name] = {}
                left_out = bad if args.on_bad_sample == "skip" else None
                arguments = processor, args.chat_template_kwargs, check_row, left_out, args.image_limits()
                kinds[name] = check_dataset(dataset, name, *arguments)
                for reason in list(bad.values())[:1]:
                    text = "%s: %d of %d samples are left out (on_bad_sample='skip'); the first: %s"
                    logger.warning(text, name, len(bad), len(dataset), reason)
                self.rewards.check_columns([] if args.remove_unused_columns else column_names(dataset), name)
        if train_dataset is not None:
            prompts = args.prompts_per_generation * args.world_size
            rule = f"hold at least the {prompts} prompts of one generation batch"
            require(len(train_dataset) >= prompts, "train_dataset", rule, len(train_dataset))
        return kinds.get("train_dataset", set())

    def _choose_prefix_sharing(self) -> bool:
        """Whether the completions of a group run behind one copy of their prompt; says once what was chosen, and why."""
        reason = why_not_shared(self.text_model)
        require(self.args.share_prefix is not True or reason is None, "share_prefix", f"be 'auto' or False: {reason}", True)
        if self.args.share_prefix is False or reason is not None:
            logger.warning("Each completion runs behind a copy of its prompt and images: %s", reason or "share_prefix is off")
            return False
        use_group_attention(self.text_model)
        logger.info("Prompts and images run once per group (share_prefix)")
        return True

    def _a_medium(self, kind: str, processor) -> dict[str, torch.Tensor]:
        """Model inputs of one small image or video: what a process without any runs its part of the vision tower on."""
        image = Image.new("RGB", (64, 64))
        media = {"images": [image]} if kind == "image" else {"videos": [[image, image]]}
        sample = read_sample({"prompt": [{"role": "user", "content": "?"}], **media}, 0)
        arguments = self.args.chat_template_kwargs
        return encode([sample], processor, self.family, arguments, **self.processor_arguments).to(self.args.device).inputs

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """One batch of prompt indices per micro-batch: those of the generation batch that it belongs to, so that ``Trainer``
        counts micro-batches. Rows are read when their completions are sampled, once."""
        sampler = PromptSampler(
            len(self.train_dataset),
            chunk=self.args.prompts_per_generation * self.args.world_size,
            repeats=self.args.steps_per_rollout,
            shuffle=self.args.shuffle_dataset,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            global_step=lambda: self.state.global_step,
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
        )
        indices = range(len(self.train_dataset))
        loader = DataLoader(indices, batch_size=self.args.prompts_per_generation, sampler=sampler, collate_fn=list)
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """This process's share of the evaluation rows, in order, with their indices."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        name = f"eval_dataset[{dataset!r}]" if isinstance(dataset, str) else "eval_dataset"
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if dataset is None:
            raise ValueError("eval_dataset must be given to evaluate, got None")
        size = max(1, self.args.per_device_eval_batch_size // self.args.num_generations_eval)
        share = range(self.args.process_index, len(dataset), self.args.world_size)
        samples = Samples(dataset, self.args.image_limits(), self.args.on_bad_sample, self._bad_samples.get(name))
        return DataLoader(samples, batch_size=size, sampler=share, collate_fn=list)

    # Sampling and scoring

    @property
    def policy(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model_wrapped)

    @contextmanager
    def _whole_policy(self):
        """The policy as sampling needs it; entered by all processes as often."""
        self.processes.meet("sampling")
        # Autocast here, not in each forward pass alone, casts a weight once, not once per token.
        with gathered(self.accelerator, self.policy, self.head), self.accelerator.autocast():
            yield

    def _sample(self, samples: list[Sample], num_generations: int, temperature: float) -> tuple[Rollout, Scored]:
        with self.phases("data"):
            prompts = encode(
                samples, self.processing_class, self.family, self.args.chat_template_kwargs, **self.processor_arguments
            )
            prompts = prompts.to(self.args.device)
        with self.phases("generate"), self._whole_policy():
            if self.encodes_once and getattr(self.generate, "by_groups", False):
                prompts = encode_images(self.text_model, prompts)
            more = {}
            if self.args.use_vllm:
                for name, value in self.generate.synchronise(self.policy, self.state.global_step).items():
                    self._metrics[name].append(value)
                more["samples"] = samples
            rollout = self.generate(self.policy, prompts, num_generations, temperature, **more)
            if self.encodes_once:
                rollout = replace(rollout, prompts=encode_images(self.text_model, rollout.prompts))
        per_completion = [samples[index] for index in rollout.group.tolist()]
        columns = not self.args.remove_unused_columns
        processors = self.processing_class, self.tokenizer
        with self.phases("reward"):
            scored = score(per_completion, rollout, self.rewards, *processors, columns=columns, trainer_state=self.state)
        return rollout, scored

    def _advantages(self, rewards: torch.Tensor, num_generations: int) -> GroupAdvantages:
        weights = self.rewards.weights.to(rewards.device)
        return group_advantages(rewards, num_generations, weights=weights, scale=self.args.scale_rewards)

    def _new_experience(self, indices: list[int]) -> Experience:
        """Sample and score the completions of the next ``steps_per_rollout`` micro-batches."""
        with self.processes.together(f"the completions of step {self.state.global_step}"), inference(self.policy):
            with self.phases("data"):
                samples = [self._samples[index][1] for index in indices]
            rollout, scored = self._sample(samples, self.args.num_generations, self.args.temperature)
        if self.args.on_bad_sample == "skip":
            replaced = [sample.index != index for sample, index in zip(samples, indices, strict=True)]
            self._metrics["frac_samples_replaced"].append(sum(replaced) / len(replaced))
        self.work.sampled(rollout, shared=getattr(self.generate, "by_groups", False))
        with self.phases("wait"):
            rewards = self.accelerator.gather(scored.scores.rewards.to(self.args.device))
        result = self._advantages(rewards, self.args.num_generations)
        local = slice(self.args.process_index * len(scored.samples), (self.args.process_index + 1) * len(scored.samples))
        mask = rollout.completion_mask
        if self.args.mask_truncated_completions:
            mask = mask & ~rollout.truncated.unsqueeze(1)
        num_items = self.accelerator.reduce(mask.sum().float(), "mean").item()
        experience = Experience(rollout, result.advantages[local], mask, max(num_items, 1.0))
        self._last_scored = scored, result.advantages[local]
        self._record_rollout(rollout, rewards, result, scored.scores)
        self._add_fixed_logps(experience)
        return experience

    def _record_rollout(self, rollout: Rollout, rewards: torch.Tensor, result: GroupAdvantages, scores: Scores) -> None:
        """rewards: of all processes; scores: of this one."""
        lengths = self.accelerator.gather(rollout.completion_mask.sum(1))
        truncated = self.accelerator.gather(rollout.truncated)
        prompt_lengths = rollout.prompts.inputs["attention_mask"].sum(1)[rollout.group.to(lengths.device)]
        self.state.num_input_tokens_seen += int(lengths.sum() + self.accelerator.gather(prompt_lengths).sum())
        self._metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        metrics = reward_metrics(rewards, self.rewards.names, result) | completion_metrics(lengths, truncated)
        for name, value in (metrics | scores.metrics(self.rewards.names)).items():
            self._metrics[name].append(value)

    # Log-probabilities and loss

    def _micro_batch(self, index: int) -> slice:
        size = self.args.per_device_train_batch_size
        return slice(index * size, (index + 1) * size)

    def _add_fixed_logps(self, experience: Experience) -> None:
        """The log-probabilities that do not change while the batch is used.

        Micro-batches before the first optimiser step are on policy: their old log-probabilities are those of their own
        forward pass (see ``compute_loss``).
        """
        micro_batches = range(self.args.steps_per_generation)
        off_policy = micro_batches[self.args.gradient_accumulation_steps :]
        empty = torch.zeros(experience.mask.shape, device=experience.mask.device)
        if off_policy or self.args.num_iterations > 1:
            experience.old_logps = empty.clone()
        with inference(self.model_wrapped):
            for index in off_policy:
                with self.phases("old_logps"):
                    self._fill(experience.old_logps, experience, index, self.model_wrapped, self.head)
        if self.args.beta > 0:
            experience.ref_logps = empty.clone()
            model, as_reference = self.ref_model, nullcontext()
            if model is None:
                model, as_reference = self.model_wrapped, self.policy.disable_adapter()
            with self.phases("ref_logps"), inference(model), as_reference:
                for index in micro_batches:
                    self._fill(experience.ref_logps, experience, index, model, self.ref_head)

    def _parts(self, experience: Experience, index: int) -> list[torch.Tensor]:
        """A micro-batch in parts within the token budget; the last one perhaps several times, to be run for nothing."""
        width = self.text_model.config.get_text_config().hidden_size
        samples, budget = self._micro_batch(index), self.args.max_tokens_per_microbatch
        parts = experience.rollout.parts(samples, budget, shared=self.shares_prefix, hidden_size=width)
        if budget is not None and in_step(self.accelerator):  # every process runs the model as often
            parts += parts[-1:] * (most(self.accelerator, len(parts)) - len(parts))
        return parts

    def _batch(self, experience: Experience, samples: torch.Tensor) -> ScoringBatch:
        rollout = experience.rollout
        batch = rollout.packed(samples, self.text_model) if self.shares_prefix else rollout.padded(samples)
        self.work.scored(rollout, samples, batch)
        if self.idle_media is not None:
            pixels = {"image": "pixel_values", "video": "pixel_values_videos"}
            idle = {kind: inputs for kind, inputs in self.idle_media.items() if pixels[kind] not in batch.inputs}
            batch.inputs["idle_media"] = idle
        return batch

    def _fill(self, out: torch.Tensor, experience: Experience, index: int, model, head) -> None:
        for samples in self._parts(experience, index):
            logps = completion_logps(model, self._batch(experience, samples), head=head, **self._head_arguments)
            mask = experience.rollout.completion_mask[samples]
            out[samples] = out.new_zeros(mask.shape).masked_scatter_(mask, logps)

    @property
    def _head_arguments(self) -> dict:
        return {"arguments": self.logit_arguments, "temperature": self.args.temperature}

    @phase("other")
    def _prepare_inputs(self, inputs: list[int]) -> int:
        """From the prompts of a generation batch to the index of the micro-batch to train on; samples when it is time."""
        if self._experience is None or self._experience.uses == self.args.steps_per_rollout:
            self._experience = self._new_experience(inputs)
        self._experience.uses += 1
        return self._experience.uses - 1

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        start = time.perf_counter()
        # Any number of items tells Trainer not to divide the loss by the accumulation steps again.
        with self.phases("backward"):  # around the phases of _prepare_inputs and _loss
            loss = super().training_step(model, inputs, num_items_in_batch=1)
        self._step_time += time.perf_counter() - start
        if self.accelerator.sync_gradients:
            self._metrics["step_time"].append(self._step_time)
            self._step_time = 0.0
            self.phases.between_steps("optimizer")
            skipped = self._finite_steps(self.policy, self.state.global_step + 1)
            if self.args.on_nonfinite == "skip":
                self._metrics["frac_steps_skipped"].append(skipped)
        return loss

    def compute_loss(self, model, inputs: int, return_outputs: bool = False, num_items_in_batch=None) -> torch.Tensor:
        """The loss of the ``inputs``-th use of the generation batch, as a share of the accumulated batch.

        Of a micro-batch in several parts, those before the last are taken back through the model here.
        """
        experience, total = self._experience, 0.0
        parts = self._parts(experience, inputs % self.args.steps_per_generation)
        repeats = sum(part is parts[-1] for part in parts) - 1
        real = parts[: len(parts) - repeats]
        sizes, tokens = [len(part) for part in real], [1]
        if len(real) > 1:  # for the only one nothing need wait for the device
            tokens = [int(experience.mask[part].sum()) for part in real]
        calls = in_parts(self.loss_config, sizes, tokens, self.current_gradient_accumulation_steps)
        metrics = []
        for number, samples in enumerate(parts):
            last, call = number == len(parts) - 1, calls[min(number, len(real) - 1)]
            with nullcontext() if last else self.accelerator.no_sync(model):
                loss, measured, old_logps = self._loss(model, experience, inputs, samples, call)
                if number < len(real):
                    metrics.append(measured)
                    if inputs < self.args.steps_per_generation:
                        self.mismatch.add(experience.rollout, samples, experience.mask[samples], old_logps)
                else:
                    loss = 0.0 * loss
                if not last:
                    backward(self.accelerator, loss)
                    loss = loss.detach()
            total = total + loss
        combined = combine_metrics(self.loss_config, sizes, metrics)
        self._finite_steps.observe(total, combined)
        for name, value in combined.items():
            self._metrics[name].append(value)
        return total

    @phase("forward")
    def _loss(
        self, model, experience: Experience, use: int, samples: torch.Tensor, call: Part
    ) -> tuple[torch.Tensor, dict, torch.Tensor]:
        """The loss, metrics and old log-probabilities of some completions."""
        args = self.args
        on_policy = use < min(args.gradient_accumulation_steps, args.steps_per_generation)
        cut = lambda logps: None if logps is None else logps[samples]  # noqa: E731
        window, counts = self.current_gradient_accumulation_steps, experience.mask[samples]
        batch = self._batch(experience, samples).of(counts[experience.rollout.completion_mask[samples]])
        loss, metrics, logps, _ = completion_loss(
            model,
            batch,
            counts,
            head=self.head,
            **self._head_arguments,
            advantages=experience.advantages[samples],
            old_logps=None if on_policy else cut(experience.old_logps),
            ref_logps=cut(experience.ref_logps),
            rollout_logps=self.mismatch.rollout_logps(experience.rollout, samples),
            entropy_threshold=self._entropy_threshold(),
            num_items=experience.num_items * window / args.steps_per_generation,
            **call._asdict(),
        )
        if not on_policy:
            return loss, metrics, experience.old_logps[samples]
        old_logps = torch.zeros_like(counts, dtype=logps.dtype).masked_scatter_(counts, logps)
        if experience.old_logps is not None:
            experience.old_logps[samples] = old_logps
        return loss, metrics, old_logps

    def _entropy_threshold(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """With top_entropy_quantile and several processes, the quantile over the tokens of all of them."""
        if self.args.top_entropy_quantile == 1 or self.args.world_size == 1:
            return None

        def threshold(entropy: torch.Tensor) -> torch.Tensor:
            values = self.accelerator.gather(self.accelerator.pad_across_processes(entropy, pad_index=math.nan))
            return values.nanquantile(1 - self.args.top_entropy_quantile)

        return threshold

    # Evaluation, logs and checkpoints

    @phase("evaluate")
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Sample and score the rows; no loss. Metrics have the names of training's."""
        args, parts = self.args, []
        self.callback_handler.eval_dataloader = dataloader
        idle = most(self.accelerator, len(dataloader)) - len(dataloader)
        with self.processes.together(f"the evaluation at step {self.state.global_step}"), inference(self.policy):
            for rows in dataloader:
                samples = [sample for _, sample in rows]
                rollout, scored = self._sample(samples, args.num_generations_eval, args.eval_temperature)
                # One in the place of a sample that cannot be read runs, since all processes run as many, and does not count.
                own = torch.tensor([sample.index == index for index, sample in rows])
                own = own.repeat_interleave(args.num_generations_eval)
                lengths, truncated = rollout.completion_mask.sum(1).cpu(), rollout.truncated.cpu()
                parts.append((scored.scores.of(own), lengths[own], truncated[own]))
                self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
            for _ in range(idle):
                with self._whole_policy():  # others have more rows
                    pass
        scores, lengths, truncated = zip(*gather_object(parts), strict=True)
        scores, lengths, truncated = Scores.cat(scores), torch.cat(lengths), torch.cat(truncated)
        result = self._advantages(scores.rewards, args.num_generations_eval)
        metrics = reward_metrics(scores.rewards, self.rewards.names, result) | completion_metrics(lengths, truncated)
        metrics |= scores.metrics(self.rewards.names)
        metrics = {f"{metric_key_prefix}_{name}": None if math.isnan(value) else value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, len(lengths) // args.num_generations_eval)

    @phase("log")
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, value in step_metrics(self.phases, self.work, self.args.world_size).items():
                self._metrics[name].append(value)
            logs.update(self._flush_metrics() | self.mismatch.flush(self.accelerator))
        super().log(logs, start_time)
        args = self.args
        if "loss" in logs and args.log_completions and self._last_scored and self.is_world_process_zero():
            limits = args.num_generations, args.num_completions_to_print
            groups = page_groups(*self._last_scored, self.rewards.names, *limits)
            self.record.completions(args, self.state, groups, self.callback_handler.callbacks)

    def _flush_metrics(self) -> dict[str, float | None]:
        """The mean of each metric since the last call, over all processes; None where nothing was measured."""
        means = [torch.tensor([float(v) for v in values]).nanmean() for values in self._metrics.values()]
        names = list(self._metrics)
        self._metrics.clear()
        if not means:
            return {}
        means = self.accelerator.reduce(torch.stack(means).to(self.args.device), "mean").tolist()
        return {name: None if math.isnan(mean) else mean for name, mean in zip(names, means, strict=True)}

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As ``Trainer.train``; True resumes from the last complete checkpoint in ``args.output_dir``."""
        self._experience = None
        if resume_from_checkpoint:
            with self.args.main_process_first(local=self.args.save_on_each_node, desc="the checkpoint"):  # it may rename one
                resume_from_checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
            check_checkpoint(resume_from_checkpoint, self.policy, self.args.world_size)
            state = load_experience(resume_from_checkpoint, self.args.process_index)
            if state is not None:
                self._experience = Experience.from_state_dict(state, self.family, self.args.device)
                self._experience.check(self.args, resume_from_checkpoint)
        with lost_processes_named(self.accelerator):
            return super().train(resume_from_checkpoint or None, **kwargs)

    def _run_epoch(self, **arguments) -> None:
        if self.state.global_step < self.state.max_steps:  # Trainer takes one more step where a finished run is resumed
            super()._run_epoch(**arguments)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if is_peft_model(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if is_peft_model(self.model) or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, self.state.best_model_checkpoint)

    @phase("save")
    def _save_checkpoint(self, model, trial) -> None:
        save_checkpoint(self, self._get_output_dir(trial), skip=self.args.on_save_error == "skip")

    def _save_rng_state(self, output_dir: str) -> None:
        """With the random states, the generation batch still in use: a resumed run goes on within it."""
        super()._save_rng_state(output_dir)
        if self._experience is not None and self._experience.uses < self.args.steps_per_rollout:
            save_experience(self._experience, output_dir, self.args.process_index)
