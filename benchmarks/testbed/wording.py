"""How the small checkpoints read and write: tokenizers trained on the fly, and LLaVA-1.5's chat
template.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

UNK, BOS, EOS, PAD, IMAGE = "<unk>", "<s>", "</s>", "<pad>", "<image>"
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_LENGTH = 77

_CORPUS = """
What is in the picture? What is the colour of the cat? Is there a person in the image? How many cups are on the table?
Describe the image in one sentence. Where is the rocket? What does the sign say? Which animal is left of the chair?
Answer the question with a single word or phrase. Is the sky blue or grey? What is she wearing? Who holds the ball?
The picture shows a small brown cat that looks at the camera. An astronaut in an orange suit stands before a flag.
A cup of coffee with a spoon stands on a wooden table. The rocket waits on the launch pad under a clear blue sky.
A man takes a photograph on the grass. Two red motorcycles are parked in the garage, one behind the other.
There are many old coins in four rows. Far galaxies shine in the dark. Yes, there are three. No, there is nothing.
The first image is brighter than the second one. Compare both images and say what is different between them.
red green blue yellow orange black white grey brown left right above below near far big small one two three four five
""".strip().splitlines()  # noqa: E501

# LLaVA-1.5's conversation. BOS is written here, since vLLM adds none to a chat prompt; images stay
# where they were put.
_CHAT_TEMPLATE = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] != 'system' %}{{ message['role'] | upper + ': ' }}{% endif %}
    {%- if message['content'] is string %}{{ message['content'] }}
    {%- elif message['content'] is iterable %}
        {%- for part in message['content'] %}
            {%- if part is string %}{{ part }}
            {%- elif part['type'] == 'text' %}{{ part['text'] }}
            {%- elif part['type'] in ('image', 'image_url') %}{{ '<image>' }}
            {%- endif %}
            {%- if not loop.last %}{{ '\\n' }}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- eos_token if message['role'] == 'assistant' else ' ' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
""".strip()


def write_tokenizer(path: Path, corpus: Sequence[str] = _CORPUS) -> Tokenizer:
    """Write the language model's tokenizer, chat template and generation config; <image> is one
    token.
    """
    tokenizer = _train(corpus, [UNK, BOS, EOS, PAD, IMAGE], f"{BOS} $A")
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": PAD}
    _write(
        path, tokenizer, names | {"extra_special_tokens": {"image_token": IMAGE}}, max_length=4096
    )
    (path / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    write_json(path / "generation_config.json", {"do_sample": False} | special_ids(tokenizer))
    return tokenizer


def write_clip_tokenizer(path: Path, corpus: Sequence[str] = _CORPUS) -> Tokenizer:
    """Write the text encoder's tokenizer: lower case, framed by CLIP's two special tokens."""
    tokenizer = _train(corpus, [CLIP_BOS, CLIP_EOS], f"{CLIP_BOS} $A {CLIP_EOS}", lowercase=True)
    names = {
        "bos_token": CLIP_BOS,
        "eos_token": CLIP_EOS,
        "unk_token": CLIP_EOS,
        "pad_token": CLIP_EOS,
    }
    _write(path, tokenizer, names, max_length=CLIP_LENGTH)
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The language model's special ids under the names that its configs use."""
    return {
        f"{name}_token_id": tokenizer.token_to_id(t)
        for name, t in (("bos", BOS), ("eos", EOS), ("pad", PAD))
    }


def words(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that are a whole word of the corpus with the space before it."""
    known = {
        f"Ġ{word}" for word in re.findall(r"\w+", " ".join(_CORPUS))
    }  # Ġ: the space in byte-level BPE
    return sorted(i for token, i in tokenizer.get_vocab().items() if token in known)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a config file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, tokenizer: Tokenizer, names: dict[str, Any], max_length: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    kind = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "padding_side": "right",
    }
    write_json(path / "tokenizer_config.json", kind | names)


def _train(
    corpus: Sequence[str], special: list[str], frame: str, lowercase: bool = False
) -> Tokenizer:
    """Byte-level BPE over the corpus: any text can be written with it, and common words are one
    token.
    """
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in special if token in frame]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    return tokenizer
