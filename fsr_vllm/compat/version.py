"""Which vLLM this is: outside the supported window the plugin refuses, beside a budget of vLLM's
own it steps aside. FSR_ALLOW_ANY_VLLM=1 lifts both.
"""

from __future__ import annotations

import functools
import os
import re
from importlib import metadata

from fsr_vllm.compat.patching import Entry

ALLOW = "FSR_ALLOW_ANY_VLLM"
DISTRIBUTION = "fsr-vllm"
CHAT_REQUEST = Entry(
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest",
    "The fields of a chat request are where every OpenAI-style feature arrives. Two features that "
    "shorten the same placeholders would disagree, so the plugin steps aside for one of vLLM's "
    "own. No release up to 0.33 has one.",
    "such a release is out: with the plugin",
)
# How a request field would be called that sets the number of an image's tokens, or the share that
# is kept.
_MEDIA = r"(image|visual|vision|mm|multimodal)"
_NATIVE = re.compile(
    rf"(max|num)_{_MEDIA}_tokens(_per_image)?"
    rf"|{_MEDIA}_(tokens?_)?(budget|limit|ratio|(keep|retention|prun(e|ing))_(rate|ratio))"
)


def allowed_anyway() -> bool:
    """Whether the user takes the risk of another vLLM."""
    return os.environ.get(ALLOW, "0").lower() in ("1", "true")


@functools.cache
def vllm_version() -> str:
    """The installed vLLM's own word."""
    from vllm.version import __version__

    return __version__


@functools.cache
def window() -> str | None:
    """The releases of vLLM that this package requires; None where it is not installed."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return None
    return next((str(each.specifier) for each in required if each.name == "vllm"), None)


def outside_window() -> str | None:
    """Why the plugin must not start beside this vLLM, or None; pip's --no-deps evades it."""
    supported = window()
    if supported is None or allowed_anyway():
        return None
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        # Builds between releases count as what they lead to, 0.33.1.dev5 as 0.33.1.
        if SpecifierSet(supported).contains(Version(vllm_version()), prereleases=True):
            return None
    except InvalidVersion:  # "dev": vLLM's own word where it does not know
        pass
    return (
        f"plugin fsr supports vllm {supported}, this is {vllm_version()}; install a release of "
        f"that range, look for a newer {DISTRIBUTION}, or set {ALLOW}=1 to try it all the same"
    )


def native_field() -> str | None:
    """The request field that sets an image's tokens in vLLM itself; None while it has none."""
    if allowed_anyway():
        return None
    fields = getattr(CHAT_REQUEST.find(), "model_fields", ())
    return next((name for name in fields if _NATIVE.fullmatch(name)), None)


def steps_aside() -> str | None:
    """Why requests cannot have fields of ours beside a budget of vLLM's own; None without one."""
    native = native_field()
    if native is None:
        return None
    return (
        f"plugin fsr steps aside, since this vLLM has a budget of its own: use {native}, or start "
        f"with {ALLOW}=1"
    )
