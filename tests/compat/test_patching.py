"""The one way to replace something of vLLM's, tried out on a module of its own."""

import asyncio
import gc
import inspect
import sys
import weakref
from types import ModuleType

import pytest

from fsr_vllm.compat.patching import Entry, Moved, Patch, reverted, shadowed


class Base:
    def inherited(self):
        return "inherited"


class Thing(Base):
    """Stands for a class of vLLM."""

    def method(self, first, second=2):
        return ["method", first, second]

    @classmethod
    def of_class(cls, first):
        return ["of_class", cls, first]

    @staticmethod
    def static(first):
        return ["static", first]

    async def later(self, first):
        return ["later", first]


STOCK = dict(vars(Thing))


@pytest.fixture(autouse=True)
def module(monkeypatch):
    made = ModuleType("their_module")
    made.Thing, made.function = Thing, lambda *, named: ["function", named]
    monkeypatch.setitem(sys.modules, "their_module", made)
    with reverted():
        yield made
    assert vars(Thing)["method"] is STOCK["method"]  # nothing is left behind


def patch(name, signature="", **more):
    return Patch(f"their_module:{name}", "why", "until", signature=signature, **more)


def noting(stock, word="seen"):
    def made(*args, **kwargs):
        return [word, *stock(*args, **kwargs)]

    return made


async def _awaited(stock, args):
    return ["seen", *await stock(*args)]


def test_methods_of_every_kind():
    for name, signature in (
        ("method", "(self, first)"),
        ("of_class", "(cls, first)"),
        ("static", "(first)"),
    ):
        assert patch(f"Thing.{name}", signature).apply(noting)
    assert Thing().method(1, second=3) == ["seen", "method", 1, 3]
    assert Thing.of_class(1) == ["seen", "of_class", Thing, 1]
    assert Thing.static(1) == ["seen", "static", 1]
    assert list(inspect.signature(Thing.method).parameters) == ["self", "first", "second"]


def test_functions_of_modules_and_coroutines(module):
    patch("function", "(*, named)").apply(noting)
    assert module.function(named=1) == ["seen", "function", 1]
    patch("Thing.later", "async (self, first)").apply(
        lambda stock: lambda *args: _awaited(stock, args)
    )
    assert inspect.iscoroutinefunction(Thing.later)
    assert asyncio.run(Thing().later(1)) == ["seen", "later", 1]


def test_once_and_the_last_counts():
    entry = patch("Thing.method")
    entry.apply(noting)
    standing = Thing.method
    with reverted():
        for word in ("second", "third"):
            entry.apply(lambda stock, word=word: noting(stock, word))
            assert Thing.method is standing
        assert Thing().method(1) == ["third", "method", 1, 2]
    assert Thing().method(1) == ["seen", "method", 1, 2]


def test_another_owner_and_objects():
    class Other:
        def method(self, first):
            return ["other", first]

    entry, one = patch("Thing.method", "(self, first)"), Other()
    with reverted():
        assert entry.apply(noting, owner=Other)
        assert entry.apply(lambda stock: noting(stock, "object"), owner=one)
        assert one.method(1) == ["object", "seen", "other", 1]
        assert Other().method(1) == ["seen", "other", 1]
        assert Thing().method(1) == ["method", 1, 2]
    assert one.method(1) == ["other", 1]
    assert "method" not in vars(one)


def test_an_object_with_a_patch_of_its_own_is_not_kept_alive():
    class Other(Thing):
        pass

    one = Other()
    assert patch("Thing.method", "(self, first)").apply(noting, owner=one)
    assert one.method(1)[0] == "seen"
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("name", "signature", "words"),
    [
        ("method", "(self, second)", "is (self, first, second), expected was (self, second)"),
        ("method", "(self, *, third)", "is (self, first, second)"),
        ("method", "async (self, first)", "expected was async"),
        ("later", "(self, first)", "is async (self, first)"),
        ("absent", "", "is not there"),
        ("inherited", "", "is not there"),
    ],
)
def test_what_is_not_as_stated_is_refused_and_left_alone(name, signature, words):
    import vllm.version

    entry = patch(f"Thing.{name}", signature, read="0.26-0.33", run="0.32")
    with pytest.raises(Moved) as error:
        entry.apply(noting)
    versions = ("read in 0.26-0.33, run in 0.32", vllm.version.__version__)
    for part in (f"Thing.{name}", words, *versions):
        assert part in str(error.value)
    assert Thing().method(1) == ["method", 1, 2]


def test_what_some_releases_lack():
    for target in ("their_module:Thing.absent", "no_such_module:Thing.method", "their_module:No.a"):
        assert not Patch(target, "why", "until", missing="until 0.30").apply(noting)
    assert Entry("no_such_module:Thing.method", "why", "until").find() is None


def test_reverted_puts_back_only_what_came_in_it():
    patch("Thing.method").apply(noting)
    with reverted():
        patch("Thing.static").apply(noting)
        assert Thing.static(1) == ["seen", "static", 1]
    assert Thing.static(1) == ["static", 1]
    assert Thing().method(1) == ["seen", "method", 1, 2]


def test_a_method_is_shadowed_for_the_length_of_a_call():
    one = Thing()

    def fails():
        with shadowed(one, "inherited", lambda: "shadow"):
            assert one.inherited() == "shadow"
            with shadowed(one, "inherited", lambda: "deeper"):
                assert one.inherited() == "deeper"
            assert one.inherited() == "shadow"
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert one.inherited() == "inherited"
    assert not vars(one)
