"""What a run shows on the terminal."""

from transformers import ProgressCallback

SHOWN = {
    "reward": ("reward", "{:.3g}"),
    "tokens_per_second": ("tok/s", "{:,.0f}"),
    "completions/mean_length": ("length", "{:.0f}"),
    "kl": ("kl", "{:.2g}"),
    "entropy": ("entropy", "{:.2g}"),
    "eval_reward": ("eval", "{:.3g}"),
}


class RewardProgress(ProgressCallback):
    """The progress bar, with the reward, the speed, and what else tells how the run goes; values stay until they change."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.shown: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or logs is None:
            return
        self.shown |= {label: form.format(logs[name]) for name, (label, form) in SHOWN.items() if logs.get(name) is not None}
        self.training_bar.set_postfix(self.shown)
