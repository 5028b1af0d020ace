"""A user's own worker extension beside ours: vLLM mixes one class into its workers, so the two
become one.

The combined class is named, not stored: workers, on other machines too, get a dotted name and look
it up here.
"""

from __future__ import annotations

import importlib

OURS = f"{__name__}.FsrWorkerExtension"
COMBINED = f"{__name__}.With_"


class FsrWorkerExtension:
    """Mixed into vLLM's worker class; names are prefixed because they share its namespace."""

    def fsr_stats(self) -> dict[str, float]:
        """Counts and seconds since the start: images, kept rows, FSR's stages, tower and selection.

        `tower_images` went through the vision tower; feature_* tell of the cache that spares it and
        are absent when it is off. Empty where the model does not prune.
        """
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        pruner = getattr(model, "fsr", None)
        return {} if pruner is None else pruner.stats()


def with_ours(given: str) -> str:
    """The dotted name of a worker extension with ours in it; safe to repeat."""
    if given in ("", OURS):
        return OURS
    return given if given.startswith(COMBINED) else COMBINED + given.encode().hex()


def __getattr__(name: str) -> type:
    """`With_<hex of a dotted name>`: that class with ours, unless it inherits ours already."""
    marker = COMBINED.rpartition(".")[2]
    if not name.startswith(marker):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    dotted = bytes.fromhex(name.removeprefix(marker)).decode()
    module, _, attribute = dotted.rpartition(".")
    if not module:
        raise ValueError(
            "--worker-extension-cls must be a dotted name such as package.module.Class; "
            f"got {dotted!r}"
        )
    theirs = getattr(importlib.import_module(module), attribute)
    if not issubclass(theirs, FsrWorkerExtension):
        theirs = type(
            theirs.__name__,
            (theirs, FsrWorkerExtension),
            {"__module__": __name__, "__qualname__": name},
        )
    globals()[name] = theirs  # vLLM compares it with the worker's bases: the same object every time
    return theirs
