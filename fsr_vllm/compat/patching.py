"""The one way in which this package replaces something of vLLM's, and the records of what it uses.

Every name that vLLM does not promise to keep has a record in the file of its surface: a `Patch`
where the name is replaced, an `Entry` where it is only read. `docs/compatibility.md` is made of
them, and `tests/compat` looks each of them up in the installed vLLM.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import ModuleType

from fsr_vllm.compat.types import Anything, Function


class Moved(RuntimeError):
    """A record does not hold for this vLLM, so that nothing is replaced."""


@dataclass(frozen=True)
class Entry:
    """One name of vLLM that this package relies on."""

    target: str  # "module:Class.attribute"
    why: str
    until: str  # what would have to change in vLLM for the entry to go
    # How it is called: leading parameters by name and place, those after * by name alone; "async"
    # before them means a coroutine function, "either" one that is none in some releases.
    signature: str = ""
    read: str = "0.26-0.33"
    run: str = "0.32"
    missing: str = ""  # which releases, or installations, of the window have it not
    link: str = ""

    @property
    def name(self) -> str:
        """The attribute alone."""
        return self.target.rpartition(":")[2].rpartition(".")[2]

    def owner(self) -> Anything:
        """The class or module that holds the attribute; None where there is none."""
        module, _, path = self.target.partition(":")
        try:
            found: Anything = importlib.import_module(module)
        except ImportError:
            return None
        for part in path.split(".")[:-1]:
            found = getattr(found, part, None)
        return found

    def find(self, owner: Anything = None) -> Anything:
        """The attribute as it is now; None where there is none."""
        return getattr(self.owner() if owner is None else owner, self.name, None)

    def mismatch(self, function: Function) -> str | None:
        """How the function's signature differs from the one stated; None if it does not."""
        if not self.signature:
            return None
        function = inspect.unwrap(getattr(function, "__func__", function))
        found = inspect.signature(function).parameters
        kind, _, parameters = self.signature.rpartition("(")
        leading, _, named = parameters.strip("()").partition("*")
        places = [name.strip() for name in leading.split(",") if name.strip()]
        names = {name.strip() for name in named.split(",") if name.strip()}
        asynchronous = inspect.iscoroutinefunction(function)
        alike = list(found)[: len(places)] == places and names <= set(found)
        if alike and kind.strip() in ("either", "async" if asynchronous else ""):
            return None
        is_now = "async " * asynchronous + f"({', '.join(found)})"
        return f"is {is_now}, expected was {self.signature}"


@dataclass
class _Applied:
    owner: Anything
    name: str
    before: Anything  # what the owner itself held; None: it had the attribute from its class
    stock: Function
    function: Function  # what is called instead


# What stands in an attribute's place keeps its entry: an object takes its own along when it goes.
_applied: weakref.WeakValueDictionary[tuple[int, str], _Applied] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Patch(Entry):
    """A name that is replaced: once, reversibly, and only where it is what the record says."""

    def apply(self, make: Callable[[Function], Function], owner: Anything = None) -> bool:
        """Call make(attribute) in its place; `owner`: another object that has the attribute.

        It is wrapped once per process, and the last `make` counts: a process may have several
        engines, one after another. Returns False where an optional name is missing. Errors: Moved.
        """
        owner = self.owner() if owner is None else owner
        done = _applied.get((id(owner), self.name))
        if done is not None:
            done.function = make(done.stock)
            return True
        held = None if owner is None else vars(owner).get(self.name)
        if owner is not None and held is None and not isinstance(owner, (type, ModuleType)):
            stock = getattr(owner, self.name, None)
        else:
            stock = held
        if stock is None:
            if self.missing:
                return False
            raise self._moved("is not there")
        kind = type(stock) if isinstance(stock, (classmethod, staticmethod)) else None
        function = stock.__func__ if kind else stock
        reason = self.mismatch(function)
        if reason:
            raise self._moved(reason)
        done = _Applied(owner, self.name, held, function, make(function))
        wrapped = _standing_for(done)
        setattr(owner, self.name, kind(wrapped) if kind else wrapped)
        _applied[id(owner), self.name] = done
        return True

    def _moved(self, reason: str) -> Moved:
        from vllm.version import __version__

        return Moved(
            f"plugin fsr does not fit vllm {__version__}: {self.target} {reason} "
            f"(read in {self.read}, run in {self.run})"
        )


def _standing_for(done: _Applied) -> Function:
    """What stands in the attribute's place from now on, under its name and signature."""
    if inspect.iscoroutinefunction(inspect.unwrap(done.stock)):

        async def call_async(*args: Anything, **kwargs: Anything) -> Anything:
            return await done.function(*args, **kwargs)

        return functools.wraps(done.stock)(call_async)

    def call(*args: Anything, **kwargs: Anything) -> Anything:
        return done.function(*args, **kwargs)

    return functools.wraps(done.stock)(call)


def undo_all() -> None:
    """Put back everything that was replaced, last first."""
    _undo_but(())


@contextlib.contextmanager
def reverted() -> Iterator[None]:
    """Put back, at the end, what was replaced meanwhile; for tests."""
    before = {key: done.function for key, done in _applied.items()}
    try:
        yield
    finally:
        _undo_but(before)
        for key, done in _applied.items():
            done.function = before[key]


def _undo_but(keep: Collection[tuple[int, str]]) -> None:
    for key in [key for key in reversed(list(_applied)) if key not in keep]:
        done = _applied.pop(key)
        if done.before is None:
            delattr(done.owner, done.name)
        else:
            setattr(done.owner, done.name, done.before)


@contextlib.contextmanager
def shadowed(owner: Anything, name: str, function: Function) -> Iterator[None]:
    """Replace a method of one object for the length of one call, whatever its class."""
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def all_entries() -> dict[str, list[Entry]]:
    """The records of every file of this package, by the file's name."""
    import pkgutil

    from fsr_vllm import compat

    found: dict[str, list[Entry]] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(compat.__path__)):
        values = vars(importlib.import_module(f"{compat.__name__}.{module}")).values()
        flat = [each for value in values for each in (value if type(value) is tuple else (value,))]
        found[module] = [each for each in flat if isinstance(each, Entry)]
    return {module: entries for module, entries in found.items() if entries}
