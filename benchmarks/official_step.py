"""A step of our default against the arithmetic of the official algorithm: three student passes and two passes of an
online teacher an anchor.

python benchmarks/official_step.py [--teacher resnet152] [--student mobilenetv3_large_100] [--size 224] [--batch 8]
[--steps 3] [--json FILE]

The official side is ours too (variant official, online teacher), written from the paper's description; both train by
`distill.distill` from pixels in memory, so that only the arithmetic differs: the official loader is not counted. Time
an anchor: CPU seconds, or wall seconds on a GPU.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from step import DIM, clocks, distill_recipe
from synthetic import store_of

from bingo_compress.features import extract, targets
from bingo_compress.features.bagging import knn
from bingo_compress.models.encoder import build
from bingo_compress.runtime.machine import keep_memory
from bingo_compress.training import loop
from bingo_compress.training.loader import Lessons
from bingo_compress.training.plan import TeacherShape, make_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet152")
    parser.add_argument("--student", default="mobilenetv3_large_100")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8, help="anchors")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = 0 if device.type == "cuda" else 1
    count = max(64, chosen.batch)
    store = store_of(count, chosen.size, device)
    teacher = build(chosen.teacher, chosen.size, "random", "--teacher").to(device)
    with torch.inference_mode():
        start = time.perf_counter() if clock == 0 else time.process_time()
        found = torch.cat([extract.store_features(teacher, store, rows, device) for rows in torch.arange(32).split(8)])
        embedding = ((time.perf_counter() if clock == 0 else time.process_time()) - start) / 32
    space = targets.target_space(found, "pca", min(DIM, 16))
    dim = space(found[:1]).shape[1]
    views = torch.randn(count, 4, teacher.width)
    bags = knn(torch.randn(count, 8), 5)[0]

    def seconds(steps: int, **settings: object) -> float:
        recipe = distill_recipe(
            {
                "student": chosen.student,
                "image_size": chosen.size,
                "batch_size": chosen.batch,
                "epochs": 1000,
                "student_weights": "random",
                **settings,
            }
        )
        if recipe.views == "online":
            source: targets.TargetOf = targets.OnlineTargets(teacher, store, space, recipe.crop_scale_min, device)
        else:
            source = targets.StoredTargets(views, space, device, mean=True)
        student = build(chosen.student, chosen.size, "random", "--student")
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            files = (Path(folder) / "metrics.jsonl", Path(folder) / "checkpoint.safetensors")
            start = clocks(device)[clock]
            plan = make_plan(recipe, count, device, TeacherShape(dim, dim, projected=True))
            loop.distill(plan, student, Lessons(store, torch.arange(count), bags, source), *files, stop_after=steps)
            return clocks(device)[clock] - start

    spent: dict[str, list[float]] = {"official": [], "ours": []}
    for _ in range(chosen.rounds):  # in turn, so that a busy moment hits both
        for name, settings in (("official", {"variant": "official", "views": "online"}), ("ours", {})):
            short, long = seconds(2, **settings), seconds(2 + chosen.steps, **settings)
            spent[name].append((long - short) / chosen.steps / chosen.batch)
    official, ours = (statistics.median(spent[name]) for name in ("official", "ours"))
    with_embedding = ours + 5 * embedding / 200
    unit = "seconds" if clock == 0 else "CPU seconds"
    print(
        f"{chosen.teacher} -> {chosen.student}, {chosen.size} px, {chosen.batch} anchors a step; {unit} an anchor,"
        f" median of {chosen.rounds}"
    )
    print(f"{'':<52}{'seconds':>10}{'official/ours':>16}")
    print(f"{'official: 3 student, 2 teacher passes':<52}{official:>10.4f}")
    print(f"{'ours: 2 student passes, stored targets':<52}{ours:>10.4f}{official / ours:>16.2f}")
    print(
        f"{'ours with 5 teacher passes an image over 200 epochs':<52}{with_embedding:>10.4f}"
        f"{official / with_embedding:>16.2f}"
    )
    if chosen.json:
        facts = {key: value for key, value in vars(chosen).items() if key != "json"}
        rows = {
            "official_s": official,
            "ours_s": ours,
            "with_embedding_s": with_embedding,
            "ratio": official / ours,
            "ratio_embedded": official / with_embedding,
        }
        chosen.json.write_text(json.dumps({**facts, "device": str(device), **rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
