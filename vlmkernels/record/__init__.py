"""What a training run writes to its ``output_dir``: metrics, phases, a description of the run, and pages of completions."""
