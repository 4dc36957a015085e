"""The progress bar of a run."""

from transformers import ProgressCallback

# The metrics on the progress bar: label and format.
SHOWN = {
    "reward": ("reward", "{:.3g}"),
    "tokens_per_second": ("tok/s", "{:,.0f}"),
    "completions/mean_length": ("length", "{:.0f}"),
    "distillation/divergence": ("divergence", "{:.2g}"),
    "kl": ("kl", "{:.2g}"),
    "entropy": ("entropy", "{:.2g}"),
    "eval_reward": ("eval", "{:.3g}"),
}


class RewardProgress(ProgressCallback):
    """A progress bar with the last logged metrics of ``SHOWN``."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.shown: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is None or logs is None:
            return
        self.shown |= {
            label: template.format(logs[name]) for name, (label, template) in SHOWN.items() if logs.get(name) is not None
        }
        self.training_bar.set_postfix(self.shown)
