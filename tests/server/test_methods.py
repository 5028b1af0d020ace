"""Methods over HTTP: which there are, and options that a request may not ask for."""

import openai
import pytest

from fsr_vllm.methods import list_methods


def test_the_list_says_what_may_be_named(main):
    listed = {entry["id"]: entry for entry in main.get("/v1/fsr/methods")["data"]}
    assert {name: entry["servable"] for name, entry in listed.items()} == {
        name: info.servable for name, info in list_methods().items()
    }
    assert (
        listed["vispruner"]["option_bounds"] == {"step": "at least N / 72"}
        and listed["fsr"]["option_bounds"] == {}
    )


def test_an_option_below_its_bound_is_refused(main):
    asked = {"fsr_budget": 64, "fsr_method": "vispruner"}
    with pytest.raises(openai.BadRequestError) as error:
        main.ask("chelsea", "What is this?", **asked, fsr_options={"step": 1})
    assert error.value.body["param"] == "fsr_options"
    assert (
        "step must be at least 8 in a request about an image of 576 visual tokens"
        in error.value.body["message"]
    )
    assert (
        main.ask("chelsea", "What is this?", **asked, fsr_options={"step": 8})["tokens"] == "64/576"
    )


def test_corrected_methods_are_served_and_differ(main):
    """Each reads inputs of its own: attention received, the tower's rows, its last queries and
    keys.
    """
    answers = {}
    for name in ("hiprune", "scope", "holov", "prumerge", "vispruner", "fastervlm"):
        answer = main.ask("chelsea", "What is this?", fsr_budget=48, fsr_method=name)
        assert answer["tokens"] == "48/576"
        answers[name] = answer["text"]
    assert len(set(answers.values())) > 3
