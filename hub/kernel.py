"""Build the ops, with the backends triton and reference, as a kernel for the Hugging Face library ``kernels``.

    python hub/kernel.py OUT
    >>> from kernels import get_local_kernel
    >>> get_local_kernel(Path("OUT")).gather_logps(logits, targets)

OUT/build/torch-cpu and OUT/build/torch-cuda are the folders to upload to the Hub. They contain the files of ``vlmkernels/``
that the ops need, with two changes. Imports are relative, because a kernel is loaded under another name. The ops are registered
in a namespace that contains a hash of the code: several versions, and the package itself, can be loaded in one process.

Source: https://huggingface.co/docs/kernels/kernel-requirements
"""

import hashlib
import json
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "vlmkernels"
PARTS = ("__init__.py", "backend.py", "version.py", "ops/**/*.py")
LEFT_OUT = ("native.py", "table.py")  # calls of the compiled module; the table of variants in the docs
BACKENDS = ("cpu", "cuda")


def sources() -> dict[str, str]:
    """Return the text of each file by its path in the package, with relative imports and the ops in ``{namespace}``."""
    files = sorted(path for part in PARTS for path in PACKAGE.glob(part) if path.name not in LEFT_OUT)
    texts = {}
    for path in files:
        name = path.relative_to(PACKAGE)
        relative = rf"\1from {'.' * len(name.parts)}"
        text = re.sub(r"^(\s*)from vlmkernels(?:\.|(?= import))", relative, path.read_text(), flags=re.MULTILINE)
        texts[str(name)] = re.sub(r'(?<=")vlmkernels(?=::)|(?<=torch\.ops\.)vlmkernels(?=\.)', "{namespace}", text)
    return texts


def build(out: Path) -> None:
    """Write one variant per backend to ``out``. Both have the same code; the Hub requires one folder per backend."""
    texts = sources()
    namespace = "vlmkernels_" + hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
    for backend in BACKENDS:
        variant = out / "build" / f"torch-{backend}"
        for name, text in texts.items():
            (variant / name).parent.mkdir(parents=True, exist_ok=True)
            (variant / name).write_text(text.replace("{namespace}", namespace))
        metadata = {
            "id": f"_{namespace}_{backend}",
            "name": "vlmkernels",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python hub/kernel.py OUT")
    build(Path(sys.argv[1]))
