"""The text encoder that is bundled, against transformers' CLIP loaded from the same folder."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel

from fsr_vllm.demo import demo_model
from fsr_vllm.engine.stats import Clock, Counts
from fsr_vllm.engine.text_encoder import ClipText, LlmText, find_encoder

FOLDER = demo_model() / "text_encoder"
QUESTIONS = ["What colour is the circle?", "Is there a star?"]


@pytest.fixture(scope="module")
def encoder():
    text = ClipText(str(FOLDER), -1)
    tensors = load_file(FOLDER / "model.safetensors")
    text.check_loaded({name for key in tensors if (name := text.take(key, tensors[key]))})
    return text


@pytest.fixture(scope="module")
def clip():
    return CLIPModel.from_pretrained(FOLDER, dtype=torch.float32).eval()


@torch.no_grad()
def test_relevance_is_clips_cosine_times_the_sign(encoder, clip):
    width = clip.config.vision_config.hidden_size
    patches = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    joint = clip.visual_projection(clip.vision_model.post_layernorm(patches))
    for place, question in enumerate(QUESTIONS):
        ids = tokenizer(question.lower(), return_tensors="pt").input_ids
        text = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
        expected = -torch.cosine_similarity(joint[place], text, dim=-1)
        found = encoder.relevance(patches, patches, QUESTIONS)[place]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_question_is_encoded_once_until_the_weights_change(encoder):
    patches = torch.randn(1, 3, encoder.visual_projection.in_features)
    encoder.clear()
    calls, stock = [], encoder._cache._encode
    encoder._cache._encode = lambda text: calls.append(text) or stock(text)
    try:
        for question in ("a", "b", "a"):
            encoder.relevance(patches, patches, [question])
        encoder.clear()
        encoder.relevance(patches, patches, ["a"])
    finally:
        encoder._cache._encode = stock
    assert calls == ["a", "b", "a"]


def test_a_checkpoint_that_lacks_tensors_is_named():
    with pytest.raises(ValueError, match="does not read the text encoder"):
        ClipText(str(FOLDER), 1).check_loaded(set())
    with pytest.raises(ValueError, match=r"lacks .* and \d+ more tensors"):
        ClipText(str(FOLDER), 1).check_loaded({"visual_projection.weight"})
    ClipText(str(FOLDER), 1, dummy=True).check_loaded(set())


def test_where_the_encoder_and_its_sign_come_from(tmp_path):
    vision = SimpleNamespace(
        hidden_size=CLIPModel.config_class.from_pretrained(FOLDER).vision_config.hidden_size,
        model_type="other",
    )
    config = SimpleNamespace(
        model=str(demo_model()), hf_config=SimpleNamespace(vision_config=vision)
    )
    assert find_encoder(config, "auto", "auto") == (str(FOLDER), 1)
    assert find_encoder(config, "auto", -1) == (str(FOLDER), -1)
    assert find_encoder(config, "none", "auto")[0] == "none"
    elsewhere = SimpleNamespace(model=str(tmp_path), hf_config=config.hf_config)
    with pytest.raises(ValueError, match="knows no text encoder"):
        find_encoder(elsewhere, "auto", "auto")
    with pytest.raises(ValueError, match="cannot load the text encoder"):
        find_encoder(config, str(tmp_path / "nothing"), "auto")
    vision.hidden_size = 7
    with pytest.raises(ValueError, match="this model's has 7"):
        find_encoder(config, str(FOLDER), "auto")


def test_the_language_models_words_of_a_question():
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    table = torch.nn.Embedding(len(tokenizer), 4)
    model = SimpleNamespace(parameters=table.parameters, embed_input_ids=table)
    words = LlmText(model, lambda: tokenizer, -1)
    ids = tokenizer("what is this", add_special_tokens=False).input_ids
    assert torch.equal(words.embeddings("what is this"), table(torch.tensor(ids)))
    assert words.embeddings("").shape == (0, 4)
    rows = torch.randn(1, 3, 4)
    mean = table(torch.tensor(ids)).mean(0)
    expected = -torch.cosine_similarity(rows[0], mean, dim=-1)
    found = words.relevance(torch.zeros(1, 3, 2), rows, ["what is this"])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        table.weight.neg_()
    assert torch.equal(
        words.relevance(rows, rows, ["what is this"])[0],
        words.relevance(rows, rows, ["what is this"])[0],
    )
    words.clear()
    found = words.relevance(torch.zeros(1, 3, 2), rows, ["what is this"])[0]
    torch.testing.assert_close(found, -expected, rtol=0, atol=1e-5)


class Event:
    """Stands where torch's CUDA event does; time is the number of events so far."""

    made: ClassVar[list["Event"]] = []
    waited = 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.time = None

    def record(self):
        Event.made.append(self)
        self.time = len(Event.made)

    def query(self):
        return True

    def synchronize(self):
        Event.waited += 1

    def elapsed_time(self, last):
        return 1000.0 * (last.time - self.time)  # milliseconds


def test_on_a_gpu_the_clock_waits_only_when_it_is_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock()
    for _ in range(1005):  # the oldest events are given back on the way
        with clock.timing("tower"):
            pass
    assert Event.waited == 0
    assert clock.read() == {"tower": 1005.0}
    assert 0 < Event.waited <= 1001
    assert clock.read() == {"tower": 1005.0}


def test_counts_and_clock_add_up():
    counts, clock = Counts(), Clock()
    counts.add(images=2, kept=torch.tensor(3))
    counts.add(images=1, kept=torch.tensor(4))
    assert counts.read() == {"images": 3, "kept": 7.0}
    for part in ("tower", "select", "tower"):
        with clock.timing(part):
            pass
    seconds = clock.read()
    assert set(seconds) == {"tower", "select"}
    assert all(0 <= value < 60 for value in seconds.values())
