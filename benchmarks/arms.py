"""Many arms of `compare` at once, above all on one GPU: each is trained and judged by compare's own code.

python benchmarks/arms.py PLAN.yaml [--workers 13] [--seconds 480] [--home FOLDER] [--json FILE]

PLAN.yaml is a list of groups, what matters most first: name, data, labels, test (folders), settings (a recipe's), arms
(as in --methods; teacher, start and random stand for the references) and seeds. Cells, an arm with a seed each, begin
in that order; what has not begun when the time is nearly up is left out, and said. Pixels, the teacher's pass and the
labelled images are made once a group. FILE is written as it goes; at the end a line an arm, with mean and spread.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from bingo_compress.comparison import side_by_side
from bingo_compress.comparison.arms import make_arms, resolve_arms
from bingo_compress.comparison.side_by_side import Labelled, Shared
from bingo_compress.evaluation import scores
from bingo_compress.models.names import resolve_names
from bingo_compress.models.trained import build_models
from bingo_compress.recipe import Recipe, make_recipe
from bingo_compress.runtime import checkpoint, run_dir
from bingo_compress.runtime.devices import choose_device
from bingo_compress.training.material import prepare
from bingo_compress.training.plan import by_start, plan_run, take

REFERENCES = ("teacher", "start", "random")
TOLD = ("knn", "linear", "neighbour_recall", "train_seconds", "student_passes", "epochs")
BEGUN: dict[Path, Shared] = {}  # of this process
LAST = 60.0  # seconds before the end after which nothing begins


@dataclass(frozen=True)
class Group:
    """What cells have in common."""

    name: str
    data: str
    labels: str
    test: str
    settings: dict[str, Any]
    arms: list[str]
    seeds: list[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--home", type=Path, default=Path("runs/arms"), help="made anew")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    end = time.time() + chosen.seconds
    shutil.rmtree(chosen.home, ignore_errors=True)
    groups = [Group(**group) for group in yaml.safe_load(chosen.plan.read_text(encoding="utf-8"))]
    processes = multiprocessing.get_context("spawn")
    makers = [processes.Process(target=make_base, args=(chosen.home, group)) for group in groups]
    for start in range(0, len(makers), chosen.workers):
        for maker in makers[start : start + chosen.workers]:
            maker.start()
        for maker in makers[start : start + chosen.workers]:
            maker.join()
    if failed := [group.name for group, maker in zip(groups, makers, strict=True) if maker.exitcode]:
        raise SystemExit(f"what stages need could not be made: {', '.join(failed)}; {chosen.home}/*/log.txt says why")
    todo = [
        (chosen.home, group, arm, seed, end)
        for group in groups
        for arm in group.arms
        for seed in (group.seeds if arm not in REFERENCES else [0])
    ]
    print(f"{len(todo)} cells, made ready {end - time.time():.0f} s before the end", flush=True)
    found: list[dict[str, Any]] = []
    with processes.Pool(chosen.workers) as pool:
        cells = pool.imap_unordered(cell, todo)
        while len(found) < len(todo):
            try:
                found.append(cells.next(timeout=max(0.1, end - time.time())))
            except multiprocessing.TimeoutError:
                break
            if chosen.json:
                run_dir.write_text(chosen.json, json.dumps(found, indent=1) + "\n")
        pool.terminate()
    tell(found, len(todo))


def make_base(home: Path, group: Group) -> None:
    """All that the cells of a group begin with, in home/NAME."""
    shared, base = opened(home / group.name, group), recipe_of(group)
    models = build_models(base)
    plan = plan_run(models, len(shared.folder.files), shared.device, 1)
    prepare(plan, models, shared.folder, shared.work)
    judged = shared.labelled(models)
    tensors = {"labels": judged.labels, "test_labels": judged.test_labels, "groups": judged.groups}
    features = {f"teacher {role}": rows for role, rows in judged.teacher.items()}
    checkpoint.save(shared.out / "labelled.safetensors", tensors | features, classes=judged.classes)


def cell(task: tuple[Path, Group, str, int, float]) -> dict[str, Any]:
    """An arm with a seed, trained and judged; or one of REFERENCES, judged."""
    home, group, arm, seed, end = task
    told: dict[str, Any] = {"group": group.name, "arm": arm, "seed": seed}
    if time.time() > end - LAST:
        return told
    try:
        shared, base = begun(home, group), recipe_of(group)
        models = build_models(base if arm != "random" else base.model_copy(update={"student_weights": "random"}))
        if arm in REFERENCES:
            judged = models.teacher if arm == "teacher" else models.student
            measured = side_by_side.judge(judged, shared.labelled(models), shared.device)[0]
        else:
            (one,) = resolve_arms(make_arms(arm, base), lambda *_: None)
            measured = side_by_side._result(shared, one, seed, f"{arm}, seed {seed}")
        return told | {key: measured[key] for key in TOLD if key in measured}
    except Exception:  # one that fails is said and does not end the others
        return told | {"error": traceback.format_exc()}


def begun(home: Path, group: Group) -> Shared:
    """What this process has of a group, taken over from home/NAME once."""
    mine = home / f"{group.name}-{os.getpid()}"
    if mine not in BEGUN:
        shutil.copytree(home / group.name, mine, copy_function=os.link)
        shared, base = opened(mine, group), recipe_of(group)
        tensors, facts = checkpoint.load(mine / "labelled.safetensors")
        labels, test_labels, groups = (tensors[name] for name in ("labels", "test_labels", "groups"))
        teacher = {role: tensors[f"teacher {role}"] for role in ("bank", "test")}
        classes = int(str(facts["classes"]))
        judged = Labelled(shared.bank, shared.test, labels, test_labels, classes, teacher, groups)
        shared.judging[f"{base.teacher} {base.teacher_size} {base.teacher_weights}"] = judged
        BEGUN[mine] = shared
    return BEGUN[mine]


def recipe_of(group: Group) -> Recipe:
    """The group's recipe, its names and epochs filled in as compare does."""
    named = resolve_names(
        make_recipe({"data": group.data, "threads": 1, **group.settings}, group.name), lambda *_: None
    )
    return named.model_copy(update={"epochs": by_start(named)["epochs"]})


def opened(folder: Path, group: Group) -> Shared:
    """The group's images, and a place for what is made of them; what is printed goes to log.txt there."""
    torch.set_num_threads(1)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    (folder / "work").mkdir(exist_ok=True)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    base = recipe_of(group)
    bank, test = scores.open_labelled(group.labels, group.test, "labels", work=folder / "work")
    return Shared(take(base), bank, test, folder, choose_device(base.device), {base.student: 1}, {})


def tell(found: list[dict[str, Any]], asked: int) -> None:
    """A line an arm."""
    arms = defaultdict(list)
    for one in found:
        if "error" in one:
            print(f"{one['group']}, {one['arm']}, seed {one['seed']}: {one['error']}")
        elif "knn" in one:
            arms[one["group"], one["arm"]].append(one)
    for (group, arm), rows in sorted(arms.items()):
        words = [f"{key} {spread([row[key] for row in rows])}" for key in TOLD[:3] if key in rows[0]]
        print(f"{group:<16}{arm:<48}{len(rows)} seeds: {', '.join(words)}")
    print(f"{sum(map(len, arms.values()))} of {asked} cells")


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


if __name__ == "__main__":
    main()
