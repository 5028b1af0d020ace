"""What the language model's second layer says about each visual token: the input of methods that
probe it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .language import HEADS, WIDTH, Reader, Wording

PROBES = ("fastv", "sparsevlm", "dart", "ivc")
# of four: the second layer, where FastV and DART look; IVC-Prune looks at the middle, which it is
# too
_LAYER = 1


def probe(
    name: str, reader: Reader, wording: Wording, visual: Tensor, questions: Sequence[str]
) -> Tensor:
    """The probe that method `name` documents, for projected rows (B, N, D) and questions of equal
    length.

    Errors: ValueError for a method that reads no probe.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    if name not in PROBES:
        raise ValueError(f"method {name!r} reads no probe; those that do: {', '.join(PROBES)}")
    llama: Any = reader.llama.model
    device = visual.device
    ids = torch.tensor([wording.question(question) for question in questions], device=device)
    asked = torch.tensor(
        [len(wording.tokenizer.encode(q, add_special_tokens=False).ids) for q in questions]
    )
    start = llama.embed_tokens(torch.tensor(wording.head, device=device)).expand(len(ids), -1, -1)
    states = llama(
        inputs_embeds=torch.cat([start, visual, llama.embed_tokens(ids)], 1),
        output_hidden_states=True,
    )
    hidden = states.hidden_states[_LAYER]
    block = llama.layers[_LAYER]
    normed = block.input_layernorm(hidden)

    def heads(linear: Any) -> Tensor:
        return linear(normed).unflatten(2, (HEADS, -1)).transpose(1, 2)

    query, key, value = (heads(getattr(block.self_attn, f"{kind}_proj")) for kind in "qkv")
    turns = llama.rotary_emb(hidden, torch.arange(hidden.shape[1], device=device)[None])
    query, key = apply_rotary_pos_emb(query, key, *turns)
    first, n = len(wording.head), visual.shape[1]
    seen, text = slice(first, first + n), first + n
    if name == "dart":
        return key[:, :, seen].transpose(1, 2).flatten(2)
    scale = (WIDTH // HEADS) ** -0.5
    if name == "ivc":
        values = value[:, :, first:]
        return torch.softmax(values[:, :, :n] @ values.transpose(-1, -2) * scale, dim=2).mean(1)
    causal = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=device).tril()
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~causal, -torch.inf)
    attention = torch.softmax(scores, -1).mean(1)
    if name == "fastv":
        return attention[:, -1, seen]
    question = slice(text + 1, text + 1 + int(asked.min()))  # after the line break
    return attention[:, question, seen].transpose(1, 2)
