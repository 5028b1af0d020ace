"""What an installed plugin replaces in vLLM in each of its states: exactly what is listed here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsr_vllm.compat.state import VARIABLE

OPTIONS = {
    f"EngineArgs.{name}" for name in ("add_cli_args", "from_cli_args", "create_model_config")
}
OFFLINE = {
    "BaseRenderer.process_for_engine",
    "BaseRenderer.process_for_engine_async",
    "InputProcessor.process_inputs",
}
MESSAGES = {
    "AnthropicServingMessages.create_messages",
    "AnthropicServingMessages.count_tokens",
    "ServingRender.render_messages_request",
    "ServingTokens.serve_tokens",
}
REFUSING = {"BaseServing._check_model", "PoolingBaseServing._init_ctx", *MESSAGES}
DROPPING = {
    "BaseServing._check_model",
    "PoolingBaseServing._check_model",
    "PoolingBaseServing._init_ctx",
    "PoolingBaseServing._preprocessing",
    "OnlineRenderer.preprocess_chat",
    "OnlineRenderer.preprocess_completion",
    "online_renderer.validate_request_mm_kwargs",
    "serving.validate_request_mm_kwargs",
}
ACTIVE = {
    "BaseRenderer.render_chat",
    "BaseRenderer.render_chat_async",
    "BaseRenderer.clear_mm_cache",
    "RequestState.from_new_request",
    "RequestState._new_request_output",
    "SchedulerConfig.get_scheduler_cls",
    "OfflineInferenceMixin._add_request",
}
STARTS = {  # additional_config, and whether it is a server's
    "inactive LLM": ({}, False),
    "inactive server": ({}, True),
    "ignoring LLM": ({"fsr": {"ignore": True}}, False),
    "ignoring server": ({"fsr": {"ignore": True}}, True),
    "active LLM": ({"fsr": {}}, False),
    "active server": ({"fsr": {}}, True),
}

# Looks at everything that stands between a request and its answer, before and after a start.
SCRIPT = """
import importlib, json, sys
CLASSES = '''
vllm.engine.arg_utils:EngineArgs vllm.engine.arg_utils:AsyncEngineArgs
vllm.v1.engine.llm_engine:LLMEngine vllm.v1.engine.async_llm:AsyncLLM vllm.v1.engine.core:EngineCore
vllm.v1.engine.core_client:MPClient vllm.v1.engine.core_client:AsyncMPClient
vllm.v1.core.sched.scheduler:Scheduler vllm.v1.core.sched.async_scheduler:AsyncScheduler
vllm.config.scheduler:SchedulerConfig vllm.v1.core.encoder_cache_manager:EncoderCacheManager
vllm.v1.worker.gpu_model_runner:GPUModelRunner vllm.v1.worker.gpu.model_runner:GPUModelRunner
vllm.v1.worker.cpu_model_runner:CPUModelRunner vllm.v1.worker.worker_base:WorkerBase
vllm.v1.metrics.loggers:StatLoggerManager vllm.v1.engine.output_processor:RequestState
vllm.v1.engine.output_processor:OutputProcessor vllm.v1.engine.input_processor:InputProcessor
vllm.renderers.base:BaseRenderer vllm.renderers.hf:HfRenderer
vllm.renderers.online_renderer:OnlineRenderer vllm.entrypoints.llm:LLM
vllm.entrypoints.serve.engine.serving:BaseServing
vllm.entrypoints.pooling.base.serving:PoolingBaseServing
vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat
vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion
vllm.entrypoints.openai.responses.serving:OpenAIServingResponses
vllm.entrypoints.anthropic.serving:AnthropicServingMessages
vllm.entrypoints.serve.tokenize.serving:ServingTokenization
vllm.entrypoints.scale_out.render.serving:ServingRender
vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens
vllm.multimodal.processing:BaseMultiModalProcessor vllm.multimodal.processing:ProcessorInputs
vllm.model_executor.models.llava:LlavaForConditionalGeneration
vllm.sampling_params:SamplingParams
'''.split()
MODULES = ["vllm.renderers.online_renderer", "vllm.entrypoints.pooling.base.serving"]


def found():
    owners = {}
    for name in CLASSES:
        module, _, path = name.partition(":")
        for cls in getattr(importlib.import_module(module), path).__mro__:
            if cls.__module__.startswith("vllm"):
                owners[cls] = cls.__name__
    for name in MODULES:
        owners[sys.modules[name]] = name.rpartition(".")[2]
    return {
        (label, name): value
        for owner, label in owners.items()
        for name, value in vars(owner).items()
        if not name.startswith("_abc") and name not in ("__parameters__", "__builtins__")
    }


from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

before, said = found(), {}
from fsr_vllm import plugin
from fsr_vllm.compat.patching import undo_all

model, starts = json.loads(sys.argv[1])
for name, (config, online) in starts.items():
    plugin.register()
    kind = AsyncEngineArgs if online else EngineArgs
    kind(model=model, max_model_len=2048, additional_config=config).create_engine_config()
    after = found()
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    said[name] = [".".join(key) for key in before if before[key] is not after[key]]
    undo_all()
    assert all(value is before[key] for key, value in found().items())
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def replaced(checkpoint):
    """What each start replaces; one after another in a fresh process, all put back in between."""
    removed = ("VLLM_PLUGINS", VARIABLE)
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {
        "VLLM_PLUGINS": "lora_filesystem_resolver",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([str(checkpoint), STARTS])],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: set(names) for name, names in json.loads(done.stdout.splitlines()[-1]).items()}


def test_inactive_is_vllm_but_for_options_and_refusals(replaced):
    assert replaced["inactive LLM"] == OPTIONS | OFFLINE
    assert replaced["inactive server"] == OPTIONS | OFFLINE | REFUSING


def test_ignoring_is_vllm_but_for_options_and_what_drops_fields(replaced):
    assert replaced["ignoring LLM"] == OPTIONS | OFFLINE
    assert replaced["ignoring server"] == OPTIONS | OFFLINE | DROPPING


def test_active_replaces_what_is_listed(replaced):
    assert replaced["active LLM"] == OPTIONS | OFFLINE | ACTIVE
    assert replaced["active server"] == OPTIONS | OFFLINE | ACTIVE | REFUSING | DROPPING
