"""Train ``centerpoint:tiny`` on synthetic scenes, or score a checkpoint on the held-out ones.

python benchmarks/train_tiny.py --out tiny.safetensors
python benchmarks/train_tiny.py --evaluate tiny.safetensors
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file

from cp_debug.detection.metrics import THRESHOLDS
from cp_debug.errors import InputError
from cp_debug.files import complete_path
from cp_debug.quantization.qat_centerpoint import Example, evaluate
from cp_debug.recipes.centerpoint.config import TINY, CenterPointConfig
from cp_debug.recipes.centerpoint.loss import centerpoint_loss, make_targets
from cp_debug.recipes.centerpoint.model import CenterPoint, build_model
from cp_debug.recipes.centerpoint.scenes import HELD_OUT_SEED, Scene, generate_scene
from cp_debug.recipes.checkpoint import load_checkpoint


def generate(seeds: Sequence[int], console: Console) -> list[Scene]:
    """The scenes of these seeds, on all cores."""
    with ProcessPoolExecutor() as pool:
        scenes = pool.map(generate_scene, seeds, chunksize=4)
        return list(track(scenes, "scenes", total=len(seeds), console=console))


def train(
    model: CenterPoint,
    examples: Sequence[Example],
    *,
    epochs: int,
    batch: int,
    rate: float,
    seed: int,
    console: Console,
) -> None:
    """Train ``model`` in place, on the device of both; it ends in eval mode.

    AdamW with a one-cycle schedule whose highest learning rate is ``rate``; order and augmentation are drawn from
    ``seed``.
    """
    model.train()
    steps = math.ceil(len(examples) / batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=epochs * steps)
    rng = np.random.default_rng(seed)
    for epoch in range(1, epochs + 1):
        batches = np.array_split(rng.permutation(len(examples)), steps)
        total = 0.0
        for chosen in track(batches, f"epoch {epoch:2}/{epochs}", console=console):
            scenes = [examples[index].augmented(rng) for index in chosen]
            targets = make_targets([scene.boxes for scene in scenes], [scene.labels for scene in scenes], model.config)
            loss = centerpoint_loss(model([scene.points for scene in scenes]), targets).total
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 35)
            optimizer.step()
            schedule.step()
            total += loss.item()
        console.print(f"epoch {epoch:2}/{epochs}: mean loss {total / steps:.3f}")
    model.eval()


def score_table(precisions: np.ndarray, config: CenterPointConfig, scenes: int) -> Table:
    """Table of AP by class and threshold, from ``precisions`` [C, 4]."""
    table = Table("class", *(f"AP {threshold} m" for threshold in THRESHOLDS), "mean")
    table.title = f"{scenes} held-out scenes: mAP {precisions.mean():.3f}"
    for name, row in zip(config.class_names, precisions, strict=True):
        table.add_row(name, *(f"{value:.3f}" for value in (*row, row.mean())))
    return table


def save(model: CenterPoint, path: Path, metadata: dict[str, str]) -> None:
    """Weights with string metadata; the file appears under its name when it is complete."""
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    with complete_path(path) as partial:
        save_file(state, partial, metadata)


def main(
    out: Annotated[Path | None, typer.Option(help="Train, and write the weights here.")] = None,
    evaluated: Annotated[Path | None, typer.Option("--evaluate", help="Score this checkpoint instead.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    scenes: Annotated[int, typer.Option(min=1, max=HELD_OUT_SEED, help="Training scenes.")] = 1000,
    held_out: Annotated[int, typer.Option(min=1, help="Scenes to score on.")] = 50,
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    batch: Annotated[int, typer.Option(min=1)] = 2,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-3,
    seed: Annotated[int, typer.Option(help="Of the initial weights, the order and the augmentation.")] = 0,
) -> None:
    """Train centerpoint:tiny on synthetic LiDAR scenes and score it on held-out ones, or only score."""
    if (out is None) == (evaluated is None):
        raise typer.BadParameter("give either --out or --evaluate")
    if out and not out.parent.is_dir():
        raise typer.BadParameter(f"--out {out}: no such folder")
    model = build_model(TINY, seed=seed)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"--device {device}: {str(error).splitlines()[0]}") from None
    if evaluated:
        try:
            load_checkpoint(model, evaluated)
        except InputError as error:
            raise typer.BadParameter(str(error)) from None
    console = Console()
    start = time.perf_counter()
    held_out_scenes = generate(range(HELD_OUT_SEED, HELD_OUT_SEED + held_out), console)
    if out:
        examples = [Example.of(scene, device) for scene in generate(range(scenes), console)]
        train(model, examples, epochs=epochs, batch=batch, rate=rate, seed=seed, console=console)
    precisions = evaluate(model, [Example.of(scene, device) for scene in held_out_scenes])
    console.print(score_table(precisions, TINY, held_out))
    console.print(f"{time.perf_counter() - start:.0f} s")
    if out:
        recipe = {"scenes": scenes, "epochs": epochs, "batch": batch, "rate": rate, "seed": seed, "device": device}
        by_class = dict(zip(TINY.class_names, precisions.mean(axis=1).round(4).tolist(), strict=True))
        metadata = {
            "model": "centerpoint:tiny",
            "command": f"python benchmarks/train_tiny.py --out {out.name} --device {device}",
            "training": json.dumps(recipe),
            "versions": f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
            "seconds": f"{time.perf_counter() - start:.0f}",
            "held_out": f"scenes {HELD_OUT_SEED} to {HELD_OUT_SEED + held_out - 1}",
            "map": f"{precisions.mean():.4f}",
            "class_map": json.dumps(by_class),
        }
        save(model, out, metadata)


if __name__ == "__main__":
    typer.run(main)
