"""Build the ops as a kernel of Hugging Face's ``kernels``: Triton and reference, for any Python and torch they run on.

    python hub/kernel.py OUT
    >>> from kernels import get_local_kernel
    >>> get_local_kernel(Path("OUT")).gather_logps(logits, targets)

OUT/build/torch-cpu and OUT/build/torch-cuda are what the Hub holds: the files of ``vlmkernels/`` that the ops need, with two
changes. A kernel is loaded under a name of its own, so imports become relative; and several versions may be loaded beside each
other and the package, so the ops are registered in a namespace that is a hash of their code.

Source: https://huggingface.co/docs/kernels/kernel-requirements
"""

import hashlib
import json
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "vlmkernels"
PARTS = ("__init__.py", "backend.py", "version.py", "models/__init__.py", "models/merge.py", "ops/**/*.py")
LEFT_OUT = ("native.py", "table.py")  # the compiled module's, and the README's
BACKENDS = ("cpu", "cuda")


def sources() -> dict[str, str]:
    """Path within the package -> text, imports relative, in a namespace of ops to be filled in."""
    files = sorted(path for part in PARTS for path in PACKAGE.glob(part) if path.name not in LEFT_OUT)
    texts = {}
    for path in files:
        name = path.relative_to(PACKAGE)
        start = rf"\1from {'.' * len(name.parts)}"
        text = re.sub(r"^(\s*)from vlmkernels(?:\.|(?= import))", start, path.read_text(), flags=re.MULTILINE)
        texts[str(name)] = re.sub(r'(?<=")vlmkernels(?=::)|(?<=torch\.ops\.)vlmkernels(?=\.)', "{namespace}", text)
    return texts


def build(out: Path) -> None:
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
