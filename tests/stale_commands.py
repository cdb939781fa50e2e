"""The commands of tests/stale_state.py: their words, which of them make sense, and what each depends on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from helpers import flags
from stale_run import Ended
from stale_world import WRITTEN, World


class Command(NamedTuple):
    """kind: a command of bingo-compress, or index, nearest or classify for the kit's. place: the run's folder;
    settings: of `words`.
    """

    kind: str
    place: str
    settings: tuple[tuple[str, Any], ...]

    def get(self, key: str) -> Any:
        """A setting; "" where it is not given."""
        return dict(self.settings).get(key, "")

    def but(self, **settings: Any) -> "Command":
        """The same with other settings; "" takes one away."""
        changed = {key: value for key, value in (dict(self.settings) | settings).items() if value != ""}
        return self._replace(settings=tuple(sorted(changed.items())))


def words(command: Command, root: Path, world: World, there: Path) -> list[str]:
    """The command's words. root: where runs are; there: where the world is."""
    run, photos, bank, test = (
        str(path) for path in (root / command.place, *(there / world.given(folder) for folder in world[:3]))
    )
    kind, get = command.kind, command.get
    if kind in ("distill", "compare"):
        start = str(there / "start.safetensors") if get("start") == "file" else "random"
        chosen = {key: get(key) for key in ("seed", "method", "bags") if get(key) != ""}
        sets = flags(
            data=photos,
            teacher_weights=there / "teacher.safetensors",
            student_weights=start,
            epochs=get("epochs"),
            image_size=get("image_size"),
            hold_out=0.25,
            save_every_steps=1,
            **chosen,
        )
        if kind == "distill":
            return [kind, *sets, "--out", run, *([f"--{get('how')}"] if get("how") else [])]
        judged = [
            "--labels",
            bank,
            *(["--test", test] if get("test") else []),
            "--methods",
            get("methods"),
            "--seeds",
            get("seeds"),
        ]
        return [kind, *sets, *judged, "--out", run, *(["--overwrite"] if get("how") else [])]
    if kind == "export":
        elsewhere = ["--out", f"{run}-files"] if get("elsewhere") else []
        size = ["--image-size", str(get("image_size"))] if get("image_size") else []
        return [kind, "--run", run, "--data", photos, "--format", get("format"), *size, *elsewhere]
    if kind == "validate":
        bank = photos if get("bank") else bank
        return [
            kind,
            "--run",
            run,
            "--data",
            bank,
            *({"test": ["--test", test], "bank": ["--test", bank]}.get(get("test"), [])),
        ]
    file = str((Path(f"{run}-files") if get("elsewhere") else Path(run, "export")) / f"student{get('file')}.onnx")
    index = f"{run}-index.npz"
    bank, test = (str(there / folder.name) for folder in (world.bank, world.test))  # the kit takes folders
    rest = {
        "index": ["embed", file, bank, "--out", index],
        "nearest": ["nearest", file, f"{test}/{world.test.files[0][0]}", "--index", index, "--k", "4", "--json"],
        "classify": ["classify", file, test, "--head", f"{run}/export/student.{get('head')}.npz", "--json"],
    }
    return ["bingo-edge", *rest[kind]]


RUNS = ("a", "b")


@dataclass
class Held:
    """The last commands that ended well in a run's folder, each with the world it was given; a new distill forgets the
    rest.
    """

    steps: dict[str, tuple[Command, World]] = field(default_factory=dict)

    def copy(self) -> "Held":
        """What a copy of the folder holds: indexes lie beside it."""
        return Held({name: step for name, step in self.steps.items() if name in ("distill", "export", "validate")})


def draw(random: np.random.Generator, held: dict[str, Held], *, last: bool) -> tuple[Command, int]:
    """A command that makes sense where things are, and the step that it is killed at (0: it is not)."""
    pick = lambda *values: values[int(random.integers(len(values)))]  # noqa: E731
    finished = [name for name in RUNS if "distill" in held[name].steps]
    exported = [name for name in finished if "export" in held[name].steps]
    chances = {"distill": 0.35, "compare": 0.1}
    if finished:
        chances |= {"validate": 0.25, "export": 0.2}
    if exported:
        chances["index"] = 0.1
        chances |= {"nearest": 0.2} if any("index" in held[name].steps for name in finished) else {}
        chances |= {"classify": 0.3} if any("validate" in held[name].steps for name in exported) else {}
    names, weights = list(chances), np.array(list(chances.values()))
    kind = str(random.choice(names, p=weights / weights.sum()))
    if kind == "compare":
        methods = pick("bingo,seed", "seed,bingo", "bingo,bingo:bag_size=1", "seed,bingo:temperature=0.1")
        settings = {
            "methods": methods,
            "seeds": pick("0", "0", "0,1"),
            "epochs": 2,
            "image_size": 32,
            "test": pick("", "test"),
            "start": pick("file", ""),
        }
        return Command(kind, "c", ()).but(**settings, how=pick("", "", "", "overwrite")), 0
    if kind == "distill":
        place = pick(*RUNS)
        before = held[place].steps.get("distill") or held[place].steps.get("begun")
        fresh = {"method": pick("bingo", "bingo", "seed", "simreg", "moco"), "epochs": pick(1, 2), "seed": pick(0, 1)}
        fresh |= {"image_size": pick(32, 32, 48), "bags": pick("knn", "kmeans"), "start": pick("file", "file", "")}
        how = "" if before is None else pick("resume", "resume", "overwrite")
        settings = dict(before[0].settings) if before and random.random() < 0.7 else fresh
        if before and random.random() < 0.2:
            one = pick(*fresh)
            settings = settings | {one: fresh[one]}
        killed_at = int(random.integers(1, 4)) if not last and random.random() < 0.25 else 0
        if settings["method"] != "bingo":
            settings = settings | {"bags": ""}  # read by no other
        return Command(kind, place, ()).but(**{**settings, "how": how}), killed_at
    if kind == "export":
        settings = {
            "format": pick("onnx", "onnx", "onnx", "onnx", "all"),
            "image_size": pick("", "", 48),
            "elsewhere": pick("", "", "yes"),
        }
        return Command(kind, pick(*finished), ()).but(**settings), 0
    if kind == "validate":
        return (
            Command(kind, pick(*finished), ()).but(test=pick("test", "test", "", "bank"), bank=pick("", "", "photos")),
            0,
        )
    if kind == "index":
        return Command(kind, pick(*exported), ()), 0
    if kind == "nearest":
        return Command(kind, pick(*[name for name in finished if "index" in held[name].steps]), ()), 0
    return (
        Command(kind, pick(*[name for name in exported if "validate" in held[name].steps]), ()).but(
            head=pick("linear", "bank")
        ),
        0,
    )


def remember(command: Command, world: World, ended: Ended, held: dict[str, Held]) -> None:
    """What the folders hold after a command."""
    if command.kind == "compare":
        return
    steps = held[command.place].steps
    if command.kind == "distill" and (ended.status in (0, -9)):
        again = command.but(how="")
        index = {name: step for name, step in steps.items() if name == "index"}
        if command.get("how") != "resume":
            steps.clear()
        steps |= index | {"begun": (again, world)} | ({"distill": (again, world)} if ended.status == 0 else {})
    elif ended.status == 0:
        steps["elsewhere" if command.get("elsewhere") else command.kind] = command, world


def chain(command: Command, world: World, held: Held) -> list[tuple[Command, World]]:
    """The commands that `command` depends on, in the order of a clean start, and itself."""
    steps = dict(held.steps)
    if command.kind in ("distill", "compare"):
        needed: tuple[str, ...] = ()
    else:
        distilled, given = steps["distill"]
        if command.kind == "validate":
            steps["distill"] = distilled, given._replace(teacher=world.teacher)  # which both read
        needed = {
            "export": ("distill",),
            "validate": ("distill", "export"),
            "index": ("distill", "export"),
            "nearest": ("distill", "export", "index"),
            "classify": ("distill", "export", "validate"),
        }[command.kind]
    found = [steps[name] for name in needed if name in steps] + [(command.but(how=""), world)]
    return [(step._replace(place="a" if step.place in RUNS else step.place), _told(given)) for step, given in found]


def _told(world: World) -> World:
    """The world with its folders under their first names and times, of which no result may depend."""
    return World(
        *(part._replace(name=role, written=WRITTEN) for role, part in zip(World._fields, world[:3], strict=False)),
        *world[3:],
    )


def read(command: Command, world: World) -> tuple[Any, ...]:
    """What of the world a command reads."""
    start = world.start if command.get("start") == "file" else None
    return {
        "distill": (world.photos, world.teacher, start),
        "export": (world.photos,),
        "validate": (
            world.photos if command.get("bank") else world.bank,
            world.test if command.get("test") == "test" else None,
            world.teacher,
        ),
        "compare": (world, start),
        "index": (world.bank,),
        "nearest": (world.test,),
        "classify": (world.test,),
    }[command.kind]
