"""Install the package with pip in fresh virtual environments: with nvcc, without it, and without any compiler.

    python bench/installs.py          # writes bench/results/installs.json

torch comes from the environment that runs this script; pip builds and installs the package in isolation.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from harness import RESULTS, commit, device_name

ROOT = Path(__file__).parents[1]
PROBE = """
import json, torch, vlmkernels
from vlmkernels import backend, env
x = torch.randn(3, 50, requires_grad=True); t = torch.tensor([1, 2, 3])
vlmkernels.gather_logps(x, t).sum().backward()
torch.testing.assert_close(x.grad, torch.eye(50)[t] - x.softmax(-1).detach())
built = [n for n in backend.BACKENDS if backend.missing(n) is None or "no GPU" in backend.missing(n)]
print(json.dumps({"file": vlmkernels.__file__, "backends": built, "auto": backend.choose("gather_logps", "auto", x)}))
"""
# The tools that are hidden from PATH in each case.
WITHOUT = {"with nvcc": (), "without nvcc": ("nvcc",), "without a compiler": ("nvcc", "c++", "g++", "clang++", "gcc", "cc")}


def path_without(tools: tuple[str, ...], folder: Path) -> str:
    """A folder of links to everything on PATH except ``tools``."""
    folder.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).iterdir() if Path(directory).is_dir() else ():
            if program.name not in tools and not (folder / program.name).exists():
                (folder / program.name).symlink_to(program)
    return str(folder)


def install(name: str, work: Path) -> dict:
    environment = {**os.environ, "PATH": path_without(WITHOUT[name], work / "bin")}
    environment.pop("CUDA_HOME", None)
    source = work / "source"
    ignored = shutil.ignore_patterns(".venv", ".git", "build", "*.so", "*.egg-info", "demo-output", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
    python = work / "venv/bin/python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    # This makes torch and triton of this environment importable, but not its editable vlmkernels: that is a .pth file, which
    # Python does not read in an added directory.
    Path(site.stdout.strip(), "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    start = time.perf_counter()
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", "."]
    subprocess.run(pip, cwd=source, env=environment, check=True)
    seconds = time.perf_counter() - start
    pip = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", work / "wheel", "."]
    subprocess.run(pip, cwd=source, env=environment, check=True)
    shown = subprocess.run([python, "-c", PROBE], cwd=work, env=environment, capture_output=True, text=True, check=True).stdout
    result = json.loads(shown)
    assert str(work) in result["file"], f"tested {result['file']}, not the package just installed"
    (wheel,) = (work / "wheel").glob("*.whl")
    return {"name": name, "seconds": round(seconds, 1), "wheel": wheel.name, "wheel_kib": wheel.stat().st_size / 1024, **result}


def main() -> int:
    rows = []
    for name in WITHOUT:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(install(name, Path(folder)))
            print({k: v for k, v in rows[-1].items() if k != "file"}, flush=True)
            del rows[-1]["file"]
    assert [row["backends"] for row in rows] == [
        ["reference", "cpp", "triton", "cuda"],
        ["reference", "cpp", "triton"],
        ["reference", "triton"],
    ]
    content = {"device": device_name(), "commit": commit(), "rows": rows}
    (RESULTS / "installs.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
