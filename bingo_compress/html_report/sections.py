"""The sections of the page that tell of figures: each one function of what is known of the runs. A section is told as
blocks, which assets/page.html shows by their kind; a chart has a table behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bingo_compress.html_report.facts import (
    Facts,
    Row,
    apart,
    called,
    grouped,
    measured_on,
    proven_on,
    recalled_on,
    sought_on,
)
from bingo_compress.presenting import caveats, timing_table
from bingo_compress.presenting.markdown import name_of, shown, title
from bingo_compress.recipe import FILES, WORDS, Recipe, make_recipe, recipe_text
from bingo_compress.runtime import console
from bingo_compress.training.metrics import PARTS

POINTS = 400  # of a curve
ROWS = 30  # of the table behind it
CLASSES = 40  # in a chart or a matrix
TOLD = {"step", "epoch", "lr", "images_per_s", "memory", "seconds", "time", "neighbour_recall"}
SETTINGS = {"data", "teacher_weights", "student_weights", "threads", "device"}  # of a machine, or told elsewhere
Block = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """id: of its place in the page; lead: the sentence under its title."""

    id: str
    title: str
    lead: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Missing:
    """What a section would tell, and what would make it."""

    what: str
    way: str


@dataclass(frozen=True)
class View:
    """What of the user's own may be in the page: small pictures, and names of files and folders."""

    images: bool = True
    paths: bool = False


def chart(
    kind: str, name: str, data: Mapping[str, Any], table: tuple[Sequence[str], Sequence[Sequence[str]]], **more: Any
) -> Block:
    """A chart of assets/page.js. name: of what it shows, also for whoever cannot see it; table: (header, rows)."""
    return {
        "kind": "chart",
        "type": kind,
        "name": name,
        "data": dict(data),
        "wide": False,
        "header": table[0],
        "rows": table[1],
        **more,
    }


def text(words: str) -> Block:
    """A paragraph."""
    return {"kind": "text", "text": words}


def proof(runs: Sequence[Facts]) -> Section | Missing:
    """Every model's figures with their intervals; those that compare in one chart."""
    labelled = [facts for facts in runs if facts.proof]
    if not labelled:
        return _recall(runs)
    blocks = [block for group in grouped(labelled, proven_on) for block in _figures(group, alone=len(runs) == 1)]
    lead = f"{measured_on(labelled)} The line through a dot is its 95% interval."
    return Section("figures", "How good it is", lead, blocks)


def _figures(runs: Sequence[Facts], *, alone: bool) -> list[Block]:
    """The figures of runs that were proven on the same images. alone: the page is on one run."""
    protocol, rows = runs[0].proof["protocol"], _rows(runs, alone=alone)
    figures = {key: name for key, name in protocol["figures"].items() if any(key in row for _, row in rows)}
    charts = []
    for key, name in figures.items():
        points = [
            {"name": label, "value": row[key], "interval": row[f"{key}_interval"], "role": _role(row["name"])}
            for label, row in rows
            if key in row
        ]
        cells = [[label, shown(row, key)] for label, row in rows if key in row]
        charts.append(chart("intervals", _figure(key, name), {"points": points}, (("model", name), cells)))
    measured = [[_figure(key, figures[key]), protocol[key]] for key in figures] + [["intervals", protocol["intervals"]]]
    summary = "How each figure is measured" + ("" if alone else f" ({called(runs)})")
    said = [line if alone else f"{facts.name}: {line}" for facts in runs for line in _beside(facts)]
    return [
        {"kind": "charts", "charts": charts},
        *map(text, said),
        {"kind": "details", "summary": summary, "header": ("figure", "how"), "rows": measured},
    ]


def _figure(key: str, name: str) -> str:
    names = {
        "knn": "Nearest neighbours (kNN)",
        "linear": "Linear probe",
        "linear_balanced": "Linear probe, classes alike",
    }
    names |= {"linear_auc": "Area under the ROC curve", "neighbour_recall": f"The teacher's neighbours found, {name}"}
    return names.get(key, name)


def _rows(runs: Sequence[Facts], *, alone: bool) -> list[tuple[str, Row]]:
    """(label, row) of the models that are shown: of several runs those that differ."""
    found = []
    for facts in runs:
        for row in facts.proof["rows"]:
            if alone:
                found.append((title(row["name"]), row))
            elif row["name"] != "random":
                found.append((f"{facts.name}: {title(row['name'])}", row))
    return found


def _role(name: str) -> str:
    return name if name in ("teacher", "student", "start", "random") else "file"


def _beside(facts: Facts) -> list[str]:
    """What belongs beside the figures of a proof: how much of the gap was closed, and what they leave out."""
    row, said = facts.row("student"), []
    if "gap_closed" in row:
        low, high = row["gap_closed_interval"]
        said.append(
            f"The student closed {row['gap_closed']:.0%} [{low:.0%}, {high:.0%}] of the gap between random weights and"
            " the teacher (linear probe)."
        )
    return [*caveats.of_proof(facts.proof["protocol"], row), *said]


def _recall(runs: Sequence[Facts]) -> Section | Missing:
    """The same without labels: neighbour recall alone."""
    missing = Missing(
        "How good it is on labels: kNN and linear probe of teacher, student, start, random weights and exported files",
        "bingo-compress validate --run RUN --data LABELLED_FOLDER",
    )
    found = [facts for facts in runs if facts.summary.get("neighbour_recall")]
    if not found:
        return missing
    charts = [_recalls(group, alone=len(runs) == 1) for group in grouped(found, recalled_on)]
    lead = f"No labels were given. {sought_on(found)} The line through a dot is its 95% interval."
    way = f"For figures on labels: {missing.way}"
    return Section("figures", "How alike it sees", lead, [{"kind": "charts", "charts": charts}, text(way)])


def _recalls(runs: Sequence[Facts], *, alone: bool) -> Block:
    """Neighbour recalls that were measured alike."""
    points, cells = [], []
    for facts in runs:
        recall = facts.summary["neighbour_recall"]
        for name in ("start", "student"):
            label = title(name) if alone else f"{facts.name}: {title(name)}"
            value, interval = recall[name], recall.get(f"{name}_interval")
            points.append({"name": label, "value": value, "interval": interval, "role": name})
            cells.append([label, shown(recall, name) if interval else f"{value:.3f}"])
    name = f"The teacher's {runs[0].summary['neighbour_recall']['k']:,} nearest images found"
    return chart("intervals", name, {"points": points}, (("model", "recall"), cells))


def training(runs: Sequence[Facts]) -> Section | Missing:
    """Losses, rate and the label-free figure by step, and where the time went."""
    told = [facts for facts in runs if facts.lines]
    if not told:
        return Missing("How training went", "a run with its metrics.jsonl")
    terms = dict.fromkeys(key for facts in told for key in facts.lines[0] if _is_loss(key))
    charts = [_curves("Loss", list(terms), told), _curves("Learning rate", ["lr"], told)]
    if any("neighbour_recall" in line for facts in told for line in facts.lines):
        charts.append(_curves("Neighbour recall, no labels used", ["neighbour_recall"], told))
    blocks: list[Block] = [{"kind": "charts", "charts": charts}]
    if len(runs) == 1:
        spent = _spent(told[0])
        rows = [
            [part, console.duration(seconds), f"{seconds / max(told[0].seconds, 1e-9):.0%}"] for part, seconds in spent
        ]
        data = {"points": [{"name": part, "value": seconds} for part, seconds in spent], "unit": "s"}
        table = (("part", "time", "of the time"), rows)
        bars = chart("bars", "Where the time went", data, table)
        blocks[0]["charts"].append(bars)
        blocks.append(text("Parts run side by side: the next batch is made while the student learns."))
    return Section("training", "How training went", " ".join(map(_trained, told)), blocks)


def _is_loss(key: str) -> bool:
    return key not in TOLD and not key.startswith("share_")


def _trained(facts: Facts) -> str:
    last = facts.lines[-1]
    rates = [line["images_per_s"] for line in facts.lines if line.get("images_per_s")]
    speed = f", {sum(rates) / len(rates):,.0f} student views a second" if rates else ""
    memory = f", {console.size(last['memory'])} of memory at most" if last.get("memory") else ""
    whose = f"{facts.name}: " if not facts.name.startswith("This") else ""
    return f"{whose}{last['step']:,} steps in {console.duration(facts.seconds)}{speed}{memory}."


def _curves(name: str, keys: Sequence[str], runs: Sequence[Facts]) -> Block:
    series, rows = [], []
    for facts in runs:
        for key in keys if len(runs) == 1 else keys[:1]:
            points = [(line["step"], line[key]) for line in facts.lines if line.get(key) is not None]
            label = key if len(runs) == 1 else facts.name
            series.append({"name": label, "points": _thinned(points)})
        lines = [line for line in facts.lines if line.get(keys[0]) is not None]
        step = max(1, -(-len(lines) // ROWS))
        for line in lines[step - 1 :: step]:
            cells = [f"{line[key]:.4g}" if line.get(key) is not None else "-" for key in keys]
            whose = [facts.name] if len(runs) > 1 else []
            rows.append([*whose, f"{line['step']:,}", str(line["epoch"] + 1), *cells])
    header = [*(["run"] if len(runs) > 1 else []), "step", "epoch", *keys]
    return chart("lines", name, {"series": series}, (header, rows))


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points, each the mean of its neighbours."""
    each = -(-len(points) // POINTS)
    parts = [points[start : start + each] for start in range(0, len(points), each or 1)]
    return [(part[-1][0], float(f"{sum(value for _, value in part) / len(part):.6g}")) for part in parts]


def _spent(facts: Facts) -> Sequence[tuple[str, float]]:
    """Seconds of training by part, the most first."""
    total: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    before = 0.0
    for line in facts.lines:
        wall = line["seconds"] - before if line["seconds"] > before else line["seconds"]
        before = line["seconds"]
        for part in PARTS:
            total[part] += wall * (line.get(f"share_{part}") or 0.0)
    return sorted(total.items(), key=lambda item: -item[1])


def classes(runs: Sequence[Facts]) -> Section | Missing:
    """What the student takes for what."""
    (facts,) = runs
    row = facts.row("student")
    if not row.get("per_class"):
        return Missing(
            "Which classes it finds and which it mixes up", "bingo-compress validate --run RUN --data LABELLED_FOLDER"
        )
    known = sorted((each for each in row["per_class"] if each["images"]), key=lambda each: float(each["accuracy"]))
    points = [
        {"name": each["class"], "value": each["accuracy"], "interval": each["accuracy_interval"], "role": "student"}
        for each in known[:CLASSES]
    ]
    cells = [
        [each["class"], f"{each['images']:,}", shown(each, "accuracy"), each["mistaken_for"] or "-"] for each in known
    ]
    table = (("class", "test images", "found", "most often taken for"), cells)
    charts = [chart("intervals", "Share of each class that is found", {"points": points}, table, wide=True)]
    if "confusion" in row and len(row["per_class"]) <= CLASSES:
        names = facts.proof["protocol"]["classes"]
        counted = [[name, *map(str, line)] for name, line in zip(names, row["confusion"], strict=True)]
        data = {"classes": names, "counts": row["confusion"]}
        charts.append(chart("matrix", "What is taken for what", data, (("is, down", *names), counted), wide=True))
    none = caveats.without_images(row, len(facts.proof["protocol"]["classes"]))
    lead = " ".join([f"The student's linear probe by class, weakest first{_of(len(known), CLASSES)}.", *none])
    return Section("classes", "Classes", lead, [{"kind": "charts", "charts": charts}])


def _of(there: int, most: int) -> str:
    return f", {most} of {there:,}" if there > most else ""


def files(runs: Sequence[Facts]) -> Section | Missing:
    """Size, latency and accuracy of every exported file in one plot."""
    points: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    judged: list[str] = []
    for facts in runs:
        for contract in facts.files:
            name = name_of(contract) if len(runs) == 1 else f"{facts.name}: {name_of(contract)}"
            time, row = facts.timing(contract), facts.proven(contract)
            took = timing_table.picture_ms(time) if time else None
            if took is not None:
                point = {"name": name, "ms": took, "mb": contract["bytes"] / 1e6}
                points.append(point | {"value": row.get("linear"), "interval": row.get("linear_interval")})
            taken = "-" if took is None else f"{took:.2f}"
            rows.append([name, console.size(contract["bytes"]), taken, shown(row, "knn"), shown(row, "linear")])
            judged += _gate(name, contract)
    if not rows:
        return Missing(
            "The files for a device: size, latency and accuracy", "bingo-compress export --run RUN --format all"
        )
    table = (("file", "size", "ms a picture, 1 thread", "kNN", "linear"), rows)
    blocks: list[Block] = []
    if points:
        drawn = chart("files", "Latency, accuracy and size", {"points": points}, table, wide=True)
        blocks.append({"kind": "charts", "charts": [drawn]})
    blocks.append({"kind": "table", "header": table[0], "rows": rows})
    lead = " ".join(["What an exported file weighs, takes and finds.", *apart(runs)])
    return Section("files", "For the device", lead, [*blocks, *map(text, judged)])


def _gate(name: str, contract: Mapping[str, Any]) -> list[str]:
    """How an int8 file of that name was made and judged; nothing of another one."""
    if "int8" not in contract:
        return []
    judged = contract["int8"]["gate"]
    recall = f", neighbour recall {judged['recall']:.3f}" if "recall" in judged else ""
    return [
        f"{name} was made by {contract['int8']['rung']} and judged against the float file on {judged['images']:,}"
        f" images: mean cosine {judged['mean_cosine']:.4f}{recall}."
    ]


def recipe(runs: Sequence[Facts], view: View) -> Section:
    """Settings, versions, machine, and how to make it again."""
    blocks: list[Block] = []
    if len(runs) > 1:
        blocks.append(
            {"kind": "table", "header": ("setting", *(facts.name for facts in runs)), "rows": _differing(runs)}
        )
        return Section("recipe", "How they were made", "Settings in which the runs differ.", blocks)
    (facts,) = runs
    rows = [
        ["version", f"bingo-compress {facts.summary.get('version', '')}"],
        ["run", str(facts.summary.get("run_id", ""))],
    ]
    rows += [["finished", str(facts.summary.get("finished", "unknown"))]]
    rows += [[key, str(value)] for key, value in facts.summary.get("machine", {}).items()]
    if facts.timed:
        machine = facts.timed[0]["machine"]
        rows += [["timed with", f"onnxruntime {machine['onnxruntime']}, python {machine['python']}"]]
    rows += [["folder", facts.path]] if view.paths else []
    default = make_recipe({}, "the defaults").model_dump()
    chosen = [
        [key, str(value), str(default[key])]
        for key, value in facts.recipe.model_dump().items()
        if key not in SETTINGS and value != default[key]
    ]
    blocks = [
        {"kind": "table", "header": ("", ""), "rows": rows, "plain": True},
        {
            "kind": "details",
            "summary": "Settings that are not the defaults",
            "header": ("setting", "here", "default"),
            "rows": chosen,
        },
        {
            "kind": "details",
            "summary": "The whole recipe, as it was run",
            "code": recipe_text(masked(facts.recipe, view)),
        },
        text("The same run again:"),
        {"kind": "code", "code": "\n".join(_commands(facts.recipe))},
    ]
    return Section("recipe", "How it was made", f"{facts.recipe.teacher} taught {facts.recipe.student}.", blocks)


def masked(settings: Recipe, view: View) -> Recipe:
    """The recipe without places on the user's disk."""
    if view.paths:
        return settings
    files = {key: f"{key.upper()}_FILE" for key in FILES if getattr(settings, key) not in WORDS}
    return settings.model_copy(update={"data": "PHOTOS", **files})


def _commands(settings: Recipe) -> list[str]:
    files = [
        f" --{key.replace('_', '-')} {key.upper()}_FILE" for key in sorted(FILES) if getattr(settings, key) not in WORDS
    ]
    return [
        f"bingo-compress distill --recipe RUN/recipe.yaml --data PHOTOS{''.join(files)} --out ANOTHER_RUN",
        "bingo-compress validate --run ANOTHER_RUN --data LABELLED_FOLDER",
        "bingo-compress export --run ANOTHER_RUN --format all",
    ]


def _differing(runs: Sequence[Facts]) -> list[list[str]]:
    told = [masked(facts.recipe, View()).model_dump() for facts in runs]
    return [[key, *(str(each[key]) for each in told)] for key in told[0] if len({str(each[key]) for each in told}) > 1]
