"""What a run shows on the terminal."""

from transformers import ProgressCallback

SHOWN = {"reward": "reward", "completions/mean_length": "length", "kl": "kl", "entropy": "entropy", "eval_reward": "eval"}


class RewardProgress(ProgressCallback):
    """The progress bar, with the reward and what else tells how the run goes."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or logs is None:
            return
        shown = {label: f"{logs[name]:.3g}" for name, label in SHOWN.items() if logs.get(name) is not None}
        if shown:
            self.training_bar.set_postfix(shown)
