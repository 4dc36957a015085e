"""torchvision from PyPI, built for CUDA, beside PyTorch for CPUs: its operators do not load, and its import stops where it
describes two of them. Declared beforehand, they are there to be described; image processors call none.

``make test-vllm`` copies this into the environment, where every process of it, the server's too, runs it at its start.
"""

import sys
from importlib.abc import MetaPathFinder


class DeclareOperators(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


finder = DeclareOperators()
sys.meta_path.insert(0, finder)
