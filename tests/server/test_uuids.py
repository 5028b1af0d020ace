"""What SECURITY.md says of uuids: vLLM takes a client's uuid for the image, whoever sent it and
whatever it is.
"""

import pytest

from .conftest import NAME

WHAT = "What is this?"


def post(server, picture, uuid=None, **fields):
    """A question about a picture that the client calls `uuid`; without a picture, the name is all
    that is sent.
    """
    messages = server.messages(picture or "chelsea", WHAT)
    if uuid is not None:
        messages[0]["content"][0]["uuid"] = uuid
    if picture is None:
        messages[0]["content"][0]["image_url"] = None
    return server.post(
        {"model": NAME, "messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    )


def answer(*args, **fields):
    done = post(*args, **fields)
    assert done.status_code == 200, done.text
    return done.json()["choices"][0]["message"]["content"]


def check(server, *more):
    """The first image under a uuid answers for every later one, another client's and another salt's
    too.
    """
    for number, fields in enumerate(({}, *more)):
        first = answer(server, "chelsea", f"shared-{number}", cache_salt="one tenant", **fields)
        assert first == answer(server, "chelsea", **fields)
        other = answer(server, "rocket", f"shared-{number}", cache_salt="another tenant", **fields)
        assert other == first != answer(server, "rocket", **fields)
        assert answer(server, "rocket", f"own-{number}", **fields) == answer(
            server, "rocket", **fields
        )


@pytest.mark.engine
def test_clients_that_send_the_same_uuid_share_the_first_ones_image(main):
    check(main, {"fsr_budget": 64})
    # Another budget is another identity, but the plugin's own caches know the image by the same
    # uuid.
    assert answer(main, "rocket", "shared-1", fsr_budget=65) == answer(
        main, "chelsea", fsr_budget=65
    )


@pytest.mark.engine
def test_a_uuid_alone_stands_for_an_image_with_that_plan(main):
    sent = answer(main, "chelsea", "alone", fsr_budget=48)
    assert answer(main, None, "alone", fsr_budget=48) == sent
    for fields in ({"fsr_budget": 49}, {"fsr_budget": 48, "fsr_question": "Who?"}, {}):
        refused = post(main, None, "alone", **fields)
        assert refused.status_code == 400
        assert "not provided" in refused.text
    assert answer(main, "chelsea", "alone", fsr_budget=49)
