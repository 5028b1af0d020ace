"""From fields to plans: identities, what is derived, and plans that go with a part of the items."""

import pytest

from fsr_vllm import adaptive
from fsr_vllm.engine.planned import FrontCounts, PlannedItems, Plans
from fsr_vllm.engine.planning import Planner, completed, identity, identity_salt
from fsr_vllm.engine.wire import image_key
from fsr_vllm.params import (
    Derived,
    FieldError,
    FsrRequest,
    ImagePlan,
    Report,
    RequestFields,
    ServerSettings,
)
from tests.engine.unit.front import Front, picture, processor

PLAN = ImagePlan(24, 6, "fsr", "{}", "What?")


def salt(codebook="", **settings):
    return identity_salt(ServerSettings.parse(settings), codebook)


def test_an_unpruned_image_keeps_its_identity():
    assert identity("base", ImagePlan(24, 24), salt()) == "base"


def test_whatever_changes_the_kept_tokens_changes_the_identity():
    found = {
        identity("base", PLAN, salt()),
        identity("other", PLAN, salt()),
        identity("base", ImagePlan(24, 7, "fsr", "{}", "What?"), salt()),
        identity("base", ImagePlan(25, 6, "fsr", "{}", "What?"), salt()),
        identity("base", ImagePlan(24, 6, "dart", "{}", "What?"), salt()),
        identity("base", ImagePlan(24, 6, "fsr", '{"rho":0.5}', "What?"), salt()),
        identity("base", ImagePlan(24, 6, "fsr", "{}", "Who?"), salt()),
        identity("base", PLAN, salt(text_encoder="llm")),
        identity("base", PLAN, salt(text_encoder="none")),
        identity("base", PLAN, salt(relevance_sign=1)),
        identity("base", PLAN, salt(relevance_sign=-1)),
        identity("base", PLAN, salt("0" * 64)),
        identity("base", PLAN, salt("1" * 64)),
    }
    assert len(found) == 13
    assert all(name.startswith(("fsr:24:", "fsr:25:")) for name in found)
    assert identity("base", PLAN, salt()) == identity("base", PLAN, salt(max_budget=9))


def test_a_new_version_of_the_selection_changes_the_identity(monkeypatch):
    before = salt()
    monkeypatch.setattr("fsr_vllm.engine.planning.SELECTION_VERSION", 10_000)
    assert salt() != before


def test_what_a_planner_salts_with_is_its_servers(tmp_path, monkeypatch):
    def planner(model, **settings):
        found = processor({}).info
        found.ctx.model_config.model = str(model)
        return Planner(ServerSettings.parse(settings), Front(), found)

    plain = planner(tmp_path / "none")
    assert plain.signals == Front.signals | {"relevance"} and plain.salt == salt()
    assert planner(tmp_path, text_encoder="none").signals == Front.signals
    assert planner(tmp_path, text_encoder="llm").salt == salt(text_encoder="llm")
    book = tmp_path / "fsr" / "prototypes.safetensors"
    book.parent.mkdir()
    book.write_bytes(b"one")
    one = planner(tmp_path)
    book.write_bytes(b"two")
    assert one.signals == plain.signals | {"prototypes"}
    assert len({plain.salt, one.salt, planner(tmp_path).salt}) == 3


def fields(**values):
    return RequestFields.parse(values, ServerSettings())


def test_what_the_client_says_comes_first():
    settings = ServerSettings.parse({"budget": 5, "max_budget": 20})
    derived = Derived(("a", "b"), (9, None))
    given = fields(fsr_budget=[3, 4], fsr_question="Q?")
    assert completed(settings, given, derived, [24, 15]) == (given, None)
    found, by_load = completed(settings, fields(), derived, [24, 15])
    assert found.fsr_budget == [9, 5] and found.fsr_question == ["a", "b"] and by_load is None
    assert completed(settings, fields(fsr_question=""), derived, [24, 15])[0].fsr_question == ""


@pytest.mark.parametrize(
    ("settings", "derived", "expected"),
    [
        ({"budget": 0.5}, (), [12, 8]),
        ({"budget": 0.01}, (), [1, 1]),
        ({"budget": "off"}, (), [24, 15]),
        ({}, (), [24, 15]),
        ({"budget": 20}, (), [20, 15]),
        ({"max_budget": 10}, (), [10, 10]),
        ({"max_budget": 10}, ("off", 0.9), [10, 10]),
        ({"min_budget": 6}, (0.1, 2), [6, 6]),
        ({"budget": 3}, (None, "off"), [3, 15]),
    ],
)
def test_what_nobody_asked_for_is_kept_to_the_servers_range(settings, derived, expected):
    settings = ServerSettings.parse(settings)
    found, _ = completed(settings, fields(), Derived((), derived), [24, 15])
    assert found.fsr_budget == expected


def test_what_is_derived_of_another_number_of_images_holds_for_none():
    settings = ServerSettings.parse({"budget": 5})
    found, _ = completed(settings, fields(), Derived(("a",), (2,)), [24, 15])
    assert found.fsr_budget == [5, 5] and found.fsr_question is None


def test_a_default_that_follows_the_load_is_told_where_it_was_used(monkeypatch):
    monkeypatch.setattr(adaptive, "default_budget", lambda between: between and 8)
    settings = ServerSettings.parse({"adaptive": "4:12"})
    for derived, budgets, by_load in (
        ((), [8, 8], 8),
        ((3, None), [3, 8], 8),
        ((3, 2), [3, 2], None),
    ):
        found = completed(settings, fields(), Derived((), derived), [24, 15])
        assert (found[0].fsr_budget, found[1]) == (budgets, by_load)
    assert completed(settings, fields(fsr_budget=2), Derived(), [24, 15])[1] is None
    assert completed(settings, fields(), Derived(), []) == (fields(), None)


def test_each_image_gets_its_own_plan():
    info = processor({}).info
    planner = Planner(ServerSettings.parse({"method": "fsr"}), Front(), info)
    images = info.parse_mm_data({"image": [picture(70, 30), picture(20, 50)]})["image"]
    request = FsrRequest(fields(fsr_budget=4, fsr_question=[" a ", "b"]))
    plans, by_load = planner.plan(request, images, {})
    assert [(plan.total, plan.keep, plan.method, plan.question) for plan in plans] == [
        (24, 4, "fsr", "a"),
        (15, 4, "fsr", "b"),
    ]
    assert by_load is None
    assert planner.plan(request, images, {"patch": 5})[0][0].total == 6 * 15
    asked = FsrRequest(fields(fsr_budget=4), Derived(("c", "d")))
    assert [plan.question for plan in planner.plan(asked, images, {})[0]] == ["c", "d"]
    with pytest.raises(FieldError, match="1 entries for 2 image"):
        planner.plan(FsrRequest(fields(fsr_budget=[4])), images, {})


A, B, V = ImagePlan(24, 6), ImagePlan(15, 15), ImagePlan(100, 10)
PLANS = Plans(
    {"image": [A, B], "video": [V]},
    {"image": [b"a", b"b"], "video": [None]},
    dummy=True,
    salt="s",
    by_load=3,
)


def test_plans_of_some_items():
    second = PLANS.at({"image": [1], "video": [], "audio": [0]})
    assert second == Plans({"image": [B]}, {"image": [b"b"]}, dummy=True, salt="s", by_load=3)
    assert PLANS.at({"video": [0], "image": [1, 0]}).plans == {"image": [B, A], "video": [V]}
    assert PLANS.at({}).plans == {}
    assert PLANS.report() == Report(31, 139, 3)


def test_items_keep_their_plans_when_vllm_selects_modalities():
    found = processor({}).info.parse_mm_data({"image": [picture(70, 30), picture(20, 50)]})
    items = PlannedItems({**found, "video": found["image"]}, PLANS)
    images = items.select({"image"})
    assert list(images) == ["image"] and images["image"] is found["image"]
    assert images.fsr == PLANS.at({"image": [0, 1]}) and items.fsr is PLANS
    assert items.select({"audio"} & items.keys()).fsr.plans == {}


def test_counts_start_at_zero_and_add_up():
    counts = FrontCounts()
    assert set(counts.all()) == set(FrontCounts.NAMES) and not any(counts.all().values())
    for _ in range(2):
        counts.add_plans(PLANS)
    counts.add(preprocessed_images=5)
    assert counts.all() == {
        "images": 6,
        "pruned_images": 4,
        "visual_tokens_kept": 62,
        "visual_tokens_total": 278,
        "preprocessed_images": 5,
    }


class Sized(Front):
    """Of an image that is named alone, nothing is known."""

    def total(self, info, images, index, options):
        return None if images.get(index) is None else super().total(info, images, index, options)


def test_an_image_that_is_named_alone_has_the_size_it_had():
    info = processor({}).info
    planner = Planner(ServerSettings(), Sized(), info)
    both = info.parse_mm_data({"image": [picture(70, 30), picture(20, 50)]})["image"]
    alone = info.parse_mm_data({"image": [None, picture(20, 50)]})["image"]
    request = FsrRequest(fields(fsr_budget=4))
    with pytest.raises(FieldError, match="'a': this server does not know the image") as error:
        planner.plan(request, alone, {}, ["a", "b"])
    assert error.value.field == "uuid"
    sent, _ = planner.plan(request, both, {}, ["a", None])
    assert planner.plan(request, alone, {}, ["a", None])[0] == sent
    for uuids, options in ((["b", None], {}), (["a", None], {"patch": 5}), (None, {})):
        with pytest.raises(FieldError, match="uuid"):
            planner.plan(request, alone, options, uuids)
    # The same name for another picture: what was sent last counts.
    planner.plan(request, info.parse_mm_data({"image": [picture(50, 50)]})["image"], {}, ["a"])
    assert planner.plan(request, alone, {}, ["a", None])[0][0].total == 5 * 6


def test_what_is_remembered_of_a_name_does_not_grow_with_it():
    info = processor({}).info
    planner = Planner(ServerSettings(), Sized(), info)
    image = info.parse_mm_data({"image": [picture(70, 30)]})["image"]
    request = FsrRequest(fields(fsr_budget=4))
    for options, uuid in (({}, "a" * 10_000), ({"junk": "x" * 10_000}, "a"), ({}, "\ud800")):
        planner.plan(request, image, options, [uuid])
    assert [len(key) for key in planner._known] == [len(image_key("a"))] * 3


def test_a_total_is_divided_by_the_images_own_sizes():
    info = processor({}).info
    planner = Planner(ServerSettings(), Front(), info)
    images = info.parse_mm_data({"image": [picture(70, 30), picture(20, 50)]})["image"]
    plans, _ = planner.plan(FsrRequest(fields(fsr_budget={"total": 13})), images, {})
    assert [(plan.total, plan.keep) for plan in plans] == [(24, 8), (15, 5)]
    plans, _ = planner.plan(FsrRequest(fields(fsr_budget={"total": 39})), images, {})
    assert not any(plan.pruned for plan in plans)
    with pytest.raises(FieldError, match="fewer than the 2 images"):
        planner.plan(FsrRequest(fields(fsr_budget={"total": 1})), images, {})


def test_tiles_are_part_of_a_plan_where_they_are_joint():
    info = processor({}).info
    planner = Planner(ServerSettings(), Front(), info)
    images = info.parse_mm_data({"image": [picture(70, 30)]})["image"]

    def planned(**options):
        asked = FsrRequest(fields(fsr_budget=4, fsr_method="fastervlm", fsr_options=options))
        return planner.plan(asked, images, {})[0][0]

    plain, split, joint = planned(), planned(tiles="split"), planned(tiles="joint")
    assert plain == split and joint.tiles == "joint"
    assert b"tiles" not in plain.encode() and b'"tiles":"joint"' in joint.encode()
    assert ImagePlan.decode(joint.encode()) == joint and ImagePlan.decode(plain.encode()) == plain
    assert identity("base", plain, salt()) != identity("base", joint, salt())
    with pytest.raises(FieldError, match="tiles must be") as error:
        fields(fsr_budget=4, fsr_options={"tiles": "many"})
    assert error.value.field == "fsr_options"
    for method in ("vflowopt", "prumerge"):
        asked = FsrRequest(fields(fsr_budget=4, fsr_method=method, fsr_options={"tiles": "joint"}))
        planner.signals |= {"attention", "last_query", "last_key"}
        with pytest.raises(FieldError, match="which every tile has for itself"):
            planner.plan(asked, images, {})
