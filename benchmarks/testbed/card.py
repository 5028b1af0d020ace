"""The model card of a trained testbed checkpoint."""

from __future__ import annotations

from typing import Any

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# The testbed's model: a small LLaVA-1.5

{parameters:.2f} million parameters, half precision: a CLIP tower with [CLS] (96 x 96 pixels, 8-pixel patches, 144
visual tokens, five layers, the penultimate one is read), a two-layer projector, a Llama of four layers; `text_encoder/`
holds the whole CLIP. vLLM, transformers and fsr_vllm load this folder as it is. `fsr-vllm demo-model` prints its path.

**Data.** Synthetic scenes (`benchmarks/testbed/scenes.py`): coloured shapes, handwritten digits (the UCI set that
scikit-learn carries, CC BY 4.0), drawn textures and parts of photographs that scikit-image carries. Training,
validation and test scenes share no seed, no digit image and no part of a photograph.

**Training.** `{command}`, seed {seed}, {pictures:,} scenes; {device}, {threads} thread(s):
towers {tower_minutes:.0f} min ({tower_steps:,} steps of {tower_batch} pictures), reader {reader_minutes:.0f} min
({reader_steps:,} steps of {reader_batch} pictures with up to 16 questions each). Projector and language model saw all
tokens, always: never a pruned picture.

**Tower**, {checked} validation scenes, mean AUC over patches: penultimate [CLS] attention on objects
{cls_attention:.3f}, similarity of patches and question on what the question is about {relevance:.3f}. Its relevance
sign is {sign:+d} (`fsr_relevance_sign`); OpenAI's CLIP has -1.

**Accuracy**, all 144 tokens, {checked} validation scenes, one question per family and scene where there is one:

| {families} |
|{rule}
| {accuracy} |

**What it cannot do.** Anything else: it knows these questions in these words, in pictures like these, and answers with
one word. It is a testbed: rankings of pruning methods on it say little about large models.
"""  # noqa: E501


def model_card(report: dict[str, Any]) -> str:
    """The card's text from what `train` reports."""
    recipe, defaults = report["recipe"], {"tower_rate", "reader_rate", "plain", "checked"}
    accuracy = report["accuracy"]
    return _CARD.format(
        **{name: value for name, value in recipe.items() if name not in defaults},
        checked=recipe["checked"],
        parameters=report["parameters"] / 1e6,
        command="python -m benchmarks.testbed.train",
        device=report["device"],
        threads=report["threads"],
        tower_minutes=report["seconds"]["towers"] / 60,
        reader_minutes=report["seconds"]["reader"] / 60,
        cls_attention=report["gates"]["cls_attention"],
        relevance=report["gates"]["relevance"],
        sign=report["sign"],
        families=" | ".join(accuracy),
        rule="---|" * len(accuracy),
        accuracy=" | ".join(f"{100 * value:.1f} %" for value in accuracy.values()),
    )
