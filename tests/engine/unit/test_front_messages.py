"""Questions and details of images in chat messages: counts, order, and an unchanging past."""

import copy
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fsr_vllm.engine.messages import count_images, image_details, image_questions, materialise

URL = {"url": "data:image/png;base64,AAAA"}
IMAGE = {"type": "image_url", "image_url": URL}

IMAGES = [
    IMAGE,
    {"type": "input_image", "image_url": "http://host/x.png"},
    {"type": "image_pil", "image_pil": "pixels"},
    {"type": "image_embeds", "image_embeds": None, "uuid": "u"},
    {"type": "image"},
    {"image_url": "http://host/x.png"},
    {"image_url": URL, "uuid": "u"},
    {"image_pil": None, "uuid": "u"},
    {"image": "pixels"},
]
ODDITIES = [
    None,
    3,
    [],
    {},
    {"type": "audio_url"},
    {"type": 7},
    {"type": []},
    {"type": "text", "text": None},
]

images = st.sampled_from(IMAGES)
words = st.sampled_from(["what", " is ", "this?", "", "\n", "a longer question, please"])
texts = st.one_of(
    words,
    st.builds(
        lambda kind, text: {"type": kind, "text": text},
        st.sampled_from(["text", "input_text"]),
        words,
    ),
)
contents = st.one_of(
    st.none(), words, st.lists(st.one_of(images, texts, st.sampled_from(ODDITIES)), max_size=5)
)


def messages_of(*roles):
    return st.fixed_dictionaries({"role": st.sampled_from(roles), "content": contents})


conversations = st.lists(
    messages_of("system", "user", "assistant", "tool", "developer"), max_size=8
)


def count(messages):
    return sum(
        part in IMAGES for m in messages if isinstance(m["content"], list) for part in m["content"]
    )


@settings(deadline=None)
@given(conversations)
def test_one_question_and_one_detail_per_image(messages):
    before = copy.deepcopy(messages)
    assert (
        len(image_questions(messages))
        == len(image_details(messages))
        == count_images(messages)
        == count(messages)
    )
    assert messages == before


@settings(deadline=None)
@given(conversations, messages_of("assistant"), conversations)
def test_later_turns_never_change_earlier_questions(first, answer, later):
    questions = image_questions(first)
    assert image_questions([*first, answer, *later])[: len(questions)] == questions


@settings(deadline=None)
@given(st.lists(st.text("abc ?", max_size=5), min_size=1, max_size=6))
def test_order_is_prompt_order(asked):
    """A conversation of single-image turns gives each image its own turn's text, or the last one
    before it.
    """
    messages, expected = [], [""]
    for text in asked:
        messages.append({"role": "user", "content": [IMAGE, {"type": "text", "text": text}]})
        messages.append({"role": "assistant", "content": "an answer"})
        expected.append(text.strip() or expected[-1])
    assert image_questions(messages) == expected[1:]


@settings(deadline=None)
@given(conversations, st.integers(1, 40))
def test_the_end_of_a_long_question_is_read(messages, longest):
    whole = image_questions(messages)
    cut = image_questions(messages, longest)
    assert [question.strip() for question in cut] == [
        question[-longest:].strip() for question in whole
    ]
    assert all(len(question) <= longest for question in cut)


def user(*parts):
    return {"role": "user", "content": list(parts)}


ASSISTANT = {"role": "assistant", "content": "Let me see."}


@pytest.mark.parametrize(
    ("messages", "questions"),
    [
        ([], []),
        ([{"role": "user", "content": "hello"}], []),
        ([user(IMAGE)], [""]),
        (
            [user("Look. ", IMAGE, {"type": "text", "text": "  What is it?\n"})],
            ["Look.\nWhat is it?"],
        ),
        ([user(IMAGE, IMAGE, "Compare.")], ["Compare.", "Compare."]),
        # The question may come in a message of its own, also before the next image.
        ([user(IMAGE), user("First?"), user(IMAGE, "Second?")], ["First?\nSecond?", "Second?"]),
        # What was said before the image, and what is said after the answer, is no question of it.
        ([user("Hi."), {"role": "assistant", "content": "Hello."}, user(IMAGE, "Q?")], ["Q?"]),
        ([user("Earlier."), user(IMAGE, "Q?")], ["Q?"]),
        ([user(IMAGE), {"role": "assistant", "content": "A cat."}, user("Colour?")], [""]),
        (
            [user(IMAGE, "Q?"), {"role": "assistant", "content": None}, user(IMAGE, "R?")],
            ["Q?", "R?"],
        ),
        # Images outside user messages take the user's text that follows, never their own message's.
        ([{"role": "system", "content": ["Be brief.", IMAGE]}, user("Q?")], ["Q?"]),
        (
            [
                {"role": "tool", "content": [IMAGE, "done"]},
                {"role": "assistant", "content": "ok"},
                user("Q?"),
            ],
            [""],
        ),
        ([{"role": "assistant", "content": [IMAGE, "Here it is."]}, user("Q?")], ["Q?"]),
        # Asked before the image came: as a message of its own, or by a call of a tool that answers
        # with an image.
        ([user("Q?"), user(IMAGE)], ["Q?"]),
        ([user("First."), user("Q?"), user(IMAGE, " ")], ["Q?"]),
        ([user("Q?"), ASSISTANT, {"role": "tool", "content": [IMAGE, "done"]}], ["Q?"]),
        ([user("Q?"), ASSISTANT, {"role": "tool", "content": [IMAGE]}, user("R?")], ["R?"]),
        (
            [user("Q?"), ASSISTANT, {"role": "tool", "content": [IMAGE]}, ASSISTANT, user("R?")],
            ["Q?"],
        ),
        (
            [user("Q?"), ASSISTANT, user(IMAGE), ASSISTANT, user("R?"), ASSISTANT, user(IMAGE)],
            ["Q?", "R?"],
        ),
        ([user("Q?", IMAGE), ASSISTANT, user(IMAGE), user(IMAGE)], ["Q?", "Q?", "Q?"]),
        ([{"role": "system", "content": "Be brief."}, user(IMAGE)], [""]),
        # Answers quoted by the user count as text; reasoning and refusals are the model's.
        ([user(IMAGE, {"type": "output_text", "text": "quoted"})], ["quoted"]),
        (
            [
                user(
                    IMAGE,
                    {"type": "thinking", "thinking": "hm"},
                    {"type": "refusal", "refusal": "no"},
                )
            ],
            [""],
        ),
        # The type wins over other keys, except where a uuid makes vLLM look at the keys.
        ([user({"type": "text", "text": "t", "image_url": URL})], []),
        ([user({"type": "image", "text": "not a question"}, "Q?")], ["Q?"]),
        (["not a message", user(IMAGE, "Q?"), None], ["Q?"]),
        ([{"role": "user"}, {"content": [IMAGE]}], [""]),
    ],
)
def test_examples(messages, questions):
    assert image_questions(messages) == questions


def test_counting_stops_beyond_what_is_asked_for():
    messages = [user(IMAGE, IMAGE), user(*[IMAGE] * 3), {"role": "user", "content": iter([IMAGE])}]
    assert count_images(messages, most=4) == 5
    with pytest.raises(TypeError, match="materialise"):
        count_images(messages, most=5)


@pytest.mark.parametrize("before", [False, True], ids=["after the images", "before the images"])
def test_work_is_bounded_by_the_text_whatever_the_number_of_images(before):
    """2,500 images and texts of 1 MB: one string for all of them, and next to nothing beside it."""
    texts = [user(f"{letter} " * 250_000) for letter in "ab"]
    pictures = [user(*[IMAGE] * 50) for _ in range(50)]
    messages = [*texts, *pictures] if before else [*pictures, *texts]
    tracemalloc.start()
    questions = image_questions(messages, 4096)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(questions) == 2500 and len({id(question) for question in questions}) == 1
    assert questions[0] == ("b " * 250_000).strip()[-4096:]
    assert peak < 1_500_000  # one of the two texts, stripped, and a list of 2,500


def test_each_image_followed_by_text_of_its_own_costs_no_more_than_its_question():
    messages = [user(IMAGE, f"{number:08d}" * 64) for number in range(900)]
    tracemalloc.start()
    questions = image_questions(messages, 4096)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [len(question) for question in questions[:890]] == [4096] * 890
    assert len({id(question) for question in questions[:890]}) == 1 and peak < 1_000_000


def test_details():
    messages = [
        user(
            {"type": "image_url", "image_url": URL | {"detail": "low"}},
            IMAGE,
            {"type": "image_url", "image_url": "u"},
        ),
        user(
            {"type": "input_image", "image_url": "u", "detail": "high"},
            {"image_url": URL | {"detail": 3}},
        ),
    ]
    assert image_details(messages) == ["low", None, None, "high", None]


def test_one_shot_content_is_refused_until_materialised():
    messages = [
        {"role": "user", "content": iter([IMAGE, "Q?"])},
        {"role": "user", "content": "more"},
        "odd",
    ]
    for function in (image_questions, image_details):
        with pytest.raises(TypeError, match="materialise"):
            function(messages)
    materialise(messages)
    assert messages[0]["content"] == [IMAGE, "Q?"] and messages[1]["content"] == "more"
    assert image_questions(messages) == image_questions(messages) == ["Q?\nmore"]


def test_materialise_leaves_lists_and_odd_content_alone():
    parts = [IMAGE]
    messages = [
        {"role": "user", "content": c}
        for c in (parts, None, b"x", {"type": "text"}, 5, (IMAGE, "tuple"))
    ]
    materialise(messages)
    assert messages[0]["content"] is parts
    assert [m["content"] for m in messages[1:5]] == [None, b"x", {"type": "text"}, 5]
    assert messages[5]["content"] == [IMAGE, "tuple"]
    assert count_images(messages) == 2
    assert image_questions(messages) == ["tuple", "tuple"]


def test_content_that_pydantic_validates_lazily():
    """Validated requests hold one-shot iterators where the API's types say Iterable (vLLM's own
    models among them).
    """
    adapter = TypeAdapter(
        dict[str, str | Iterable[dict[str, Any]]]
    )  # kept alive: the iterator validates with it
    image = {"type": "image_url", "image_url": URL | {"detail": "low"}}
    messages = [adapter.validate_python(user(image, {"type": "text", "text": "Q?"}))]
    assert not isinstance(messages[0]["content"], list)
    materialise(messages)
    assert image_questions(messages) == ["Q?"] and image_details(messages) == ["low"]
