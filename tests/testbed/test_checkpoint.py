"""The random checkpoints load in transformers and vLLM without a key too many or too few, and
answer alike in both.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    LlavaForConditionalGeneration,
)

from benchmarks.testbed import build_checkpoint, build_clip_less, build_text_model, data_url, photos
from fsr_vllm.signals.relevance import clip_relevance

QUESTIONS = ["What is this?", "How many cups are on the table?"]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def processor(path):
    return AutoProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def llava(path):
    return load(LlavaForConditionalGeneration, path, attn_implementation="eager")


def load(kind, path, **options):
    """The model, after checking that file and model agree on every tensor."""
    model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    assert next(model.parameters()).dtype == torch.float32
    return model.eval()


def chat(*parts):
    """A user message; photographs are given by name, anything else is text."""
    pictures = photos()
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": pictures[p]}
                if p in pictures
                else {"type": "text", "text": p}
                for p in parts
            ],
        }
    ]


def encode(processor, messages):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def digests(path: Path) -> dict[str, str]:
    files = sorted(f for f in path.rglob("*") if f.is_file())
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_same_seed_same_bytes_also_in_another_process(path, tmp_path):
    code = "import sys; from benchmarks.testbed import build_checkpoint as b; "
    code += "b(sys.argv[1]); b(sys.argv[2], seed=1)"
    folders = [tmp_path / "same", tmp_path / "other"]
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, *map(str, folders)], check=True, cwd=root)
    same, other = map(digests, folders)
    assert same == digests(path)
    differing = {name for name in same if same[name] != other[name]}
    assert differing == {"model.safetensors", "text_encoder/model.safetensors"}


def test_published_key_names(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    prefixes = (
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.lm_head.",
    )
    assert all(key.startswith(prefixes) for key in keys)
    assert all(any(key.startswith(prefix) for key in keys) for prefix in prefixes)
    with safe_open(path / "text_encoder" / "model.safetensors", "pt") as file:
        wanted = (
            "text_projection.weight",
            "visual_projection.weight",
            "vision_model.post_layernorm.weight",
        )
        assert set(wanted) < set(file.keys())


def test_llava_sees_576_tokens_and_answers_what_it_is_asked_about(llava, processor):
    logits = {}
    for name in ("astronaut", "chelsea"):
        for question in QUESTIONS:
            inputs = encode(processor, chat(name, question))
            assert (inputs["input_ids"] == processor.image_token_id).sum() == 576
            assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1
            with torch.no_grad():
                logits[name, question] = llava(**inputs).logits[0, -1]
    rows = torch.stack(list(logits.values()))
    apart = torch.cdist(rows, rows, p=torch.inf) + torch.eye(len(rows)) * 9
    assert apart.min() > 0.1, apart


def test_cls_attention_is_neither_uniform_nor_one_token(llava, processor):
    inputs = encode(processor, chat("astronaut", "chelsea", "coffee"))
    with torch.no_grad():
        out = llava.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    share = out.attentions[-2][:, :, 0, 1:].mean(1)
    share = share / share.sum(-1, keepdim=True)
    entropy = -(share * share.log()).sum(-1)  # 6.36 nats if uniform, 4.4 to 4.9 in CLIP-L
    assert ((entropy > 3) & (entropy < 6)).all(), entropy
    assert not torch.allclose(share[0], share[1], atol=1e-3)


def test_text_encoder_is_the_towers_own(llava, path, processor):
    clip = load(CLIPModel, path / "text_encoder", attn_implementation="eager")
    tower = llava.model.vision_tower.state_dict()
    for name, tensor in clip.vision_model.state_dict().items():
        assert torch.equal(tensor, tower[name]), name
    tokenizer = AutoTokenizer.from_pretrained(path / "text_encoder")
    assert tokenizer.model_max_length == 77
    ids = tokenizer("What is this?").input_ids
    assert [ids[0], ids[-1]] == tokenizer.convert_tokens_to_ids(
        ["<|startoftext|>", "<|endoftext|>"]
    )
    assert ids[-1] == clip.config.text_config.eos_token_id
    assert tokenizer("WHAT is this?").input_ids == ids

    pixels = encode(processor, chat("astronaut"))["pixel_values"]
    with torch.no_grad():
        texts = torch.stack(
            [
                clip(**tokenizer(q, return_tensors="pt"), pixel_values=pixels).text_embeds[0]
                for q in QUESTIONS
            ]
        )
        hidden = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][
            :, 1:
        ]
        modules = clip.vision_model.post_layernorm, clip.visual_projection
        maps = clip_relevance(hidden.expand(2, -1, -1), texts, *modules, sign=1)
    assert (maps.std(-1) > 0.02).all()
    assert torch.corrcoef(maps)[0, 1] < 0.9  # another question, another map


def test_relevance_sign_is_written_when_asked(path, tmp_path):
    assert "fsr_relevance_sign" not in json.loads(
        (path / "text_encoder" / "config.json").read_text()
    )
    asked = build_checkpoint(tmp_path, relevance_sign=-1)
    assert (
        json.loads((asked / "text_encoder" / "config.json").read_text())["fsr_relevance_sign"] == -1
    )


def test_other_sizes(tmp_path):
    path = build_checkpoint(
        tmp_path,
        image_size=112,
        hidden_size=96,
        layers=2,
        vision_hidden_size=80,
        vision_layers=3,
        text_encoder=False,
    )
    assert not (path / "text_encoder").exists()
    model = load(LlavaForConditionalGeneration, path)
    inputs = encode(AutoProcessor.from_pretrained(path), chat("coffee", "What is this?"))
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == 64
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match="divide"):
        build_checkpoint(tmp_path / "odd", image_size=100)


def test_clip_less_and_text_model(tmp_path, processor):
    siglip = build_clip_less(tmp_path / "siglip")
    model = load(LlavaForConditionalGeneration, siglip)
    inputs = encode(AutoProcessor.from_pretrained(siglip), chat("coffee", "What is this?"))
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == 196
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    text = build_text_model(tmp_path / "text")
    llama = load(AutoModelForCausalLM, text)
    ids = AutoTokenizer.from_pretrained(text).apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        answer = llama.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert (
        answer.shape[1] == ids["input_ids"].shape[1] + NEW_TOKENS
    )  # no end token: as long as asked for


def test_chat_template(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "One?"}, {"type": "image_url"}],
        },
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "<image>\nTwo?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert (
        text == "<s>Be brief. USER: <image>\nOne?\n<image> ASSISTANT: Yes.</s>"
        "USER: <image>\nTwo? ASSISTANT:"
    )
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert (
        ids.count(processor.image_token_id) == 3
        and ids.count(processor.tokenizer.eos_token_id) == 1
    )
    assert processor.tokenizer.decode(ids) == text
    assert (
        processor.tokenizer.decode(
            processor.tokenizer("naïve 画像?").input_ids, skip_special_tokens=True
        )
        == "naïve 画像?"
    )


@pytest.mark.engine
def test_vllm_answers_as_transformers(llava, processor, path, monkeypatch):
    """Vanilla vLLM, greedy, float32: a dozen tokens of one image, two images with text between, and
    no image.
    """
    monkeypatch.setenv("VLLM_PLUGINS", "")
    from vllm import LLM, SamplingParams

    conversations = [
        chat(name, question) for name in ("astronaut", "coffee") for question in QUESTIONS
    ]
    conversations += [
        chat("Compare", "chelsea", "and", "rocket", "in one sentence."),
        chat("What is this?"),
    ]
    expected = []
    for messages in conversations:
        inputs = encode(processor, messages)
        with torch.no_grad():
            out = llava.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        expected.append((inputs["input_ids"].shape[1], out[0, -NEW_TOKENS:].tolist()))

    for (message,) in conversations:  # PNG, so that both see the same pixels
        message["content"] = [
            {"type": "image_url", "image_url": {"url": data_url(part["image"], "PNG")}}
            if "image" in part
            else part
            for part in message["content"]
        ]
    llm = LLM(
        model=str(path),
        enforce_eager=True,
        dtype="float32",
        kv_cache_memory_bytes=256 << 20,
        max_model_len=2048,
        limit_mm_per_prompt={"image": 4},
    )
    try:
        outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert [(len(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs] == expected
    assert len({tuple(tokens) for _, tokens in expected}) == len(expected)
