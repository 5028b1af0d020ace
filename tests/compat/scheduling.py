"""vLLM's real Scheduler with requests that hold no data and a model runner that only says a token
was made.
"""

import hashlib
import inspect

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from fsr_vllm.compat.identity import mark, unpruned_tokens

BLOCK = 16


def block_hash(value):
    return hashlib.sha256(repr(value).encode()).digest()


init_none_hash(block_hash)
HASHER = get_request_block_hasher(BLOCK, block_hash)


def make_scheduler(model, settings, *, blocks=10_000, **arguments):
    """The scheduler that an engine of these arguments would have; `settings` are the plugin's,
    None: inactive.
    """
    given = {} if settings is None else {"additional_config": {"fsr": settings}}
    config = EngineArgs(
        model=str(model),
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=16,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 900},
        **{"max_num_batched_tokens": 2048, "async_scheduling": False, **given, **arguments},
    ).create_engine_config()
    config.cache_config.num_gpu_blocks, config.cache_config.block_size = blocks, BLOCK
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(
        blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=False,
    )


def make_request(name, images, *, text=5, answer=3, priority=0):
    """A prompt of `text` tokens, then images (seed, kept, unpruned), each followed by one token."""
    ids, features = list(range(1, text + 1)), []
    for seed, kept, total in images:
        digest = hashlib.sha256(f"{seed} {kept} {total}".encode()).hexdigest()
        name_of_image = mark(total, digest) if kept < total else digest
        place = PlaceholderRange(offset=len(ids), length=kept)
        features.append(MultiModalFeatureSpec(None, "image", name_of_image, place, name_of_image))
        ids += [0] * kept + [9]
    more = (
        {"eos_token_id": 2}
        if "eos_token_id" in inspect.signature(Request.__init__).parameters
        else {}
    )
    return Request(
        request_id=name,
        prompt_token_ids=ids,
        sampling_params=SamplingParams(max_tokens=answer, ignore_eos=True),
        pooling_params=None,
        mm_features=features,
        priority=priority,
        arrival_time=float(len(name)),
        block_hasher=HASHER,
        **more,
    )


def computed(output, name):
    for new in output.scheduled_new_reqs:
        if new.req_id == name:
            return new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    return cached.num_computed_tokens[cached.req_ids.index(name)]


def run(scheduler, requests, *, arrivals=None, delay=0, limit=20_000):
    """Steps until all requests are answered; a step is the list of (request, place, kept, unpruned
    tokens) it encodes.

    The worker is played strictly: an image that a step reads must have been encoded by then.
    `delay` outputs are held back, as asynchronous scheduling does.
    """
    steps, held, there = [], [], set()
    coming = sorted(
        ((arrivals or {}).get(each.request_id, 0), place, each)
        for place, each in enumerate(requests)
    )
    while coming or scheduler.has_unfinished_requests() or held:
        while coming and coming[0][0] <= len(steps):
            scheduler.add_request(coming.pop(0)[2])
        output = scheduler.schedule()
        there -= set(output.free_encoder_mm_hashes)
        step = []
        for name, places in output.scheduled_encoder_inputs.items():
            for place in places:
                feature = scheduler.requests[name].mm_features[place]
                kept = feature.mm_position.length
                step.append((name, place, kept, max(kept, unpruned_tokens(feature))))
                there.add(feature.identifier)
        for name, new in output.num_scheduled_tokens.items():
            start = computed(output, name)
            for feature in scheduler.requests[name].mm_features:
                first = feature.mm_position.offset
                if first < start + new and first + feature.mm_position.length > start:
                    assert feature.identifier in there, (name, first, start, new)
        steps.append(step)
        if output.total_num_scheduled_tokens:
            held.append(output)
        if held and (len(held) > delay or not output.total_num_scheduled_tokens):
            _answer(scheduler, held.pop(0))
        assert len(steps) < limit, "the scheduler does not get on"
    return steps


def _answer(scheduler, output):
    names = list(output.num_scheduled_tokens)
    sampled = []
    for name in names:
        request = scheduler.requests.get(name)
        end = computed(output, name) + output.num_scheduled_tokens[name]
        sampled.append([7] if request is not None and end >= request.num_prompt_tokens else [])
    done = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: place for place, name in enumerate(names)},
        sampled_token_ids=sampled,
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )
    scheduler.update_from_output(output, done)


def work(steps):
    """Unpruned tokens that each step gives the tower."""
    return [sum(total for *_, total in step) for step in steps]
