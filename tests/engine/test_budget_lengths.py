"""What vLLM plans its memory and prompt lengths with, when the server has a maximum budget; no
engine is started.
"""

import pytest


@pytest.mark.parametrize(
    ("settings", "tokens"), [({}, 576), ({"max_budget": 64}, 64), ({"budget": 64}, 576)]
)
def test_tokens_per_image_follow_the_maximum_budget(checkpoint, settings, tokens):
    """A default alone promises nothing: a request may still ask for more."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    from fsr_vllm import plugin

    plugin.register()
    args = EngineArgs(
        model=str(checkpoint),
        max_model_len=2048,
        additional_config={"fsr": settings},
        limit_mm_per_prompt={"image": 9},
    )
    budget = MultiModalBudget(args.create_engine_config(), MULTIMODAL_REGISTRY)
    assert dict(budget.mm_max_toks_per_item) == {"image": tokens}
    assert budget.mm_max_items_per_prompt == {"image": min(9, 2048 // tokens)}
