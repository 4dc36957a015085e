"""Write a small dataset and a tiny vision-language model for the other examples, which then run on a CPU without downloads.

    python examples/prepare.py digits

writes ``digits/train.jsonl`` and ``digits/test.jsonl`` (images of handwritten numbers, prompt and answer) and ``digits/model``,
a Qwen2.5-VL of 0.6 million parameters that reads about half of the numbers after a short supervised warm-up. It takes
about 20 seconds and needs ``pip install '.[demo]'``.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from vlmkernels.demo.model import build_model, build_processor
from vlmkernels.demo.warmup import warm_up
from vlmkernels.evaluate.digits import compose, load_scans, save_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--rows", type=int, default=1024, help="number of training rows")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the matrices are too small to benefit from more threads
    train, test = load_scans()
    rng = np.random.default_rng(0)
    args.folder.mkdir(parents=True, exist_ok=True)
    save_rows(compose(train, args.rows, rng), args.folder / "train.jsonl")
    save_rows(compose(test, 200, rng), args.folder / "test.jsonl")
    processor = build_processor()
    model = build_model(processor, seed=0)
    warm_up(model, processor, train, rng)
    model.save_pretrained(args.folder / "model")
    processor.save_pretrained(args.folder / "model")


if __name__ == "__main__":
    main()
