"""Small random checkpoints of the model families that vLLM knows, by transformers' own classes of
configuration, processor and tokenizer.

`build(name, folder)` writes one; `tests/conftest.py` builds each once per session, outside of the
repository. A family is one function in BUILDERS: it writes into an empty folder and needs no
network. Sizes are those that make all cases appear in few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.testbed import build_checkpoint

IMAGE = "<image>"
TILE, PATCH = 84, 14  # pixels: 6 x 6 patches per tile
SIDE = TILE // PATCH
# (height, width) of the grids of tiles, as published: 2 tiles, 4, and 3 in a row or a column.
PINPOINTS = [[rows * TILE, columns * TILE] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1))]
PINPOINTS.append([TILE, 3 * TILE])


def llava_next(folder: Path) -> None:
    """LLaVA-NeXT on a CLIP tower, whose text side lies under text_encoder/.

    The weights are those of the testbed's LLaVA-1.5 of the same sizes, with a newline.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        LlavaNextConfig,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    build_checkpoint(folder, image_size=TILE, patch_size=PATCH)
    plain = AutoConfig.from_pretrained(folder)
    config = LlavaNextConfig(
        vision_config=plain.vision_config,
        text_config=plain.text_config,
        image_token_index=plain.image_token_index,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        architectures=["LlavaNextForConditionalGeneration"],
        dtype="float32",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for old in ("preprocessor_config.json", "processor_config.json"):
        (folder / old).unlink()
    config.save_pretrained(folder)
    LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    width = config.text_config.hidden_size
    weights["image_newline"] = torch.randn(width, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BUILDERS: dict[str, Callable[[Path], None]] = {"llava_next": llava_next}


def build(name: str, folder: str | Path) -> Path:
    """Write the checkpoint of a family into an empty folder, and return that."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    BUILDERS[name](folder)
    return folder
