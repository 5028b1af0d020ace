"""vLLM's own processor classes around a model that does not exist: images of any size and ratio.

An image of W x H pixels has a grid of (H // 10) x (W // 10) patches and a newline after each of its
rows, so that N = h * (w + 1) differs from image to image. Its patches lie flat, beside those of the
other images of a prompt; its placeholder has a token before and one after the N visual ones.
"""

from types import SimpleNamespace

import torch
from PIL import Image
from transformers import BatchFeature, PretrainedConfig
from vllm.config.multimodal import MultiModalConfig
from vllm.multimodal.cache import MultiModalProcessorOnlyCache
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    InputProcessingContext,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdateDetails,
    TimingContext,
)

from fsr_vllm.engine.families.base import Family
from fsr_vllm.engine.processor import processor_factory
from fsr_vllm.engine.wire import unpack_plan
from fsr_vllm.params import SETTINGS_KEY, ServerSettings

IMAGE, START, END = 7, 8, 9  # token ids
WIDTH = 5  # of an embedding
LARGEST = (60, 40)  # pixels of a profiling image: N = 4 * 7


def grid(size, options=None):
    """(h, w) in patches of an image of size (W, H) pixels."""
    patch = int((options or {}).get("patch", 10))
    return size[1] // patch, size[0] // patch


def rows(size, options=None):
    """N of an image."""
    height, width = grid(size, options)
    return height * (width + 1)


class Front(Family):
    """The front half for it."""

    architecture = "FrontForConditionalGeneration"
    signals = frozenset({"saliency", "grid", "metric"})

    def stock_class(self):
        raise NotImplementedError

    worker_half = stock_class

    def unsupported(self, hf_config):
        return None

    def most_tokens(self, hf_config):
        return rows(LARGEST)

    def total(self, info, images, index, options):
        if images.get(index) is None:  # cached by vLLM: only its uuid is here
            return rows(LARGEST)
        return rows(images.get_image_size(index), options)

    def shorten(self, placeholder, plan):
        full = [START, *[IMAGE] * plan.keep, END]
        return PromptUpdateDetails.select_token_id(full, IMAGE)

    def boxes(self, info, size):
        raise NotImplementedError


class Info(BaseProcessingInfo):
    def get_supported_mm_limits(self):
        return {"image": None}


class Dummies(BaseDummyInputsBuilder):
    def get_dummy_text(self, mm_counts):
        return "<image>" * mm_counts["image"]

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        width, height = LARGEST
        return {
            "image": self._get_dummy_images(
                width=width, height=height, num_images=mm_counts["image"]
            )
        }


class Stock(BaseMultiModalProcessor):
    """What a model of vLLM brings; `seen` says how many images each call of its image processor
    had.
    """

    def __init__(self, info, dummy_inputs):
        super().__init__(info, dummy_inputs)
        self.seen = []

    def _call_hf_processor(self, hf_data, hf_kwargs):
        images = hf_data["images"]
        self.seen.append(len(images))
        grids = [grid(image.size, hf_kwargs) for image in images]
        patches = [
            torch.full((h * w, 3), float(image.getpixel((0, 0))[0]))
            for image, (h, w) in zip(images, grids, strict=True)
        ]
        return BatchFeature({"patches": torch.cat(patches), "grids": torch.tensor(grids)})

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        found = {"image_embeds": MultiModalFieldConfig.batched("image")}
        if "grids" in hf_inputs:
            sizes = hf_inputs["grids"].prod(-1)
            found["patches"] = MultiModalFieldConfig.flat_from_sizes("image", sizes)
            found["grids"] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return found

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        def replacement(index):
            items = mm_items["image"]
            if isinstance(items, ImageProcessorItems):
                height, width = out_mm_kwargs["image"][index]["grids"].data.tolist()
                count = height * (width + 1)
            else:
                count = items.get_feature_size(index)
            return PromptUpdateDetails.select_token_id([START, *[IMAGE] * count, END], IMAGE)

        return [PromptReplacement(modality="image", target=[IMAGE], replacement=replacement)]


class Words:
    """What vLLM asks of a tokenizer here."""

    def encode(self, text, **_):
        return [IMAGE] * text.count("<image>")


def model_config(settings=None, limit=None, **hf):
    """A model config that is active with these settings; inactive without."""
    config = PretrainedConfig()
    if settings is not None:
        found = {name: settings[name] for name in settings if name in ("unsupported", "signals")}
        options = {name: settings[name] for name in settings if name not in found}
        put = ServerSettings.parse(options).model_copy(update=found)
        setattr(config, SETTINGS_KEY, put.model_dump_json())
    for name, value in hf.items():
        setattr(config, name, value)
    limits = {} if limit is None else {"image": limit}
    multimodal = MultiModalConfig(enable_mm_embeds=True, limit_per_prompt=limits)
    return SimpleNamespace(
        model="a/model",
        hf_config=config,
        multimodal_config=multimodal,
        get_multimodal_config=lambda: multimodal,
        get_inputs_embeds_size=lambda: WIDTH,
        max_model_len=512,
    )


def processor(settings=None, family=None):
    """Our processor before the stock one above, as vLLM's registry builds it."""
    build = processor_factory(Stock, family or Front())
    info = Info(InputProcessingContext(model_config(settings), Words()))
    return build(info, Dummies(info))


def cache(of):
    """vLLM's own processor cache, of one process."""
    return MultiModalProcessorOnlyCache(of.info.ctx.model_config)


def picture(width, height, seed=0):
    return Image.new("RGB", (width, height), color=(seed, 0, 0))


def inputs(of, images, uuids=None, kept=None, **kwargs):
    """Processor inputs for a prompt with these images; `kept` is a cache of vLLM's."""
    return ProcessorInputs(
        prompt=[1, *[IMAGE, 2] * len(images)],
        mm_data_items=of.info.parse_mm_data({"image": images}),
        mm_uuid_items=None if uuids is None else {"image": uuids},
        hf_processor_mm_kwargs=kwargs,
        cache=kept,
    )


def apply(of, images, uuids=None, kept=None, **kwargs):
    """The processed input of a prompt with these images."""
    return of.apply(inputs(of, images, uuids, kept, **kwargs), TimingContext(enabled=False))


def placeholders(result):
    """Visual tokens of each image's placeholder; START, END and the other tokens are checked."""
    tokens, found = result["prompt_token_ids"], []
    for place in result["mm_placeholders"]["image"]:
        run = tokens[place.offset :][: place.length]
        assert run[0] == START and run[-1] == END and set(run[1:-1]) <= {IMAGE}
        assert place.get_num_embeds() == len(run) - 2
        found.append(len(run) - 2)
    return found


def plans(result):
    """(cache key, plan) of each image, as the worker gets them."""
    return [unpack_plan(item["fsr_plan"].data) for item in result["mm_kwargs"]["image"]]


def pixels(result):
    """Of each image: its grid, and the colour of its patches."""
    return [
        (tuple(item["grids"].data.tolist()), set(item["patches"].data.flatten().tolist()))
        for item in result["mm_kwargs"]["image"]
    ]
