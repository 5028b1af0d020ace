"""Names for objects of vLLM in annotations. To a type checker all of them are Any.

vLLM is large, only partly typed and different in every release of the window, so mypy does not
follow it. The names say which object is meant; where nothing better can be said, they say why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Anything: TypeAlias = Any  # a value that is handed on unread
Function: TypeAlias = Callable[..., Any]  # of vLLM, called with whatever it was called with

Namespace: TypeAlias = Any  # argparse's result, or whatever a launcher uses in its place
Parser: TypeAlias = Any  # vLLM's FlexibleArgumentParser, or a group of it
EngineArgs: TypeAlias = Any  # vllm.engine.arg_utils.EngineArgs or AsyncEngineArgs
VllmConfig: TypeAlias = Any  # vllm.config.VllmConfig
ModelConfig: TypeAlias = Any  # vllm.config.ModelConfig
HfConfig: TypeAlias = Any  # transformers' PretrainedConfig, whose attributes differ by model
HfOverrides: TypeAlias = Any  # a mapping, or a callable, as vLLM takes it

EngineClient: TypeAlias = Any  # AsyncLLM, or another client of an engine
App: TypeAlias = Any  # the FastAPI app whose `state` vLLM fills
Renderer: TypeAlias = Any  # vllm.renderers: BaseRenderer or OnlineRenderer
HttpRequest: TypeAlias = Any  # one of vLLM's request models, or an object with its attributes
Conversations: TypeAlias = Any  # lists of chat messages, as a client or a user wrote them
EngineInputs: TypeAlias = Any  # what a renderer returns: one mapping per prompt

Scheduler: TypeAlias = Any  # vllm.v1.core.sched
SchedulerRequest: TypeAlias = Any  # vllm.v1.request.Request
Feature: TypeAlias = Any  # MultiModalFeatureSpec

Processor: TypeAlias = Any  # a subclass of BaseMultiModalProcessor
ProcessingInfo: TypeAlias = Any  # its `info`
Inputs: TypeAlias = Any  # ProcessorInputs
Items: TypeAlias = Any  # MultiModalDataItems, or those of one modality
KwargsItem: TypeAlias = Any  # MultiModalKwargsItem
Processed: TypeAlias = Any  # BatchFeature, in older releases inside a tuple

# What the model side of the engine is handed.
Model: TypeAlias = Any  # a model class of vLLM's, as a module with the attributes of its family
AttentionOp: TypeAlias = Any  # the attention op of a block: num_heads, head_size, scale
Placeholder: TypeAlias = Any  # token ids, or PromptUpdateDetails around them
Tokenizer: TypeAlias = Any  # of transformers, or vLLM's wrapper of one
OfflineLLM: TypeAlias = Any  # vllm.LLM
