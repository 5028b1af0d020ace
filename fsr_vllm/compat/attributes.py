"""Every attribute and key of ours on objects of vLLM, with the reason why it cannot be avoided.

A test looks for others in the package.
"""

from __future__ import annotations

from typing import NamedTuple


class Attribute(NamedTuple):
    """One name of ours on an object that is not ours."""

    name: str
    of: str
    why: str


RESULT_KEY = "fsr"  # of a processed input
SETTINGS_KEY = "fsr_settings"  # of the Hugging Face config; `params` has the same name for it
IGNORED_KEY = "fsr_ignored"  # of the Hugging Face config in a front end

ATTRIBUTES = (
    Attribute(
        SETTINGS_KEY,
        "the Hugging Face config",
        "Processors and workers see nothing but the model config: the settings as JSON, with what "
        "start-up found.",
    ),
    Attribute(
        IGNORED_KEY,
        "the Hugging Face config",
        "An ignoring front end drops fields of requests, and must know it there.",
    ),
    Attribute(
        "fsr_request",
        "mm_processor_kwargs",
        "vLLM's only channel from a request to its processor: the parsed fields, taken out before "
        "vLLM hashes or validates.",
    ),
    Attribute(
        RESULT_KEY,
        "MultiModalDataItems, ProcessorInputs and processed inputs",
        "Plans and keys go along with the items they belong to, so that a processor keeps no state "
        "between steps; what became of the tokens goes along with the result.",
    ),
    Attribute(
        "fsr_plan",
        "the processed data of an image",
        "What the worker is told of an image: a tensor beside its pixels, as all that travels "
        "there.",
    ),
    Attribute(
        "fsr_visual_tokens",
        "RequestState and request outputs",
        "What an offline output carries to `fsr_vllm.visual_tokens`.",
    ),
    Attribute(
        "fsr_gate",
        "the app's state",
        "The one way of the routes to the workers; `state` is FastAPI's place for such things.",
    ),
    Attribute(
        "secondary_weights",
        "the model",
        "vLLM's own name: the text encoder's checkpoint, read after the model's.",
    ),
    Attribute(
        "supports_tower_connector_lora",
        "the model",
        "vLLM's own flag: rows of ours are not the tower's, which such adapters count on.",
    ),
)
