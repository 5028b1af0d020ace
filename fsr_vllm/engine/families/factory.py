"""vLLM's model and processor classes of a family, built from the stock ones."""

from __future__ import annotations

from fsr_vllm.compat.processing import stock_factories
from fsr_vllm.engine.families.base import Family
from fsr_vllm.engine.model import FsrModelMixin
from fsr_vllm.engine.processor import processor_factory


def build(family: Family) -> type:
    """The family's model class, with its processor registered.

    The class carries the plugin's name for the architecture and lives, for pickle and vLLM's
    registry, in `fsr_vllm.engine.families`.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY

    stock = family.stock_class()
    factories = stock_factories(stock)
    name = f"Fsr{family.architecture}"
    body = {"fsr_family": family, "__module__": __package__, "__qualname__": name}
    built = type(name, (FsrModelMixin, *family.model_mixins(), stock), body)
    return MULTIMODAL_REGISTRY.register_processor(
        processor_factory(factories.processor, family),
        info=factories.info,
        dummy_inputs=factories.dummy_inputs,
    )(built)
