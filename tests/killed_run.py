"""A run that kills itself while it writes the checkpoint of step 6: the subprocess of a test."""

import os
import signal
import sys

import tiny
import torch

from vlmkernels.train import GRPOConfig, GRPOTrainer

torch.set_num_threads(1)


def build(output_dir) -> GRPOTrainer:
    """9 steps over 2 epochs of 6; a generation batch serves 4 steps, a checkpoint is due every 3."""
    args = GRPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=4,
        num_generations=4,
        steps_per_generation=2,
        num_iterations=2,
        max_completion_length=6,
        beta=0.1,
        rollout_correction="token_truncate",
        learning_rate=1e-2,
        max_steps=9,
        save_steps=3,
        logging_steps=1,
        disable_tqdm=True,
    )
    data = tiny.rows(3, "mixed")
    return GRPOTrainer(tiny.vlm(), ["cer", brevity], args, data, processing_class=tiny.processor())


def brevity(completions, **kwargs):
    return [1 / (1 + len(c[0]["content"])) for c in completions]


def kill_at_step_6(trainer) -> None:
    save = trainer._save_optimizer_and_scheduler

    def save_or_die(output_dir):
        if trainer.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        save(output_dir)

    trainer._save_optimizer_and_scheduler = save_or_die


if __name__ == "__main__":
    trainer = build(sys.argv[1])
    kill_at_step_6(trainer)
    trainer.train()
