"""Relevance of patches to the question: FSR's equation (2), their cosines with its embedding.

Two text sides: the CLIP text encoder that was trained with the tower (patches enter its joint space
through the tower's own post layernorm and visual projection, as CDPruner does), or the language
model's input embeddings where there is none. Returned maps are always higher = more relevant.
OpenAI's CLIP towers have it the other way round for single patches (CDPruner's and TRIM's code
negate as well), so the sign is settled here and no method needs to know.
"""

import re
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

_OPENAI_CACHE_FOLDER = re.compile(r"models--openai--clip-vit-.+")

# (image_size, patch_size, hidden_size, num_hidden_layers) of the published OpenAI towers.
_PARTNERS = {
    (336, 14, 1024, 24): "openai/clip-vit-large-patch14-336",
    (224, 14, 1024, 24): "openai/clip-vit-large-patch14",
    (224, 16, 768, 12): "openai/clip-vit-base-patch16",
    (224, 32, 768, 12): "openai/clip-vit-base-patch32",
}


def wrap_chunks(ids: Sequence[int], bos: int, eos: int, max_length: int = 77) -> list[list[int]]:
    """Cut token ids into pieces the text encoder can hold, each wrapped in BOS and EOS.

    The ids have no specials. CLIP pools at EOS, so a piece without one would be read at a
    meaningless place. No text: one chunk [bos, eos].

    Shapes: chunks of at most max_length ids, all but the last full.
    Errors: ValueError when max_length leaves no room for content.
    """
    room = max_length - 2
    if room < 1:
        raise ValueError(f"max_length must be at least 3, got {max_length}")
    starts = range(0, max(len(ids), 1), room)
    return [[bos, *ids[start : start + room], eos] for start in starts]


def pool_chunks(embeds: Tensor) -> Tensor:
    """One unit vector for a text of several chunks: the mean of their unit vectors, normalised.

    Shapes: (M, D) -> (D,) float32.
    Errors: ValueError for another shape or no chunk.
    """
    if embeds.ndim != 2 or embeds.shape[0] < 1:
        raise ValueError(
            "chunk embeddings must be (chunks, dim) with at least one chunk, "
            f"got {tuple(embeds.shape)}"
        )
    return F.normalize(F.normalize(embeds.float(), dim=-1).mean(0), dim=-1)


def clip_relevance(
    features: Tensor,
    text: Tensor,
    post_layernorm: nn.LayerNorm,
    visual_projection: nn.Linear,
    sign: int,
) -> Tensor:
    """Cosine of patches and text in CLIP's joint space, times the tower's sign.

    FSR's equation (2) in CDPruner's space. Layernorm and projection were trained on the last
    layer's [CLS] alone; no nearer joint space for patches exists.

    Shapes: features (B, N, Dv) of the tower, text (B, Dt) or (Dt,) -> (B, N) float32.
    Errors: ValueError for other shapes or a sign other than 1 and -1.
    """
    _check_sign(sign)
    _check_features(features, post_layernorm.normalized_shape[-1])
    # In float32 although the modules may be half precision: a cosine's third digit decides which
    # patch is kept.
    normed = F.layer_norm(
        features.float(),
        post_layernorm.normalized_shape,
        None if post_layernorm.weight is None else post_layernorm.weight.float(),
        None if post_layernorm.bias is None else post_layernorm.bias.float(),
        post_layernorm.eps,
    )
    bias = visual_projection.bias
    joint = F.linear(
        normed, visual_projection.weight.float(), None if bias is None else bias.float()
    )
    return sign * _cosine(joint, text)


def embedding_relevance(features: Tensor, text: Tensor, sign: int = 1) -> Tensor:
    """Plain cosine of patches and text in one space, such as the language model's embeddings.

    Shapes: features (B, N, D), text (B, D) or (D,) -> (B, N) float32.
    Errors: ValueError for other shapes or a sign other than 1 and -1.
    """
    _check_sign(sign)
    _check_features(features, features.shape[-1])
    return sign * _cosine(features.float(), text)


def relevance_sign(setting: str | int, encoder_name: str | None, config_sign: int | None) -> int:
    """The sign that makes a tower's patch-text cosine point at what the question means.

    A setting of 1 or -1 is obeyed. "auto": what the encoder's config.json states
    (`fsr_relevance_sign`), else -1 for OpenAI's CLIP towers, known by name (hub name, folder
    openai/clip-vit-*, or hub cache path), else 1.

    Errors: ValueError for any other setting or stated sign.
    """
    if setting in ("1", "-1"):
        setting = int(setting)
    if setting != "auto":
        if not _is_sign(setting):
            raise ValueError(f'the relevance sign must be "auto", 1 or -1, got {setting!r}')
        return int(setting)
    if config_sign is not None:
        if not _is_sign(config_sign):
            raise ValueError(
                "fsr_relevance_sign in the text encoder's config must be 1 or -1, "
                f"got {config_sign!r}"
            )
        return int(config_sign)
    return -1 if _is_openai_clip(encoder_name) else 1


def known_partner(vision_config: object) -> str | None:
    """Hub name of the CLIP whose text side was trained with such a tower; None if not known.

    Takes a mapping or an object with image_size, patch_size, hidden_size and num_hidden_layers.
    SigLIP and OpenCLIP towers come in the same sizes, so a model type or activation that is not
    OpenAI's rules the partner out.
    """

    def get(name: str) -> object:
        if isinstance(vision_config, Mapping):
            return vision_config.get(name)
        return getattr(vision_config, name, None)

    openai_type = get("model_type") in (None, "clip_vision_model", "clip")
    if not openai_type or get("hidden_act") not in (None, "quick_gelu"):
        return None
    sizes = (get("image_size"), get("patch_size"), get("hidden_size"), get("num_hidden_layers"))
    # Equality instead of a look-up: some configs give a size as a list, which cannot be a key.
    return next((name for known, name in _PARTNERS.items() if known == sizes), None)


def _is_openai_clip(name: str | None) -> bool:
    parts = [part for part in re.split(r"[/\\]+", (name or "").lower()) if part]
    if any(_OPENAI_CACHE_FOLDER.fullmatch(part) for part in parts):
        return True
    return len(parts) >= 2 and parts[-2] == "openai" and parts[-1].startswith("clip-vit-")


def _is_sign(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in (1, -1)


def _check_sign(sign: int) -> None:
    if not _is_sign(sign):
        raise ValueError(f"sign must be 1 or -1, got {sign!r}")


def _check_features(features: Tensor, width: int) -> None:
    if features.ndim != 3 or features.shape[2] != width:
        raise ValueError(f"features must be (batch, tokens, {width}), got {tuple(features.shape)}")


def _cosine(features: Tensor, text: Tensor) -> Tensor:
    """(B, N, D) float32 against (B, D) or (D,) -> (B, N)."""
    batch, _, width = features.shape
    if text.shape not in ((width,), (batch, width)):
        raise ValueError(f"text must be ({width},) or ({batch}, {width}), got {tuple(text.shape)}")
    unit = F.normalize(text.float().to(features.device), dim=-1).expand(batch, width)
    return (F.normalize(features, dim=-1) @ unit.unsqueeze(-1)).squeeze(-1)
