"""Which tokens: the registry of pruning methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from torch import Tensor

from .base import Fidelity, Method, PrunedTokens, VisualTokens

__all__ = ["MethodInfo", "PrunedTokens", "VisualTokens", "get_method", "list_methods", "prune"]

# name -> "module.Class" inside this package, imported when first asked for. One line per method;
# this order is shown.
_REGISTRY: dict[str, str] = {
    "fsr": "fsr.FSR",
    "cdpruner": "cdpruner.CDPruner",
    "divprune": "divprune.DivPrune",
    "vispruner": "vispruner.VisPruner",
    "visionzip": "visionzip.VisionZip",
    "holov": "holov.HoloV",
    "scope": "scope.Scope",
    "zspaprune": "zspaprune.ZSPAPrune",
    "codebook": "codebook.Codebook",
    "hiprune": "hiprune.HiPrune",
    "prumerge": "prumerge.PruMerge",
    "vscan": "vscan.VScan",
    "vflowopt": "vflowopt.VFlowOpt",
    "visiondrop": "visiondrop.VisionDrop",
    "quota": "quota.Quota",
    "fastv": "fastv.FastV",
    "sparsevlm": "sparsevlm.SparseVLM",
    "dart": "dart.DART",
    "ivc": "ivc.IVC",
    "fastervlm": "fastervlm.FasterVLM",
    "relevance": "relevance.Relevance",
    "none": "none.NoSelection",
    "random": "random.Random",
    "uniform": "uniform.Uniform",
    "avgpool": "avgpool.AvgPool",
}


@dataclass(frozen=True)
class MethodInfo:
    """What a user may want to know before choosing a method."""

    name: str
    needs: tuple[str, ...]  # fields of VisualTokens it cannot run without
    uses: tuple[str, ...]  # fields it profits from where given
    query_aware: bool
    servable: bool  # a server can form its needs; False: for tensors of one's own alone
    shallow_layer: (
        int  # block of a 24-block tower, from 0, that shallow_* signals are read at; 0: not needed
    )
    paper: str
    license: str  # of the authors' published code; ours is written from the paper
    fidelity: Fidelity
    summary: str
    options: Mapping[str, Any]  # hyper-parameter -> default
    option_docs: Mapping[str, str]
    option_bounds: Mapping[str, str]  # what a request may ask for besides, by option


def _class(name: str) -> type[Method]:
    if name not in _REGISTRY:
        raise ValueError(f"unknown method {name!r}; known are {', '.join(_REGISTRY)}")
    module, _, cls = _REGISTRY[name].partition(".")
    return getattr(import_module(f"{__name__}.{module}"), cls)


def get_method(name: str, /, **options: Any) -> Method:
    """The method `name` with its published defaults, changed by `options`; ValueError if either is
    unknown or wrong.
    """
    cls = _class(name)
    allowed = [item.name for item in fields(cls)]
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"method {name!r} has no option {option!r}; allowed are {', '.join(allowed) or 'none'}"
            )
    return cls(**options)


def list_methods() -> dict[str, MethodInfo]:
    """All methods in registration order."""
    found = {}
    for name in _REGISTRY:
        cls = _class(name)
        found[name] = MethodInfo(
            name=name,
            needs=cls.needs,
            uses=cls.uses,
            query_aware=cls.query_aware,
            servable=cls.servable,
            shallow_layer=cls.shallow_layer,
            paper=cls.paper,
            license=cls.license,
            fidelity=cls.fidelity,
            summary=(cls.__doc__ or "").partition("\n")[0],
            options={item.name: item.default for item in fields(cls)},
            option_docs={item.name: item.metadata.get("doc", "") for item in fields(cls)},
            option_bounds={
                item.name: str(item.metadata["served"])
                for item in fields(cls)
                if item.metadata["served"]
            },
        )
    return found


def prune(
    features: Tensor,
    *,
    budget: int,
    method: str = "fsr",
    saliency: Tensor | None = None,
    relevance: Tensor | None = None,
    metric: Tensor | None = None,
    keys: Tensor | None = None,
    cls_row: Tensor | None = None,
    shallow_saliency: Tensor | None = None,
    received: Tensor | None = None,
    shallow_received: Tensor | None = None,
    attention: Tensor | None = None,
    last_query: Tensor | None = None,
    last_key: Tensor | None = None,
    text: Tensor | None = None,
    prototypes: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    frame_weights: Tensor | None = None,
    probe: Tensor | None = None,
    group: Tensor | None = None,
    **hyper_parameters: Any,
) -> PrunedTokens:
    """Keep min(budget, N) of the N rows of features (N, D) or (B, N, D) by `method`; signals as in
    `VisualTokens`.

    ValueError for an unknown method or option, a missing signal, a wrong shape, NaN or Inf.
    """
    given = dict(locals())
    tokens = VisualTokens(**{item.name: given[item.name] for item in fields(VisualTokens)})
    return get_method(method, **hyper_parameters).prune(tokens, budget)
