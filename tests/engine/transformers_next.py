"""LLaVA-NeXT by transformers in eager mode: what pruned rows should be, and what they should say.

Order and signals of rows come from transformers' own packing. The budget is dealt out to the tiles
one token at a time, the base tile first, as the rule is stated rather than as the plugin works.
"""

import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    LlavaNextForConditionalGeneration,
)

import fsr_vllm

from .families import picture


class Reference:
    """One checkpoint; images are parts NAME@WxH."""

    def __init__(self, folder):
        load = {"attn_implementation": "eager", "dtype": torch.float32}
        self.model = LlavaNextForConditionalGeneration.from_pretrained(folder, **load).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.clip = CLIPModel.from_pretrained(folder / "text_encoder", **load).eval()
        self.words = AutoTokenizer.from_pretrained(folder / "text_encoder")
        self.token = self.model.config.image_token_id
        self._seen = {}

    def total(self, part):
        """N by transformers' processor."""
        done = self.processor(images=[picture(part)], text=["<image>"], return_tensors="pt")
        return int((done["input_ids"] == self.token).sum())

    @torch.no_grad()
    def image(self, part):
        """Rows (N, D), tiles (N,) with -1 for newlines, and signals (N, ...) by name."""
        if part in self._seen:
            return self._seen[part]
        done = self.processor.image_processor([picture(part)], return_tensors="pt")
        pixels, sizes = done["pixel_values"][0], done["image_sizes"]
        model = self.model.model

        def pack(values, newline=0.0):
            width = values.shape[-1]
            line = torch.full((width,), newline)
            return model.pack_image_features([values], sizes, "default", image_newline=line)[0][0]

        seen = model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
        maps, hidden = seen.attentions, seen.hidden_states[-2][:, 1:]
        early = round(5 * len(maps) / 24)
        tiles = torch.arange(len(pixels)).view(-1, 1, 1).expand(*hidden.shape[:2], 1).float()
        patches = torch.arange(hidden.shape[1]).view(1, -1, 1).expand_as(tiles).float()
        found = {
            "rows": model.get_image_features(done["pixel_values"], sizes).pooler_output[0],
            "tiles": pack(tiles, -1)[:, 0].long(),
            "patch": pack(patches, -1)[:, 0].long(),
            "saliency": pack(maps[-2].mean(1)[:, 0, 1:, None])[:, 0],
            "shallow_saliency@5": pack(maps[early].mean(1)[:, 0, 1:, None])[:, 0],
            "received": pack(maps[-2].mean((1, 2))[:, 1:, None])[:, 0],
            "metric": pack(hidden),
            "joint": pack(
                self.clip.visual_projection(self.clip.vision_model.post_layernorm(hidden))
            ),
        }
        self._seen[part] = found
        return found

    @torch.no_grad()
    def relevance(self, part, question):
        """Cosine of each row and the question in CLIP's joint space, (N,)."""
        text = self.clip.get_text_features(**self.words(question.lower(), return_tensors="pt"))
        return torch.cosine_similarity(
            self.image(part)["joint"], getattr(text, "pooler_output", text)
        )

    def kept(self, part, keep, method="fsr", question="", joint=False):
        """The rows (K, D) that are left of an image."""
        image = self.image(part)
        rows, tiles = image["rows"], image["tiles"]
        if keep >= len(rows):
            return rows
        groups = [(tiles == tile).nonzero()[:, 0] for tile in range(int(tiles.max()) + 1)]
        groups = [torch.cat(groups).sort().values] if joint else groups
        given = deal(keep, [len(group) for group in groups])
        chosen = {}
        for group, count in zip(groups, given, strict=True):
            if not count:
                continue
            signals = {"saliency": image["saliency"][group]}
            if question:
                signals["relevance"] = self.relevance(part, question)[group]
            if method == "fastervlm":
                places = signals["saliency"].argsort(descending=True, stable=True)[:count]
                chosen |= {int(group[place]): rows[group[place]] for place in places}
            elif method == "relevance":
                places = signals["relevance"].argsort(descending=True, stable=True)[:count]
                chosen |= {int(group[place]): rows[group[place]] for place in places}
            else:
                served = {"method": method, "preset": "served"}
                out = fsr_vllm.prune(rows[group], budget=count, **signals, **served)
                chosen |= dict(zip(group[out.indices].tolist(), out.tokens, strict=True))
        spare = (tiles < 0).nonzero()[:, 0].tolist()[: keep - len(chosen)]
        chosen |= {place: rows[place] for place in spare}
        assert len(chosen) == keep
        return torch.stack([chosen[place] for place in sorted(chosen)])

    @torch.no_grad()
    def answer(self, ids, rows, count=6):
        """Greedy tokens and their logprobs after a prompt whose placeholders are these rows."""
        head, embed = self.model.lm_head, self.model.get_input_embeddings()
        inputs = embed(torch.tensor([ids])).clone()
        if len(rows):
            inputs[0, torch.tensor(ids) == self.token] = torch.cat(rows)
        tokens, logprobs = [], []
        for _ in range(count):
            hidden = self.model.model.language_model(inputs_embeds=inputs, use_cache=False)
            scores = head(hidden.last_hidden_state[0, -1]).log_softmax(-1)
            tokens.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
            inputs = torch.cat([inputs, embed(torch.tensor([tokens[-1:]]))], 1)
        return tokens, logprobs


def deal(keep, sizes):
    """A budget dealt out one by one, round after round, to whoever has room."""
    given, keep = [0] * len(sizes), min(keep, sum(sizes))
    while keep:
        for place, size in enumerate(sizes):
            if keep and given[place] < size:
                given[place] += 1
                keep -= 1
    return given
