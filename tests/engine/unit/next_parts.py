"""LLaVA-NeXT's configuration, image processor and order of rows, by transformers and vLLM."""

from types import SimpleNamespace

from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextImageProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from vllm.model_executor.models.llava_next import LlavaNextProcessingInfo
from vllm.model_executor.models.vision import get_vision_encoder_info

from tests.checkpoints import PATCH, PINPOINTS, TILE

PUBLISHED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
EXTREME = [(336, 336), (672, 672), (300, 20), (20, 300), (1000, 31), (1, 1), (2000, 12), (12, 2000)]
PADDED = (600, 20)  # (width, height): a ratio at which the tiles show padding alone
NARROW = (20, 600)  # and one of which only newlines are left of them


def config(tile=TILE, pinpoints=PINPOINTS, **changes):
    vision = CLIPVisionConfig(image_size=tile, patch_size=PATCH, num_hidden_layers=4)
    return LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(),
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="default",
        **changes,
    )


class Info(LlavaNextProcessingInfo):
    """vLLM's own, of a checkpoint that lies nowhere."""

    def __init__(self, hf_config):
        self.hf_config = hf_config

    def get_hf_config(self):
        return self.hf_config

    def get_vision_encoder_info(self):
        return get_vision_encoder_info(self.hf_config)


def image_processor(tile, pinpoints, **changes):
    return LlavaNextImageProcessor(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=pinpoints,
        **changes,
    )


def packed(hf_config, values, image_sizes, newline):
    """Transformers' own order of the patches of each image's tiles."""
    return LlavaNextModel.pack_image_features(
        SimpleNamespace(config=hf_config), values, image_sizes, "default", image_newline=newline
    )
