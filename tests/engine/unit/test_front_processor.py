"""Our processor on vLLM's own base class: placeholders, plans, identities, and what is cached."""

from types import SimpleNamespace

import pytest
import torch
from vllm.multimodal.processing import PromptReplacement, TimingContext

from fsr_vllm.compat.attributes import RESULT_KEY
from fsr_vllm.engine.embeddings import plan_embeddings
from fsr_vllm.engine.planned import planned
from fsr_vllm.engine.stats import stats
from fsr_vllm.params import FieldError, FsrRequest, ImagePlan, Report, RequestFields, ServerSettings
from tests.engine.unit.front import (
    LARGEST,
    Front,
    Stock,
    apply,
    cache,
    inputs,
    picture,
    pixels,
    placeholders,
    plans,
    processor,
    rows,
)

WIDE, TALL = (70, 30), (20, 50)  # N = 24 and 15
A, B, C = picture(*WIDE, seed=1), picture(*TALL, seed=2), picture(*WIDE, seed=3)
OFF = {"pixel_cache_bytes": 0, "feature_cache_bytes": 0}


def keeps(result):
    return [plan.keep for _, plan in plans(result)]


def test_two_images_of_different_sizes_have_each_their_own_number():
    ours = processor({})
    result = apply(ours, [A, B], fsr_budget=[0.5, 4])
    assert placeholders(result) == keeps(result) == [12, 4]
    assert [plan.total for _, plan in plans(result)] == [rows(WIDE), rows(TALL)] == [24, 15]
    assert pixels(result) == [((3, 7), {1.0}), ((5, 2), {2.0})]
    assert result[RESULT_KEY] == Report(16, 39)
    assert ours.fsr_stats() | {"pixel_bytes": 0} == {
        "images": 2,
        "pruned_images": 2,
        "visual_tokens_kept": 16,
        "visual_tokens_total": 39,
        "preprocessed_images": 2,
        "pixel_hits": 0,
        "pixel_misses": 2,
        "pixel_entries": 2,
        "pixel_bytes": 0,
    }


@pytest.mark.parametrize("budget", [None, "off", 24, 1000])
def test_an_image_that_keeps_all_its_tokens_is_stocks(budget):
    stock = apply(processor(), [A, B])
    ours = apply(processor({}), [A, B], **({} if budget is None else {"fsr_budget": budget}))
    assert ours["prompt_token_ids"] == stock["prompt_token_ids"]
    assert ours["mm_hashes"] == stock["mm_hashes"]
    assert placeholders(ours) == [24, 15] and ours[RESULT_KEY] == Report(39, 39)
    assert RESULT_KEY not in stock


def test_only_pruned_images_get_another_identity():
    ours = processor({})
    before = apply(ours, [A, B])["mm_hashes"]["image"]
    after = apply(ours, [A, B], fsr_budget=15)["mm_hashes"]["image"]
    assert after[1] == before[1] and after[0] != before[0]
    assert after[0].startswith("fsr:24:")
    assert before[0] not in after[0]


@pytest.mark.parametrize("settings", [{}, OFF], ids=["our caches", "none of ours"])
def test_plans_go_with_the_items_that_vllm_does_not_have(settings):
    """A prompt's cached image comes before the missing ones, whose plans must not move up."""
    ours = processor(settings)
    kept = cache(ours)
    apply(ours, [A], kept=kept, fsr_budget=3)
    first = apply(ours, [A, B, C], kept=kept, fsr_budget=[3, 4, 5])
    assert keeps(first) == placeholders(first) == [3, 4, 5]
    assert [plan.total for _, plan in plans(first)] == [24, 15, 24]
    assert ours.seen == [1, 2]
    again = apply(ours, [C, A, B], kept=kept, fsr_budget=[5, 3, 4])
    assert keeps(again) == placeholders(again) == [5, 3, 4]
    assert ours.seen == [1, 2]
    assert pixels(again) == [((3, 7), {3.0}), ((3, 7), {1.0}), ((5, 2), {2.0})]
    assert ours.fsr_stats()["preprocessed_images"] == 3


def test_a_cached_image_may_come_without_its_pixels():
    ours, image = processor({}), picture(*LARGEST, seed=4)
    kept = cache(ours)
    known = apply(ours, [image], ["u"], kept, fsr_budget=6)
    found = apply(ours, [None, A], ["u", None], kept, fsr_budget=[6, 2])
    assert placeholders(found) == keeps(found) == [6, 2]
    assert found["mm_hashes"]["image"][0] == known["mm_hashes"]["image"][0]
    assert found[RESULT_KEY] == Report(8, rows(LARGEST) + 24)


def test_the_processors_options_change_what_an_image_has():
    ours = processor({})
    result = apply(ours, [A], fsr_budget=0.5, patch=5)
    assert plans(result)[0][1].total == 6 * 15 and placeholders(result) == [45]


def test_pixels_are_kept_by_image_alone():
    ours = processor({})
    first = apply(ours, [A, B], fsr_budget=3)
    keys = [key for key, _ in plans(first)]
    # Another budget, order and question; an image twice; one that is new.
    result = apply(ours, [B, C, A, C], fsr_budget=[2, 3, 4, 5], fsr_question="What?")
    assert ours.seen == [2, 1]
    assert pixels(result) == [
        ((5, 2), {2.0}),
        ((3, 7), {3.0}),
        ((3, 7), {1.0}),
        ((3, 7), {3.0}),
    ]
    assert keeps(result) == placeholders(result) == [2, 3, 4, 5]
    assert [key for key, _ in plans(result)][:3:2] == keys[::-1]
    assert len(set(keys)) == 2 and None not in keys
    stats = ours.fsr_stats()
    assert stats["preprocessed_images"] == 3 and stats["pixel_entries"] == 3
    assert stats["pixel_hits"] == 2 and stats["pixel_misses"] == 3
    all_known = apply(ours, [A, B], fsr_budget=1)
    assert ours.seen == [2, 1]
    assert pixels(all_known) == [((3, 7), {1.0}), ((5, 2), {2.0})]


def test_images_of_two_sizes_under_one_name_are_two():
    """Their tiles differ in number: those of one would be taken for the other's."""
    ours = processor({})
    (small, large), size = (picture(40, 20, 1), picture(50, 20, 2)), [(2, 4), (2, 5)]
    for number, one in enumerate((small, large, small)):
        result = apply(ours, [one], ["name"], fsr_budget=3 + number)
        assert pixels(result) == [(size[number % 2], {1.0 + number % 2})]
    assert ours.seen == [1, 1]


def test_kept_pixels_do_not_hold_the_batch_they_came_with():
    ours = processor({})
    apply(ours, [A, B])
    assert ours.fsr_stats()["pixel_bytes"] == (21 + 10) * 3 * 4 + 2 * 2 * 8


def test_without_caches_of_ours_no_image_has_a_key():
    ours = processor(OFF)
    result = apply(ours, [A], fsr_budget=3)
    assert plans(result)[0][0] is None and ours.fsr_pixels is None
    assert result["mm_hashes"]["image"][0].startswith("fsr:24:")
    features_alone = apply(processor({"pixel_cache_bytes": 0}), [A], fsr_budget=3)
    assert plans(features_alone)[0][0] is not None
    assert result["mm_hashes"] == features_alone["mm_hashes"]


@pytest.mark.parametrize(("most", "tokens"), [(None, 28), (10, 10), (1000, 28)])
def test_profiling_uses_the_largest_budget_that_any_request_can_have(most, tokens):
    ours = processor({"max_budget": most, "budget": 2})
    result = ours.get_dummy_mm_inputs({"image": 2})
    assert placeholders(result) == [tokens] * 2 and len(result["prompt_token_ids"]) == 512
    assert [(key, plan.keep) for key, plan in plans(result)] == [(None, tokens)] * 2
    assert RESULT_KEY not in result
    assert set(ours.fsr_stats().values()) == {0}


def embeddings(*counts):
    return [torch.zeros(count, 5) for count in counts]


def test_embeddings_are_never_pruned():
    ours = processor({"budget": 3})
    result = apply(ours, embeddings(4, 6))
    assert placeholders(result) == [4, 6] and result[RESULT_KEY] == Report(10, 10)
    assert "fsr_plan" not in result["mm_kwargs"]["image"][0]
    stock = apply(processor(), embeddings(4, 6))
    assert result["mm_hashes"] == stock["mm_hashes"]
    assert apply(ours, embeddings(4), fsr_budget="off")[RESULT_KEY] == Report(4, 4)
    with pytest.raises(ValueError, match="cannot be pruned") as error:
        apply(ours, embeddings(4, 6), fsr_budget=["off", 2])
    assert error.value.parameter == "fsr_budget"
    with pytest.raises(ValueError, match="9 rows of an image exceed .* maximum of 8"):
        apply(processor({"max_budget": 8}), embeddings(8, 9))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fsr_budget": [1]}, "1 entries for 2 image"),
        ({"fsr_budget": [1, 2, 3]}, "3 entries for 2 image"),
        ({"fsr_question": ["a"]}, "1 entries for 2 image"),
        ({"fsr_budget": 0}, "must be an integer"),
        ({"fsr_budget": 21}, "above this server's maximum 20"),
        ({"fsr_budget": 0.9}, "fsr_budget 0.9 of 24 = 22, above this server's maximum 20"),
        ({"fsrBudget": 3}, "the field is called fsr_budget"),
        ({"fsr_bugdet": 3}, "unknown field"),
        ({"fsr_method": "relevance"}, "needs relevance, which this server does not have"),
    ],
)
def test_wrong_fields_name_themselves(fields, words):
    ours = processor({"max_budget": 20, "text_encoder": "none"})
    with pytest.raises(ValueError, match=words) as error:
        apply(ours, [A, B], **{"fsr_budget": 3, **fields})
    assert error.value.parameter == next(iter(fields))
    assert ours.fsr_stats()["images"] == 0


def test_rows_of_embeddings_that_are_not_known():
    settings = ServerSettings.parse({"max_budget": 8})
    assert plan_embeddings(RequestFields(), settings, []) == []
    assert plan_embeddings(RequestFields(), ServerSettings(), [None, 3]) == [
        ImagePlan(0, 0),
        ImagePlan(3, 3),
    ]
    with pytest.raises(FieldError, match="do not tell their rows"):
        plan_embeddings(RequestFields(), settings, [3, None])


def test_a_vllm_that_would_write_placeholders_itself_does_not(monkeypatch):
    """Until 0.28 it asks whether Hugging Face's processor does."""
    monkeypatch.setattr(Stock, "_hf_processor_applies_updates", lambda self: True, raising=False)
    assert processor()._hf_processor_applies_updates()
    assert not processor({})._hf_processor_applies_updates()


def test_a_uuid_of_ours_is_refused():
    with pytest.raises(ValueError, match="uuid must not begin with 'fsr:'") as error:
        apply(processor({}), [A, B], [None, "fsr:24:x"])
    assert error.value.parameter == "uuid"


def test_where_nothing_is_pruned_every_path_is_stock():
    for settings, words in ((None, "not active"), ({"unsupported": "no tower"}, "no tower")):
        ours = processor(settings)
        result = apply(ours, [A], ["u"])
        assert "fsr_plan" not in result["mm_kwargs"]["image"][0] and RESULT_KEY not in result
        assert result["mm_hashes"]["image"] == ["u"] and ours.fsr_methods() == []
        assert placeholders(ours.get_dummy_mm_inputs({"image": 1})) == [28]
        with pytest.raises(ValueError, match=f"fsr_budget: .*{words}") as error:
            apply(ours, [A], fsr_budget=3)
        assert error.value.parameter == "fsr_budget"


def test_what_a_user_of_an_offline_engine_is_told():
    def engine(ours):
        renderer = SimpleNamespace(get_mm_processor=lambda: ours)
        asked = {"fsr_stats": [{"pruned_images": 1}]}
        return SimpleNamespace(
            llm_engine=SimpleNamespace(renderer=renderer), collective_rpc=asked.__getitem__
        )

    ours = processor({})
    apply(ours, [A, B], fsr_budget=20)
    found = stats(engine(ours))
    assert found["images"] == 2
    assert (found["visual_tokens_kept"], found["visual_tokens_total"]) == (35, 39)
    assert found["workers"] == [{"pruned_images": 1}]
    assert stats(engine(processor({"unsupported": "no tower"})))["images"] == 0
    with pytest.raises(ValueError, match="not active"):
        stats(engine(processor()))


def test_a_default_that_no_image_could_have_is_refused_at_start():
    assert processor({"budget": "off"}).fsr_methods()
    for settings in (
        {"budget": 0.9, "max_budget": 10},
        {"detail_budgets": {"low": 0.01}, "min_budget": 5},
    ):
        with pytest.raises(ValueError, match="rely on the server's defaults would fail"):
            processor(settings)
    with pytest.raises(ValueError, match="needs relevance"):
        processor({"budget": 3, "method": "relevance", "text_encoder": "none"})


def test_methods_are_those_whose_inputs_this_model_has():
    class Deaf(Front):
        signals = frozenset({"grid"})

    assert "fsr" in processor({}).fsr_methods()
    assert "relevance" in processor({}).fsr_methods()
    without = processor({"text_encoder": "none", "method": "uniform"}, Deaf()).fsr_methods()
    assert "uniform" in without and not {"fsr", "relevance"} & set(without)


def test_a_request_without_images_passes():
    ours = processor({"budget": 3})
    given = inputs(ours, [], fsr_budget=3)
    given.mm_data_items = ours.info.parse_mm_data({})
    result = ours.apply(given, TimingContext(enabled=False))
    assert result["prompt_token_ids"] == [1] and RESULT_KEY not in result


def test_updates_of_other_modalities_are_left_alone(monkeypatch):
    ours, stock = processor({}), Stock._get_prompt_updates
    request = FsrRequest(RequestFields(fsr_budget=3))
    items = planned(ours.fsr_planner, inputs(ours, [A]), request).mm_data_items
    other = PromptReplacement(modality="video", target=[3], replacement=[3] * 9)
    monkeypatch.setattr(Stock, "_get_prompt_updates", lambda *given: [other, *stock(*given)])
    found = ours._get_prompt_updates(items, {}, {})
    assert found[0] is other and [update.modality for update in found] == ["video", "image"]
