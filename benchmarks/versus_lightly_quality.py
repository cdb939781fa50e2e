"""LightlyTrain 0.18 (distillationv3) against ours in quality, at equal CPU seconds of a whole run: same images, teacher
weights and student, one thread, both students under one probe (judge.py).

python benchmarks/versus_lightly_quality.py --lightly-python ENV/bin/python --data TRAIN --test TEST
--teacher-weights FILE --student tf_efficientnet_lite0 --student-weights FILE --our-epochs 10 --their-epochs 8
--seeds 0,1 --out OUT

ENV: python -m venv ENV; ENV/bin/pip install lightly-train==0.18.* timm. It runs as a program of its own, telemetry off.
The epochs are yours to choose, so that the two sides' CPU seconds, which the table shows, are equal: short runs give
the rate, and it falls on a busy machine. A finished run is not repeated (OUT/.../facts.json has its command).

Ours: `distill` with its defaults. Theirs: its defaults (batch, rate, augmentation, loss), save for
- models, which it is given as objects of timm with the weights loaded; what it makes of one batch just before the first
  step must be what ours makes of it;
- the size. It shows one and the same view to teacher and student, so that its teacher sees --image-size, not
  --teacher-size;
- mean and std, which are one for both models: the teacher's. Its student is judged with them, too;
- feature maps, corrected from outside. For EfficientNet it reads the map before the last convolution and expects the
  width of the one behind it: a crash. --their-features last: timm's forward_features, so that what is judged is what
  was trained. --their-features early: the map it reads, with the width that it has; the last convolution then stays as
  it was. For mobilenetv3 both are one.
mobilenetv3's last convolution lies behind the pooling, and theirs never trains it: where the pooled map and timm's
features differ, the table has a row for each.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from judge import judged
from torch import Tensor, nn
from versus_lightly import ONE_THREAD, cpu_of_children

from bingo_compress.models.encoder import Encoder, build

THEIRS = """
import json, sys, lightly_train, timm, torch
from lightly_train._methods.distillationv3.distillationv3 import DistillationV3
from lightly_train._models.timm import timm as wrapping

asked = json.loads(sys.argv[1])
if asked["features"] == "last":
    wrapping._get_forward_features_fn = lambda model: wrapping._forward_features
else:
    wrapping.TIMMModelWrapper.feature_dim = lambda self: self._model.feature_info[-1]["num_chs"]

def loaded(name, file):
    model = timm.create_model(name, num_classes=0)
    if file:
        model.load_state_dict(torch.load(file, weights_only=True))
    return model

def save_features(method):
    batch, found = torch.load(asked["batch"], weights_only=True), {}
    for name in ("student", "teacher"):
        model = getattr(method, name + "_embedding_model")
        model = getattr(model, "wrapped_model", model).get_model()
        before = [(module, module.training) for module in model.modules()]
        with torch.no_grad():
            found[name] = model.eval()(batch)
        for module, training in before:
            module.training = training
    torch.save(found, asked["seen"])

DistillationV3.on_train_start = save_features
torch.manual_seed(asked["seed"])
lightly_train.pretrain(out=asked["out"], data=asked["data"], model=loaded(asked["student"], asked["student_file"]),
    method="distillationv3", method_args={"teacher": loaded(asked["teacher"], asked["teacher_file"])},
    epochs=asked["epochs"], seed=asked["seed"], num_workers=0, devices=1, accelerator="cpu", precision="32-true",
    transform_args={"image_size": (asked["size"], asked["size"]),
        "normalize": {"mean": asked["mean"], "std": asked["std"]}})
"""


class PooledMap(nn.Module):
    """A timm backbone's last feature map, averaged: (B, 3, S, S) -> (B, C), without what lies behind the pooling."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone.forward_features(images)  # type: ignore[operator]
        return features.mean((2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lightly-python", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--teacher", default="tf_efficientnet_lite2")
    parser.add_argument("--teacher-weights", required=True)
    parser.add_argument("--teacher-size", type=int, default=128)
    parser.add_argument("--student", default="tf_efficientnet_lite0")
    parser.add_argument("--student-weights", required=True, help="a file, or random")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--our-epochs", type=int, required=True)
    parser.add_argument("--their-epochs", type=int, required=True)
    parser.add_argument("--their-features", choices=("last", "early"), default="last")
    parser.add_argument("--sides", default="theirs,ours", help="what to run, in this order")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    run = {"ours": ours, "theirs": theirs}
    seeds, sides = [int(seed) for seed in chosen.seeds.split(",")], chosen.sides.split(",")
    facts = {(side, seed): run[side](chosen, seed) for seed in seeds for side in sides}
    table = judged(encoders(chosen, facts), chosen.data, chosen.test)
    say(chosen, facts, table)


def ours(chosen: argparse.Namespace, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bingo_compress", "distill", "--data", chosen.data, "--threads", 1]
    command += ["--teacher", chosen.teacher, "--teacher-weights", chosen.teacher_weights]
    command += ["--teacher-size", chosen.teacher_size, "--image-size", chosen.image_size]
    command += ["--student", chosen.student, "--student-weights", chosen.student_weights]
    command += ["--seed", seed, "--set", f"epochs={chosen.our_epochs}"]
    folder = chosen.out / "-".join(("ours", chosen.student, Path(chosen.student_weights).stem, str(seed)))
    return once(folder, [str(word) for word in (*command, "--out", folder / "run")], folder / "run/student.safetensors")


def theirs(chosen: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Raises SystemExit where what was trained did not begin with the weights that ours has."""
    teacher = build(chosen.teacher, chosen.image_size, chosen.teacher_weights, "--teacher-weights")
    student = build(chosen.student, chosen.image_size, chosen.student_weights, "--student-weights")
    known = chosen.student_weights != "random"
    files = {name: chosen.out / f"{name}.pth" for name in (chosen.teacher, chosen.student, "batch")}
    torch.save(teacher.backbone.state_dict(), files[chosen.teacher])
    torch.save(student.backbone.state_dict(), files[chosen.student])
    batch = torch.rand(8, 3, chosen.image_size, chosen.image_size, generator=torch.Generator().manual_seed(0))
    torch.save(batch, files["batch"])
    start = f"{Path(chosen.student_weights).stem}-{chosen.their_features}"
    folder = chosen.out / "-".join(("theirs", chosen.student, start, str(seed)))
    asked = {
        "out": str(folder / "run"), "data": str(chosen.data), "epochs": chosen.their_epochs, "seed": seed,
        "student": chosen.student, "student_file": str(files[chosen.student]) if known else "",
        "teacher": chosen.teacher, "teacher_file": str(files[chosen.teacher]),
        "size": chosen.image_size, "mean": teacher.preprocessing.mean, "std": teacher.preprocessing.std,
        "features": chosen.their_features, "batch": str(files["batch"]), "seen": str(folder / "seen.pth"),
    }  # fmt: skip
    command = [str(chosen.lightly_python), "-c", THEIRS, json.dumps(asked)]
    facts = once(folder, command, folder / "run/exported_models/exported_last.pt")
    seen = torch.load(folder / "seen.pth", weights_only=True)
    for name, model in {"teacher": teacher, **({"student": student} if known else {})}.items():
        with torch.inference_mode():
            apart = float((model.backbone(batch) - seen[name]).abs().max() / seen[name].abs().max())
        print(f"theirs, seed {seed}: features of its {name} before the first step differ from ours by {apart:.1e}")
        if apart > 1e-4:
            sys.exit(f"{folder}: its {name} did not begin with the weights that ours has")
    return facts


def once(folder: Path, command: list[str], student: Path) -> dict[str, Any]:
    """Run a command on one thread, unless `folder` says that this one has come to its end; what it cost."""
    told = folder / "facts.json"
    if told.exists() and (facts := json.loads(told.read_text()))["command"] == command:
        return dict(facts)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    before, start = cpu_of_children(), time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **ONE_THREAD}, cwd=folder)
    cpu = cpu_of_children() - before
    if done.returncode or not student.exists():
        sys.exit(f"{folder}/log.txt ends with\n{(folder / 'log.txt').read_text()[-3000:]}")
    facts = {"cpu_s": cpu, "wall_s": time.perf_counter() - start, "student": str(student), "command": command}
    told.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{folder.name}: {cpu:.0f} CPU seconds", flush=True)
    return facts


def encoders(chosen: argparse.Namespace, facts: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Encoder]:
    teacher = build(chosen.teacher, chosen.teacher_size, chosen.teacher_weights, "--teacher-weights")
    torch.manual_seed(0)
    found = {"teacher": teacher, "random": build(chosen.student, chosen.image_size, "random", "--student-weights")}
    if chosen.student_weights != "random":
        found["start"] = build(chosen.student, chosen.image_size, chosen.student_weights, "--student-weights")
    for (side, seed), row in facts.items():
        student = build(chosen.student, chosen.image_size, row["student"], "--student-weights")
        if side == "ours":
            found[f"ours-{seed}"] = student
            continue
        student = student.normalised_by(teacher.preprocessing.mean, teacher.preprocessing.std)
        found[f"theirs-{seed}"] = student
        pooled = Encoder(student.name, PooledMap(student.backbone), student.preprocessing).eval()
        if pooled.width != student.width:
            found[f"theirs, pooled map-{seed}"] = pooled
    return found


def say(
    chosen: argparse.Namespace, facts: dict[tuple[str, int], dict[str, Any]], table: dict[str, dict[str, float]]
) -> None:
    """Mean and spread over seeds, and what the runs cost."""
    for name in dict.fromkeys(name.rpartition("-")[0] or name for name in table):
        rows = [row for key, row in table.items() if (key.rpartition("-")[0] or key) == name]
        cost = [row["cpu_s"] for (side, _), row in facts.items() if name.startswith(side)]
        told = [
            f"{key} {statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
            for key in ("knn", "linear")
            for values in [[row[key] for row in rows]]
        ]
        spent = f"; CPU seconds {', '.join(f'{value:.0f}' for value in cost)}" if cost else ""
        print(f"{name:<20}{', '.join(told)}{spent}")
    settings = {key: str(value) for key, value in vars(chosen).items()}
    runs = {f"{side}-{seed}": row for (side, seed), row in facts.items()}
    name = f"{chosen.student}-{Path(chosen.student_weights).stem}-{chosen.their_features}-{chosen.seeds}.json"
    (chosen.out / name).write_text(json.dumps({"settings": settings, "runs": runs, "judged": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
