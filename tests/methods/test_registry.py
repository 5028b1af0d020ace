"""The registry, the public entry points, and the options of all methods."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
import torch

import fsr_vllm
from fsr_vllm.methods import get_method, list_methods, prune
from fsr_vllm.methods.base import Method, ScoreMethod, VisualTokens, option
from fsr_vllm.methods.options import allowed

from .default_methods import CASES, OPTION_NEEDS, make_tokens

FIELDS = [item.name for item in fields(VisualTokens)]
OPTIONS = [(name, item) for name in list_methods() for item in fields(get_method(name))]
each_option = pytest.mark.parametrize(
    "name, item", OPTIONS, ids=[f"{name}-{item.name}" for name, item in OPTIONS]
)


@pytest.mark.parametrize("name", list_methods())
def test_what_is_said_of_a_method(name):
    info, method = list_methods()[name], get_method(name)
    assert info.name == name == method.name
    assert set(info.needs) | set(info.uses) <= set(FIELDS) - {"features"}
    assert info.fidelity in ("exact", "unchecked", "stage-1", "input-probe", "control")
    assert info.summary and info.license and (info.paper or info.fidelity == "control")
    assert info.options == asdict(method) and all(info.option_docs.values())
    json.dumps(info.options)  # they go into the cache identity as JSON
    assert not set(info.options) & {
        *FIELDS,
        "method",
        "budget",
        "preset",
    }  # all are keywords of prune()
    assert info.query_aware == bool(
        {"relevance", "text", "probe", "frame_weights"} & {*info.needs, *info.uses}
    )


def test_every_method_is_tested():
    assert {case.name for case in CASES} == set(list_methods())
    assert next(iter(list_methods())) == "fsr"


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown method 'fsrr'; known are fsr, "):
        get_method("fsrr")
    with pytest.raises(ValueError, match="unknown method"):
        prune(torch.ones(4, 2), budget=2, method="nope")
    with pytest.raises(
        ValueError, match="method 'fsr' has no option 'rhoo'; allowed are alpha, beta, "
    ):
        prune(torch.ones(4, 2), saliency=torch.ones(4), budget=2, rhoo=0.5)
    with pytest.raises(ValueError, match="method 'none' has no option 'seed'; allowed are none"):
        get_method("none", seed=1)


@each_option
def test_bad_values_of_an_option_are_refused(name, item):
    low, high, choices = (item.metadata.get(key) for key in ("low", "high", "choices"))
    bad = [None, [], {"a": 1}, torch.ones(2)] + [True] * (not isinstance(item.default, bool))
    if isinstance(item.default, (int, float)):
        bad += ["1", float("nan"), float("inf"), -float("inf")]
        bad += [end + by for end, by in ((low, -1), (high, 1)) if end is not None]
        bad += [0.5] * isinstance(item.default, int)
    else:
        bad += [1, 0.5] + ["nonsense"] * bool(choices)
    for value in bad:
        with pytest.raises(ValueError, match=f"^{item.name} must be "):
            get_method(name, **{item.name: value})


@each_option
def test_the_ends_of_an_option_are_allowed(name, item):
    ends = [item.metadata.get(key) for key in ("low", "high")] + list(
        item.metadata.get("choices") or ()
    )
    for value in [end for end in ends if end is not None]:
        built = getattr(get_method(name, **{item.name: value}), item.name)
        assert built == value and type(built) is type(item.default)


def others(item):
    """Allowed values of an option other than its default."""
    if item.metadata.get("choices"):
        return [choice for choice in item.metadata["choices"] if choice != item.default]
    if isinstance(item.default, bool):
        return [not item.default]
    low, high = (item.metadata.get(key) for key in ("low", "high"))
    tries = [low, high, item.default + 1, item.default / 2, item.default * 4]
    tries = [type(item.default)(value) for value in tries if value is not None]
    return [
        x
        for x in tries
        if x != item.default and (low is None or x >= low) and (high is None or x <= high)
    ]


@each_option
def test_an_option_changes_something(name, item):
    """Each choice does, and of a number or a flag some value, each at some budget."""
    beside = OPTION_NEEDS.get(name, {}).get(item.name, {})
    values = others(item)
    changed = []
    for value in values:
        base, other = get_method(name, **beside), get_method(name, **{**beside, item.name: value})
        tokens = make_tokens(other, 36, batch=3)
        if "group" in base.uses:  # three tiles of one image
            scale = torch.tensor([1.0, 3.0, 0.2])[:, None]
            joint = {
                key: getattr(tokens, key) * scale
                for key in {"saliency", "relevance"} & {*base.needs, *base.uses}
            }
            tokens = replace(tokens, **joint, group=torch.tensor([5, 5, 5]))
        for k in (5, 14, 20):
            a, b = base.prune(tokens, k), other.prune(tokens, k)
            if not torch.equal(a.indices, b.indices) or not torch.equal(a.tokens, b.tokens):
                changed.append(value)
                break
    hint = (
        "if it matters only beside other options, name them in OPTION_NEEDS of default_methods.py"
    )
    assert changed == values if item.metadata.get("choices") else changed, hint


def test_prune_passes_every_field():
    tokens = make_tokens(get_method("fsr", space="metric"), 12)
    signals = {name: getattr(tokens, name) for name in FIELDS if getattr(tokens, name) is not None}
    direct = get_method("fsr", space="metric", rho=0.3).prune(tokens, 5)
    public = fsr_vllm.prune(**signals, budget=5, space="metric", rho=0.3)
    assert torch.equal(direct.indices, public.indices) and torch.equal(direct.tokens, public.tokens)


def test_public_names():
    assert fsr_vllm.list_methods is list_methods and not callable(fsr_vllm.methods)
    public = {
        "prune",
        "get_method",
        "list_methods",
        "VisualTokens",
        "PrunedTokens",
        "stats",
        "__version__",
    }
    assert public <= set(dir(fsr_vllm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fsr_vllm.nothing


@pytest.mark.parametrize(
    "code",
    [
        "import fsr_vllm, sys; assert 'torch' not in sys.modules",
        "import fsr_vllm; assert fsr_vllm.list_methods()['fsr'].query_aware",
        "from fsr_vllm import list_methods, prune; assert 'fsr' in list_methods()",
        "import fsr_vllm.methods.fsr, fsr_vllm; fsr_vllm.list_methods()",
        "import fsr_vllm, sys; fsr_vllm.list_methods(); assert not {'vllm', 'transformers'} & set(sys.modules)",
    ],
)
def test_imports_in_a_fresh_process(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_method_of_a_few_lines():
    from dataclasses import dataclass

    @dataclass
    class Loudest(ScoreMethod):
        """Tokens of largest norm."""

        power: float = option(1.0, low=0, doc="of the norm")

        def score(self, tokens):
            return tokens.features.norm(dim=-1).pow(self.power)

    features = torch.tensor([[1.0], [-5.0], [3.0], [-3.0]])
    assert Loudest(power=2).prune(VisualTokens(features), 2).indices.tolist() == [1, 2]
    assert Loudest(power=2).power == 2.0 and allowed(fields(Loudest)[0]) == "a finite number >= 0"
    with pytest.raises(NotImplementedError):
        Method().prune(VisualTokens(features), 2)
    with pytest.raises(NotImplementedError):
        ScoreMethod().prune(VisualTokens(features), 2)
    with pytest.raises(ValueError, match="saliency is needed"):
        VisualTokens(features).require("saliency")
