"""Reading and voxelizing a 10-sweep cloud of 272,000 points against one forward pass of ``centerpoint:tiny``.

The cloud is a nuScenes-like key frame and 9 earlier sweeps, each a file of 27,200 points, named by an info file and
merged with ego motion and time lag. The forward pass is that of the network alone, on the pillars of that cloud. The
rounds are interleaved and the best of each is kept, so that a busy machine spoils all alike.

Target: reading and voxelizing takes less time than the forward pass.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cp_debug.recipes.centerpoint.model import BackboneNeckHead, decorate, scatter, voxelize
from cp_debug.recipes.centerpoint.recipe import CenterPointModel
from cp_debug.recipes.centerpoint.scenes import Lidar, generate_scene

SWEEPS, POINTS = 10, 27_200


def write_data(folder: Path) -> Path:
    """Ten files and their info file. The car drives 0.5 m ahead and turns by 1° from one sweep to the next."""
    lidar = Lidar(columns=1600, max_range=70.0, sweeps=(0.0,))
    entries = []
    for number in range(SWEEPS):
        points = generate_scene(number, extent=50.0, lidar=lidar).points
        points[:, :3] += np.where(np.abs(points[:, :3]) < 1, 2, 0)  # none is removed for being on the car itself
        assert len(points) >= POINTS
        points[:POINTS].tofile(folder / f"{number}.pcd.bin")
        pose = np.eye(4)
        angle = np.deg2rad(number)
        pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        pose[0, 3] = 0.5 * number
        lidar_points = {"lidar_path": f"{number}.pcd.bin", "num_pts_feats": 5, "lidar2sensor": pose}
        entries.append({"timestamp": -0.05 * number, "lidar_points": lidar_points})
    path = folder / "infos.pkl"
    content = {"metainfo": {"classes": ["car"]}, "data_list": [{**entries[0], "lidar_sweeps": entries[1:]}]}
    path.write_bytes(pickle.dumps(content))
    return path


def measure(rounds: int) -> dict[str, Any]:
    """Everything that is printed."""
    model = CenterPointModel("tiny")
    config, network = model.config, model.network
    after_scatter = BackboneNeckHead(network).eval()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        data = model.data(write_data(Path(folder)), 1)
        points = torch.from_numpy(data.sample(0).arrays["points"])
        pillars = voxelize(points, config)

        def forward() -> None:
            features = network.pts_voxel_encoder(decorate(pillars, config))
            after_scatter(scatter(features, pillars.coors, config.grid))

        methods: dict[str, Callable[[], Any]] = {
            "read and merge": lambda: data.sample(0),
            "voxelize": lambda: voxelize(points, config),
            "forward": forward,
        }
        seconds = dict.fromkeys(methods, float("inf"))
        for _ in range(rounds):
            for name, method in methods.items():
                start = time.perf_counter()
                method()
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    ratio = (seconds["read and merge"] + seconds["voxelize"]) / seconds["forward"]
    return {
        "points": len(points),
        "pillars": len(pillars.coors),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "ratio": ratio,
        "met": ratio < 1,
    }


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="how often each has its turn (default 20)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    result = measure(options.rounds)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    table = Table("step", "ms", title=f"{result['points']:,} points, {result['pillars']:,} pillars")
    for name, value in result["seconds"].items():
        table.add_row(name, f"{1000 * value:.1f}")
    console = Console()
    console.print(table)
    verdict = "met" if result["met"] else "MISSED"
    console.print(f"reading and voxelizing: {result['ratio']:.2f} forward passes (target below 1): {verdict}")


if __name__ == "__main__":
    main()
