"""What a user writes is text to every tokenizer of ours, also where it spells a control token."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, ByT5Tokenizer

from benchmarks.testbed.export import SHIPPED
from fsr_vllm.engine.text_encoder import ClipText, LlmText, plain_ids

CLIP = SHIPPED / "text_encoder"
QUESTION = "what colour is the circle ?"
SPELLED = ["<|endoftext|>", "<|ENDOFTEXT|>", "<|startoftext|>", "<|endoftext|><|endoftext|>"]


def mistral(folder):
    """vLLM's own class around a published tokenizer, of which mistral_common carries a copy."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    shutil.copy(data / "tekken_240911.json", folder / "tekken.json")
    from vllm.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_pretrained(folder)


def served(folder):
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(str(SHIPPED))


# A tokenizer, and texts that spell control tokens of it.
TOKENIZERS = {
    "CLIP": (lambda folder: AutoTokenizer.from_pretrained(CLIP), SPELLED),
    "language model": (served, ["<image>", "</s>", "<s>", "<pad>", "<unk>"]),
    "slow": (lambda folder: ByT5Tokenizer(), ["</s>", "<pad>", "<extra_id_0>"]),
    "Mistral": (mistral, ["[INST]", "</s>", "[IMG]", "<s>"]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_becomes_a_control_token(tmp_path, name):
    make, spelled = TOKENIZERS[name]
    tokenizer = make(tmp_path)
    specials = set(tokenizer.all_special_ids)
    plain = plain_ids(tokenizer, "a red circle")
    assert plain and not specials & set(plain)
    for token in spelled:
        ids = plain_ids(tokenizer, f"a red circle {token} a red circle {token}")
        assert not specials & set(ids), token
        # What stands around it is read as ever; only Mistral's tokenizers take such strings for
        # words in any text.
        assert ids[: len(plain)] == plain and len(ids) >= 2 * len(plain)


def test_some_of_these_are_control_tokens_to_the_tokenizers_themselves(tmp_path):
    """Or the test above could not fail."""
    for name in ("CLIP", "language model", "slow"):
        make, spelled = TOKENIZERS[name]
        tokenizer = make(tmp_path)
        assert set(tokenizer(spelled[0], add_special_tokens=False)["input_ids"]) & set(
            tokenizer.all_special_ids
        )


@pytest.fixture(scope="module")
def tower():
    """The bundled text tower with its own weights; both norms and projections as they are made."""
    from safetensors.torch import load_file

    text = ClipText(str(CLIP), 1)
    for name, tensor in load_file(CLIP / "model.safetensors").items():
        parameter = name.removeprefix("vision_model.") if "post_layernorm" in name else name
        if name.startswith(("text_model.", "text_projection.")):
            candidates = (f"text.{name}", f"text.{name.removeprefix('text_model.')}")
            parameter = next(each for each in candidates if each in text._wanted)
        if parameter in text._wanted:
            text.get_parameter(parameter).data.copy_(tensor)
    return text.eval()


def test_a_question_keeps_its_meaning_around_spelled_control_tokens(tower):
    """Relevance with the string in the text stays about the question."""
    asked, nothing = tower._encode(QUESTION), tower._encode("")
    for token in SPELLED:
        for text in (f"{token} {QUESTION}", f"{QUESTION} {token}", f"{token}{QUESTION}{token}"):
            found = tower._encode(text)
            assert found @ asked > 0.9 > 0.75 > found @ nothing, (
                text
            )  # read as a control token: 0.49, and 1.00


def test_the_language_models_embeddings_hold_no_control_token():
    tokenizer = served(None)
    words = LlmText(nn.Embedding(len(tokenizer), 4), lambda: tokenizer, 1)
    words._language_model.embed_input_ids = words._language_model.forward
    torch.testing.assert_close(
        words.embeddings("a <image> circle</s>"), words.embeddings("a  circle")
    )
    assert words.embeddings("<image></s>").shape == (0, 4)
    assert (
        tokenizer.convert_tokens_to_ids("<image>") in tokenizer("a <image> circle")["input_ids"]
    )  # vLLM needs that
