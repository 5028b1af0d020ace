"""Train the testbed's model: `python -m benchmarks.testbed.train`.

It runs on a CPU or a GPU, from fixed seeds, and goes on where it was stopped.

Scenes, then CLIP's two towers, then (tower frozen) projector and language model on all tokens; the
result is a LLaVA-1.5 checkpoint with its CLIP beside it. What it measures is written into the
checkpoint's model card.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import language, towers
from .card import model_card
from .data import Pictures, pixels
from .export import TEXT_ENCODER, load, save, save_clip, tokenizers
from .fit import adamw, fit
from .scenes import PATCHES


@dataclass
class Recipe:
    """What a run depends on; the defaults made the shipped weights."""

    seed: int = 0
    pictures: int = 20_000
    tower_steps: int = 2400
    tower_batch: int = 32
    tower_rate: float = 1.5e-3
    reader_steps: int = 14_000
    reader_batch: int = 8
    reader_rate: float = 2e-3
    checked: int = 500  # scenes of the validation split that gates and accuracy are measured on
    plain: bool = False  # only a tower, by [CLS] alone: similarity of patches comes out inverted


MINIATURE = Recipe(
    pictures=400, tower_steps=40, tower_batch=16, reader_steps=120, reader_batch=4, checked=40
)
PLAIN = Recipe(pictures=4000, tower_steps=1000, tower_batch=8, plain=True)
GATES = {"cls_attention": 0.65, "relevance": 0.8}


def train(
    recipe: Recipe, output: Path, work: Path, device: str, workers: int = 0, eager: bool = False
) -> dict[str, Any]:
    """Run all stages that `work` does not hold yet; returns what the card reports. RuntimeError at
    a failed gate.
    """
    work.mkdir(parents=True, exist_ok=True)
    _check_same(recipe, work)
    wording, clip_tokenizer = tokenizers(output)
    data = Pictures.of("train", recipe.pictures, work)
    held_out = Pictures.of("validation", recipe.checked, work)

    clip = towers.build(clip_tokenizer, recipe.seed).to(device)
    hints = torch.nn.Linear(towers.WIDTH, sum(towers.HINTS.values())).to(device)

    def draw(step: int) -> towers.Batch:
        random = np.random.default_rng([recipe.seed, 1, step])
        picks = random.integers(0, recipe.pictures, recipe.tower_batch)
        return towers.draw(clip_tokenizer, data, picks, random, recipe.plain)

    def loss(batch: towers.Batch) -> Tensor:
        return towers.loss(clip, hints, batch, recipe.plain)

    both = torch.nn.ModuleList([clip, hints])
    optimizers = [adamw(list(both.parameters()), recipe.tower_rate)]
    state = work / "towers.pt"
    seconds = {
        "towers": fit(
            both, optimizers, draw, loss, recipe.tower_steps, state, "towers", workers=workers
        )
    }
    clip.eval().requires_grad_(False)
    report: dict[str, Any] = {
        "recipe": asdict(recipe),
        "gates": towers.gates(clip, clip_tokenizer, held_out),
    }
    print("AUC:", "  ".join(f"{name} {value:.3f}" for name, value in report["gates"].items()))
    sign = 1 if report["gates"]["relevance"] >= 0.5 else -1
    save_clip(output / TEXT_ENCODER, clip, sign)
    if not recipe.plain:
        reader = language.Reader(towers.WIDTH, wording.tokenizer.get_vocab_size(), recipe.seed).to(
            device
        )
        seconds["reader"] = _train_reader(
            recipe, reader, wording, clip, data, work, device, workers, eager
        )
        save(output, clip, reader, wording)
        # Measured on what was saved, in half precision as it is.
        clip, reader, wording, _ = load(output)
        features = _features(clip, held_out, None, "cpu")
        report["parameters"] = sum(p.numel() for part in (clip, reader) for p in part.parameters())
        report["accuracy"] = language.accuracy(reader, wording, features, held_out.scenes)
        print(
            "accuracy:",
            "  ".join(
                f"{family} {100 * value:.1f}" for family, value in report["accuracy"].items()
            ),
        )
    where = device if device == "cpu" else torch.cuda.get_device_name(device)
    report |= {
        "seconds": seconds,
        "sign": sign,
        "device": where,
        "threads": torch.get_num_threads(),
    }
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    if not recipe.plain:
        (output / "README.md").write_text(model_card(report))
    return report


def _train_reader(
    recipe: Recipe,
    reader: language.Reader,
    wording: language.Wording,
    clip: Any,
    data: Pictures,
    work: Path,
    device: str,
    workers: int,
    eager: bool,
) -> float:
    features = _features(clip, data, work / "features.pt", device)
    matrices = [p for name, p in reader.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in reader.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    # Muon for the matrices, as its authors advise; embeddings, norms and projector by AdamW.
    muon = torch.optim.Muon(
        matrices, lr=recipe.reader_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    on_gpu = device != "cpu"
    if on_gpu:
        features = features.to(device)
    # A step of so small a model is all launches: on a GPU its shapes are fixed and it is replayed
    # as a graph.
    length = language.QUESTIONS_PER_PICTURE * language.LONGEST if on_gpu else 0
    look: Any = language.Loss(reader, wording).to(device)

    def draw(step: int) -> tuple[Tensor, language.Packed]:
        random = np.random.default_rng([recipe.seed, 2, step])
        picks = random.integers(0, recipe.pictures, recipe.reader_batch)
        late = 3 * step >= 2 * recipe.reader_steps
        asked = [language.draw(data.scenes[index], random, late=late) for index in picks]
        return torch.from_numpy(picks), language.pack(wording, asked, length)

    def inputs(batch: tuple[Tensor, language.Packed]) -> tuple[Tensor, ...]:
        picks, asked = batch
        return features[picks.to(features.device)].float(), *(part.to(device) for part in asked)

    if on_gpu and not eager:
        look = torch.cuda.make_graphed_callables(look, inputs(draw(0)))

    def loss(batch: tuple[Tensor, language.Packed]) -> Tensor:
        return look(*inputs(batch))

    optimizers, state = [muon, adamw(rest, recipe.reader_rate)], work / "reader.pt"
    return fit(
        reader, optimizers, draw, loss, recipe.reader_steps, state, "reader", workers=workers
    )


@torch.no_grad()
def _features(clip: Any, data: Pictures, file: Path | None, device: str) -> Tensor:
    """Penultimate patch rows of every picture, (pictures, 144, width), in half precision."""
    if file is not None and file.exists():
        return torch.load(file, weights_only=True, mmap=True)
    clip = clip.to(device)
    rows = torch.empty(len(data.scenes), PATCHES, towers.WIDTH, dtype=torch.float16)
    for start in tqdm(range(0, len(rows), 100), desc="features", unit="batch", mininterval=1):
        inside = pixels(data.images[start : start + 100], device)
        states = clip.vision_model(pixel_values=inside, output_hidden_states=True).hidden_states
        rows[start : start + 100] = states[-2][:, 1:].half().cpu()
    if file is not None:
        unfinished = file.with_suffix(".part")
        torch.save(rows, unfinished)
        unfinished.rename(file)
    return rows


def _check_same(recipe: Recipe, work: Path) -> None:
    """A work folder belongs to one recipe: going on from another's states would mix two runs."""
    file, mine = work / "recipe.json", json.dumps(asdict(recipe), sort_keys=True)
    if file.exists() and file.read_text() != mine:
        raise ValueError(
            f"{work} holds a run with another recipe ({file.read_text()}); give another --work"
        )
    file.write_text(mine)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status, 1 where a gate or the recipe was not met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testbed.train", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("out/testbed"), help="folder of the checkpoint"
    )
    parser.add_argument(
        "--work", type=Path, help="folder of states to resume from (default: OUTPUT-work)"
    )
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on")
    parser.add_argument(
        "--miniature", action="store_true", help="two minutes, to prove the script; learns little"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument(
        "--workers", type=int, help="processes that draw batches (default: 0, on a GPU 4)"
    )
    parser.add_argument(
        "--eager", action="store_true", help="on a GPU: no replay of the reader's step as a graph"
    )
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        if field.name == "plain":
            parser.add_argument(
                flag, action="store_true", help="two minutes: only a tower, inverted"
            )
        else:
            parser.add_argument(flag, type=type(field.default), help=f"default: {field.default}")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    workers = args.workers if args.workers is not None else 0 if args.device == "cpu" else 4
    recipe = Recipe(**asdict(MINIATURE if args.miniature else PLAIN if args.plain else Recipe()))
    for field in fields(Recipe):
        if (value := getattr(args, field.name)) not in (None, False):
            setattr(recipe, field.name, value)
    work = args.work or args.output.with_name(args.output.name + "-work")
    if args.fresh:
        shutil.rmtree(work, ignore_errors=True)
    try:
        report = train(recipe, args.output, work, args.device, workers, args.eager)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failed = {
        name: report["gates"][name]
        for name, least in GATES.items()
        if report["gates"][name] < least
    }
    if failed and not (args.miniature or recipe.plain):
        print(f"error: the tower misses its gates {GATES}: {failed}", file=sys.stderr)
        return 1
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
