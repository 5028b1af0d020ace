"""Lets a CUDA build of torchvision be imported beside a CPU build of torch (installed by
cpu_env.py, cure 3).

Such a torchvision cannot load its C++ extension and carries on without it, except that it then
describes two operators, `nms` and `qnms`, that only the extension would have declared. This module
declares them just before torchvision's own code runs. They have no implementation: calling one
raises NotImplementedError, and nothing here does. A `.pth` line imports this module in every
interpreter, so it does no work, and imports no torch, until someone imports torchvision.
"""

import sys
from importlib.machinery import PathFinder

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
library = None  # the declarations live as long as this object


def declare() -> None:
    global library
    import torch

    if library is None and torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)


class Finder:
    """Finds torchvision as usual, and has `declare` run when (not before) it is executed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            declare()
            execute(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder)
