"""The methods by name: what is told of each, and how one is built with its options."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # nothing here needs torch before a method is asked for
    from .base import Fidelity, Method

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
    "truncate": "truncate.Truncate",
    "random": "random.Random",
    "uniform": "uniform.Uniform",
    "avgpool": "avgpool.AvgPool",
}

# Old name -> new name: refused, by an error that says the new one.
RENAMED = {"none": "truncate"}

# What preset="served" lays over the published defaults. Decided by measurement only: a method that
# is not listed is served with its published defaults. FSR's: benchmarks/results/accuracy.md
# (docs/testbed.md says how).
SERVED_DEFAULTS: dict[str, dict[str, Any]] = {
    "fsr": {
        "alpha": 0.5,
        "max_focus_share": 0.75,
        "focus_rule": "whole",
        "scan": "coverage",
        "refine": "soft",
    }
}


@dataclass(frozen=True)
class MethodInfo:
    """What a user may want to know before choosing a method."""

    name: str
    needs: tuple[str, ...]  # fields of VisualTokens it cannot run without
    uses: tuple[str, ...]  # fields it profits from where given
    query_aware: bool
    servable: bool  # a server can form its needs; False: for tensors of one's own alone
    # Block of a 24-block tower, from 0, that shallow_* signals are read at; 0: not needed.
    shallow_layer: int
    paper: str
    license: str  # of the authors' published code; ours is written from the paper
    fidelity: Fidelity
    summary: str
    options: Mapping[str, Any]  # hyper-parameter -> default
    option_docs: Mapping[str, str]
    option_bounds: Mapping[str, str]  # what a request may ask for besides, by option


def _class(name: str) -> type[Method]:
    if name in RENAMED:
        raise ValueError(f"method {name!r} is now called {RENAMED[name]!r}")
    if name not in _REGISTRY:
        raise ValueError(f"unknown method {name!r}; known are {', '.join(_REGISTRY)}")
    module, _, cls = _REGISTRY[name].partition(".")
    return getattr(import_module(f"{__package__}.{module}"), cls)


def get_method(name: str, /, *, preset: str = "paper", **options: object) -> Method:
    """The method `name` with its published defaults, changed by `options`.

    preset="served" starts from what a server runs where it is not asked for options. ValueError for
    an unknown name, preset or option, and for a value that an option does not take.
    """
    cls = _class(name)
    if preset not in ("paper", "served"):
        raise ValueError(f'preset must be "paper" or "served"; got {str(preset)[:80]!r}')
    allowed = [item.name for item in fields(cls)]
    for option in options:
        if option not in allowed:
            known = ", ".join(allowed) or "none"
            raise ValueError(f"method {name!r} has no option {option!r}; allowed are {known}")
    start = SERVED_DEFAULTS.get(name, {}) if preset == "served" else {}
    return cls(**{**start, **options})


def list_methods() -> dict[str, MethodInfo]:
    """All methods in registration order."""
    return {name: _told(name) for name in _REGISTRY}


@functools.cache
def _told(name: str) -> MethodInfo:
    cls = _class(name)
    options = fields(cls)
    return MethodInfo(
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
        options={item.name: item.default for item in options},
        option_docs={item.name: item.metadata["doc"] for item in options},
        option_bounds={
            item.name: str(item.metadata["served"]) for item in options if item.metadata["served"]
        },
    )
