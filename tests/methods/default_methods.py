"""The methods that every shared test runs over, and random inputs for them: a new method needs one
line here.

A method that is registered but not listed runs with its defaults, as one that depends on the order
of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from hypothesis import settings

from benchmarks.inputs import near_square
from fsr_vllm.methods import SERVED_DEFAULTS, VisualTokens, get_method, list_methods
from fsr_vllm.methods.base import Method

# Same examples in every run: a failure is a change of the code, and CI does not find old bugs on
# new days.
quick = settings(max_examples=20, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Case:
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    equivariant: bool = False  # tokens in another order give the same tokens in that order
    plain: bool = True  # rows come back as they were, unless they were merged into

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    def method(self) -> Method:
        return get_method(self.name, **self.options)


_LISTED = [
    Case("fsr", equivariant=True),
    Case("fsr", {"rho": 0.0}, equivariant=True),
    Case("fsr", {"max_focus_share": 0.25}, equivariant=True),
    Case("fsr", {"max_focus_share": 0.25, "norm_scope": "group", "kappa": 2.0}, equivariant=True),
    # Not equivariant: two tokens that cover only each other gain the same, and then the index
    # decides.
    Case("fsr", SERVED_DEFAULTS["fsr"]),
    Case("fsr", {**SERVED_DEFAULTS["fsr"], "rho": 0.1}),  # so that there is a focus
    Case("fsr", {"max_focus_share": 0.25, "scan": "coverage"}),
    Case("fsr", {"rho": 0.3, "focus_rule": "whole", "refine": "soft"}),
    Case("fsr", {"rho": 0.0, "refine": "off"}, equivariant=True),
    Case("cdpruner"),  # the features of make_tokens have rank 6: past 6 picks rounding decides
    Case("cdpruner", {"weighting": "exp", "norm_scope": "row"}),
    Case("divprune"),  # two tokens nearest to each other tie for the first pick
    Case("holov"),
    Case("holov", {"rule": "paper", "crops": 4}),
    Case("holov", {"crops": 0, "tau": 2.0}),
    Case("scope", equivariant=True),
    Case("scope", {"combine": "sum", "alpha": 0.5}),  # two that cover only each other can tie
    Case("zspaprune", equivariant=True),
    Case("zspaprune", {"core_share": 0.0}, equivariant=True),
    Case("codebook", equivariant=True),
    Case("hiprune"),
    Case("hiprune", {"alpha": 1.0, "edges": "grid"}),
    Case("vscan"),
    Case("vscan", {"window": 2}),
    Case("vscan", {"window": 3, "merge": False}),
    Case("vispruner", equivariant=True),
    Case("vispruner", {"ratio": 0.2, "step": 3}, equivariant=True),
    Case("visionzip", plain=False),  # the [CLS] row
    Case("visionzip", {"contextual_share": 0.5}, plain=False),
    Case("prumerge", plain=False),  # every centre takes in its neighbours
    Case("prumerge", {"variant": "base", "neighbours": 3}, plain=False),
    Case("vflowopt"),
    Case("vflowopt", {"threshold": 1.2, "cell": 2.3}),
    Case("visiondrop", plain=False),
    Case("quota"),
    Case("quota", {"power": 2.0}),
    Case("fastv", equivariant=True),
    Case("sparsevlm", equivariant=True),
    Case("dart", equivariant=True),
    Case("dart", {"image_pivots": 2, "text_pivots": 1}, equivariant=True),
    Case("ivc"),
    Case("ivc", {"positions": "grid", "position_share": 0.3, "seed_share": 0.2}),
    Case("fastervlm", equivariant=True),
    Case("relevance", equivariant=True),
    Case("truncate"),
    Case("random"),
    Case("uniform"),
    Case("avgpool", plain=False),
]
_NAMED = {case.name for case in _LISTED}
CASES = _LISTED + [Case(name) for name in list_methods() if name not in _NAMED]

# Options that change nothing beside the other defaults: what else must be set for them to matter.
OPTION_NEEDS: dict[str, dict[str, dict[str, Any]]] = {
    "fsr": {
        "kappa": {"rho": 0.5},
        "scan": {"rho": 0.5},
        "focus_rule": {"max_focus_share": 0.25},
        "coverage_mix": {"rho": 0.5, "scan": "coverage"},
        "coverage_gamma": {"rho": 0.5, "scan": "coverage"},
        "temperature": {"rho": 0.5, "refine": "soft"},
        "refine": {"rho": 0.5},
    },
    "cdpruner": {"theta": {"weighting": "exp"}},
    "holov": {"rule": {"crops": 4, "gamma": 1.0}},
    "scope": {"heads": {"combine": "sum", "alpha": 0.1}},
    "hiprune": {"edges": {"alpha": 1.0}},
}


def make_tokens(
    method: Method,
    n: int,
    d: int = 6,
    batch: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> VisualTokens:
    """A random batch with every field that the method needs or uses; saliency and relevance have no
    ties.
    """
    g = torch.Generator().manual_seed(seed)
    h, _ = near_square(n)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=g)

    def distinct(*shape: int) -> torch.Tensor:
        return torch.rand(batch, *shape, generator=g).argsort(-1).add(1.0).pow(2)

    # What the first decoder layers say: a number per token, with each text token, a key, with each
    # of image and text.
    probes = {
        "sparsevlm": lambda n: normal(n, 5).softmax(1),
        "dart": lambda n: normal(n, 9),
        "ivc": lambda n: normal(n, n + 3).softmax(1),
    }
    makers = {
        "saliency": lambda: distinct(n),
        "relevance": lambda: distinct(n) - 5.0,
        "metric": lambda: normal(n, 5),
        "keys": lambda: normal(n, 4),
        "cls_row": lambda: normal(d).to(dtype),
        "shallow_saliency": lambda: distinct(n),
        "received": lambda: distinct(n),
        "shallow_received": lambda: distinct(n),
        "attention": lambda: normal(n, n).softmax(-1),
        "last_query": lambda: normal(8),
        "last_key": lambda: normal(n + 1, 8),
        "text": lambda: normal(5, d).to(dtype),
        "prototypes": lambda: normal(7, d).to(dtype),
        "grid": lambda: near_square(n),
        "frame_weights": lambda: distinct(h),  # each row of the grid is taken for a frame
        "probe": lambda: probes.get(method.name, distinct)(n),
        "group": lambda: torch.arange(batch) + 10,  # each image its own: rows are independent
    }
    wanted = dict.fromkeys((*method.needs, *method.uses))
    return VisualTokens(normal(n, d).to(dtype), **{name: makers[name]() for name in wanted})


def each_field(tokens: VisualTokens, change) -> VisualTokens:
    """The tokens with every tensor field but group changed."""
    values = {
        item.name: getattr(tokens, item.name) for item in fields(tokens) if item.name != "group"
    }
    return replace(
        tokens, **{name: change(v) for name, v in values.items() if isinstance(v, torch.Tensor)}
    )


def image(tokens: VisualTokens, b: int) -> VisualTokens:
    """Image b of a batch, unbatched."""
    return replace(each_field(tokens, lambda value: value[b]), group=None)


def permuted(tokens: VisualTokens, order: torch.Tensor) -> VisualTokens:
    """The tokens of every image in another order; the grid is lost."""
    n = tokens.features.shape[1]

    def shuffle(value: torch.Tensor) -> torch.Tensor:
        for dim in range(1, value.dim()):
            if value.shape[dim] == n:
                value = value.index_select(dim, order)
        return value

    return replace(each_field(tokens, shuffle), grid=None)
