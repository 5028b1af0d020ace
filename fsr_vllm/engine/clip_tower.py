"""What families with a CLIP vision tower share: its signals, and which checkpoints are supported.

The saliency of methods is the attention of the tower's [CLS] to the patches.
"""

from __future__ import annotations

from fsr_vllm.compat.model import tower_attentions
from fsr_vllm.compat.types import HfConfig, Model
from fsr_vllm.engine.attention_hook import AttentionLayout

# Fields of VisualTokens that a worker half can fill from the tower, the projector and the question.
SIGNALS = frozenset(
    [
        "saliency",
        "shallow_saliency",
        "received",
        "shallow_received",
        "attention",
        "keys",
        "last_query",
        "last_key",
        "metric",
        "cls_row",
        "grid",
        "text",
    ]
)


def unsupported(architecture: str, hf_config: HfConfig, why: str = "") -> str | None:
    """Why a checkpoint's images cannot be pruned, or None; `why` is said of towers other than CLIP.

    Patches have to come from one layer, without [CLS] among them.
    """
    tower = hf_config.vision_config.model_type
    if tower != "clip_vision_model":
        return (
            f"{architecture} with a {tower} vision tower is not supported "
            f"(supported: clip_vision_model{why})"
        )
    if not isinstance(hf_config.vision_feature_layer, int):
        return f"{architecture} with several vision feature layers is not supported"
    if hf_config.vision_feature_select_strategy != "default":
        return f"{architecture} is supported with vision_feature_select_strategy default only"
    return None


def side_of(hf_config: HfConfig) -> int:
    """Patches along a side of the square that the tower sees."""
    vision = hf_config.vision_config
    return int(vision.image_size // vision.patch_size)


def attention_layout(model: Model) -> AttentionLayout:
    """The tower's attention layers, of which each sequence is one square with [CLS] in front."""
    depth = model.config.vision_config.num_hidden_layers
    return AttentionLayout(tower_attentions(model.vision_tower), depth)
