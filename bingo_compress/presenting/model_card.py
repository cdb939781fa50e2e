"""MODEL_CARD.md: what a run made, of what, how good and how fast it is; no name of an image and no place on the user's
disk is in it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm

from bingo_compress import __version__
from bingo_compress.features import bagging
from bingo_compress.models import exported
from bingo_compress.presenting import caveats, classes_section, timing_table, toolchain_table
from bingo_compress.presenting.markdown import CLASSES_SHOWN, name_of, plain, shown, table, title
from bingo_compress.recipe import GIVEN, Recipe, load_recipe, may_change
from bingo_compress.runtime import console
from bingo_compress.runtime.run_dir import RunDir, made_by, read_json, write_text
from bingo_compress.training.plan import loss_of

ELSEWHERE = {"teacher", "student", "teacher_weights", "student_weights", "teacher_size", "image_size"}
# What of a validation's protocol is shown; its other entries name folders.
PROTOCOL = ("onnx", "intervals", "gap_closed", "literature")


def renew(run: RunDir, folder: Path) -> Path:
    """Write `card` of the exported files that are in `folder` to MODEL_CARD.md there, whole or not at all. Returns the
    file. Raises BingoError.
    """
    files = [exported.contract(path) for path in exported.files(folder).values()]
    heads = [head.name for file in files for head in exported.heads(folder / file["file"], file["sha256"])]
    latency = read_json("export", folder / exported.LATENCY).get("rows")
    toolchains = [read_json("verify", (folder / file["file"]).with_suffix(exported.TOOLCHAINS)) for file in files]
    converted = list(exported.converted(folder).values())
    write_text(folder / exported.CARD, card(run, files, latency, heads, toolchains=toolchains, converted=converted))
    return folder / exported.CARD


def card(
    run: RunDir,
    files: Sequence[Mapping[str, Any]],
    latency: Sequence[dict[str, Any]] | None = None,
    heads: Sequence[str] = (),
    date: str = "",
    toolchains: Sequence[Mapping[str, Any]] = (),
    converted: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The model card of a finished run as Markdown; the same for the same run and arguments.

    files: of what was exported, as `exported.contract` tells it; latency: the rows of `latency.latency`; heads: the
    names of the files' heads; date: printed as it is given; toolchains: what `verify` told of each file; converted: the
    contracts of what toolchains made of them. A validation's figures are those of RUN/validation.json. Of it, of
    `latency`, `toolchains` and `converted` only what is of the run's student and of `files` is shown, told by their
    sha256. Raises BingoError where one of these is not what we write.
    """
    recipe = load_recipe(run.as_run)
    summary = read_json("distill", run.summary)
    with made_by("distill", run.summary):
        known = [_data(run, summary), _recall(summary)]
    with made_by("export", run.export / exported.name("onnx")):
        told = [_files(files), classes_section.section(files), _use(files, heads)]
    with made_by("export", run.export / exported.LATENCY):
        timed = _latency(latency, files)
    with made_by("verify", run.export / exported.name("onnx")):
        run_in = toolchain_table.section({file["sha256"]: name_of(file) for file in files}, toolchains, converted)
    when = f", {plain(date)}" if date else ""
    blocks = [
        f"# {plain(recipe.student)}, distilled from {plain(recipe.teacher)}",
        (
            f"An image encoder: pixels in, an embedding out. {classes_section.knows(files)} Made by"
            f" bingo-compress {plain(summary.get('version', __version__))}, run"
            f" {plain(summary.get('run_id', 'unknown'))}{when}."
        ),
        *_models(recipe),
        *known[0],
        *_method(recipe),
        "## Validation",
        *known[1],
        *_validation(run, files),
        *told[0],
        *told[1],
        *timed,
        *run_in,
        *told[2],
    ]
    return "\n\n".join(blocks) + "\n"


def licence(name: str, source: str) -> str:
    """The licence of weights as far as it is known, as Markdown. source: as in the recipe, pretrained, random or a
    file.
    """
    if source == "random":
        return "none: random weights"
    if source != "pretrained":
        return f"{'module' if source == GIVEN else 'file'} given by the user: licence unknown to us"
    config = timm.models.get_pretrained_cfg(name)
    return plain(config.license) if config and config.license else "timm states none"


def _models(recipe: Recipe) -> list[str]:
    rows = []
    for role in ("teacher", "student"):
        name, source = getattr(recipe, role), getattr(recipe, f"{role}_weights")
        size = recipe.teacher_size if role == "teacher" else recipe.image_size
        rows.append(
            [role, plain(name), _source(name, source), f"{size} px" if size else "its own", licence(name, source)]
        )
    unused = (
        f"The method, {plain(recipe.method)}, learns nothing from the teacher; it is what the student is compared with."
    )
    return [
        "## Models",
        table(("", "timm model", "weights at the start", "input in the run", "licence of those weights"), rows),
        *([] if loss_of(recipe).teacher else [unused]),
        (
            "A student may keep what its teacher got wrong. Whether a teacher's licence binds a student that was"
            " distilled from it is a question for a lawyer."
        ),
    ]


def _source(name: str, source: str) -> str:
    if source == "pretrained":
        config = timm.models.get_pretrained_cfg(name)
        return f"pretrained ({plain(config.tag)})" if config and config.tag else "pretrained"
    if source == GIVEN:
        return "a module of the user's own"
    return source if source in ("random", "auto") else f"the file {plain(Path(source).name)}"


def _data(run: RunDir, summary: Mapping[str, Any]) -> list[str]:
    counts = summary.get("images")
    lines = ["## Data"]
    if counts:
        lines.append(
            f"{counts['training']:,} images without labels to train on, {counts['held_out']:,} held out,"
            f" {counts['unusable']:,} files that could not be used."
        )
    else:
        lines.append("How many images it was trained on is not known: the run has no summary.json.")
    names = bagging.load(run.bags).names if run.bags.exists() else ()
    if names:
        digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
        lines.append(
            f"SHA-256 of the list of training images (relative names, one a line, not their pixels): `{digest}`."
        )
    else:
        lines.append("A hash of the list of images was not kept, or went with the run's work folder.")
    return [*lines, "Neither the images nor their names are part of this card."]


def _method(recipe: Recipe) -> list[str]:
    elsewhere = ELSEWHERE | may_change(recipe)
    changed = [
        (plain(key), plain(value), plain(Recipe.model_fields[key].default))
        for key, value in recipe.model_dump().items()
        if key not in elsewhere and value != Recipe.model_fields[key].default
    ]
    method = f"bingo ({plain(recipe.variant)})" if recipe.method == "bingo" else plain(recipe.method)
    own = " (in Python, with the same modules)" if GIVEN in (recipe.teacher_weights, recipe.student_weights) else ""
    return [
        "## Method",
        f"{method}, {recipe.epochs:,} epoch{'s' if recipe.epochs > 1 else ''}. "
        + ("Settings that are not the defaults:" if changed else "Every setting is the default."),
        *([table(("setting", "here", "default"), changed)] if changed else []),
        f"All settings are in the run's recipe.yaml; the same run again{own}:",
        "    bingo-compress distill --recipe RUN/recipe.yaml --data PHOTOS --out ANOTHER_RUN",
    ]


def _recall(summary: Mapping[str, Any]) -> list[str]:
    recall = summary.get("neighbour_recall")
    if not recall:
        return []
    return [
        f"Without labels: of the teacher's {recall['k']:,} nearest neighbours of each held-out image, the student has"
        f" {recall['student']:.3f}, before distillation {recall['start']:.3f} ({recall['queries']:,} images in a"
        f" gallery of {recall['gallery']:,}; by chance {recall['k'] / recall['gallery']:.3f})."
    ]


def _validation(run: RunDir, files: Sequence[Mapping[str, Any]]) -> list[str]:
    command = "    bingo-compress validate --run RUN --data LABELLED_FOLDER"
    if not run.validation.exists():
        return ["Not validated on labels yet:", command]
    with made_by("validate", run.validation):
        result = read_json("validate", run.validation)
        (student,) = (row for row in result["rows"] if row["name"] == "student")
        if not run.student.is_file() or student.get("weights") != exported.weights_digest(run.student):
            return ["Not validated on labels since the student was trained again:", command]
        there = {file["sha256"] for file in files}
        rows = [row for row in result["rows"] if not row["name"].startswith("onnx") or row.get("sha256") in there]
        blocks = _proof(result["protocol"], rows)
        unproven = [name_of(file) for file in files if file["sha256"] not in {row.get("sha256") for row in rows}]
        return [*blocks, *([f"Not proven: {', '.join(unproven)}. Run validate:", command] if unproven else [])]


def _proof(protocol: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    titles = protocol["figures"]
    keys = [key for key in titles if any(key in row for row in rows)]
    explained = {*keys, *(str(row["name"]).partition("-")[0] for row in rows), "intervals", "gap_closed"}
    cells = [[plain(title(row["name"])), *(shown(row, key) for key in keys)] for row in rows]
    classes = protocol["classes"]
    more = f" and {len(classes) - CLASSES_SHOWN:,} more" if len(classes) > CLASSES_SHOWN else ""
    aside = str(protocol["test"]).startswith("a quarter of each class of ")
    blocks = [
        (
            f"{protocol['test_images']:,} test images"
            f" ({'a quarter of each class, set aside' if aside else 'a folder of their own'}), bank of"
            f" {protocol['bank_images']:,}, {len(classes):,} classes:"
            f" {', '.join(map(plain, classes[:CLASSES_SHOWN]))}{more}. In brackets: 95% interval."
        ),
        table(("", *(plain(titles[key]) for key in keys)), cells),
    ]
    (student,) = (row for row in rows if row["name"] == "student")
    blocks += map(plain, caveats.of_proof(protocol, student))
    if "gap_closed" in student:
        low, high = student["gap_closed_interval"]
        blocks.append(
            f"Linear probe: the student closed {student['gap_closed']:.0%} [{low:.0%}, {high:.0%}] of the gap between"
            " random weights and the teacher."
        )
    known = sorted(
        (entry for entry in student["per_class"] if entry["images"]), key=lambda entry: float(entry["accuracy"])
    )
    by_class = [
        [plain(entry["class"]), f"{entry['images']:,}", shown(entry, "accuracy")] for entry in known[:CLASSES_SHOWN]
    ]
    return [
        *blocks,
        "The student by class, weakest first:",
        table(("class", "test images", "found"), by_class),
        "\n".join(
            f"- {plain(key)}: {plain(protocol[key])}"
            for key in dict.fromkeys((*titles, *PROTOCOL))
            if key in protocol and key in explained
        ),
    ]


def _names(files: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name_of(contract) for contract in files] or ["student.onnx"]


def _files(files: Sequence[Mapping[str, Any]]) -> list[str]:
    if not files:
        return ["## Files", "Not exported yet:", "    bingo-compress export --run RUN"]
    rows = []
    for contract in files:
        onnx, parity = contract["onnx"], contract.get("parity")
        checked = "-"
        if parity:
            checked = (
                f"{parity['images']:,} images: largest difference {parity['max_difference']:.1g}, smallest cosine"
                f" {parity['min_cosine']:.6f}"
            )
        rows.append(
            [
                name_of(contract),
                console.size(contract["bytes"]),
                f"{contract['parameters']:,}",
                f"{contract['embedding_dim']:,}",
                plain(f"{onnx['opset']}, IR {onnx['ir_version']}, {onnx['batch']}"),
                checked,
            ]
        )
    blocks = ["## Files", table(("", "size", "parameters", "embedding", "opset, IR, batch", "against torch"), rows)]
    whole = [contract for contract in files if "int8" in contract]
    if not whole:
        return blocks
    there = {contract["sha256"] for contract in files if contract not in whole}
    absent = any(there and contract["int8"].get("float_sha256") not in there for contract in whole)
    rows = []
    for contract in whole:
        gate = contract["int8"]["gate"]
        probed = [
            f"{gate[key]['float']:.3f} to {gate[key]['int8']:.3f}" if key in gate else "-" for key in ("knn", "linear")
        ]
        recall = (
            f"{gate['recall']:.3f} (k = {gate['recall_k']:,}, chance {gate['recall_k'] / (gate['images'] - 1):.3f})"
            if "recall" in gate
            else "-"
        )
        figures = [f"{gate['images']:,}", f"{gate['mean_cosine']:.4f}", recall]
        rows.append([name_of(contract), plain(contract["int8"]["rung"]), *figures, *probed])
    return [
        *blocks,
        (
            "What int8 costs against the float"
            f" file{' that it was made of, which is not the one above' if absent else ''}, on the images of the gate"
            " that it had to pass; kNN and linear on test images that chose nothing:"
        ),
        table(
            ("", "how", "images", "mean cosine", "neighbour recall", "kNN, float to int8", "linear, float to int8"),
            rows,
        ),
    ]


def _latency(rows: Sequence[dict[str, Any]] | None, files: Sequence[Mapping[str, Any]]) -> list[str]:
    names = " ".join(_names(files))
    there = {contract["sha256"] for contract in files}
    timed = rows or []
    rows = [row for row in timed if row.get("sha256") in there]
    if not rows:
        return ["## Latency", "Not measured:", f"    bingo-compress latency {names}"]
    named = [row | {"file": Path(row["file"]).name} for row in rows]
    said = timing_table.said(named) if len(rows) == len(timed) else []  # ratios are to the first that was timed
    return [
        "## Latency",
        f"On {plain(timing_table.describe(rows[0]['machine']))}; {plain(timing_table.caption(rows))}.",
        table(timing_table.HEADER, [[plain(cell) for cell in line] for line in timing_table.cells(named)]),
        *(["\n".join(f"- {plain(line)}" for line in said)] if said else []),
        (
            f"It says nothing of another machine: `bingo-compress latency {names}` there, or `bingo-edge time"
            f" {_names(files)[0]}` on the device."
        ),
    ]


def _use(files: Sequence[Mapping[str, Any]], heads: Sequence[str]) -> list[str]:
    names = _names(files)
    commands = [
        f"    bingo-edge embed    {names[0]} photos/ --out index.npz",
        f"    bingo-edge nearest  {names[0]} photo.jpg --index index.npz",
        *(f"    bingo-edge classify {name_of(contract)} photo.jpg" for contract in files if "classes" in contract),
        *(f"    bingo-edge classify {head.partition('.')[0]}.onnx --head {head} photo.jpg" for head in heads),
    ]
    blocks = [
        "## Use",
        "On the device, without torch (`bingo-edge` needs onnxruntime, numpy and Pillow):",
        "\n".join(commands),
        "In Python:",
        "    from bingo_edge import Embedder\n\n"
        f'    found = Embedder("{names[0]}").embed("photos/")\n'
        "    found.embeddings  # float32 (n, D), length one: row i belongs to found.names[i]",
    ]
    if len(names) > 1:
        blocks.append(
            f"{', '.join(names[1:])} can stand in the same places, each file with its own index and heads: another's"
            " are refused."
        )
    if files and "input" in files[0]:
        blocks.append(_contract(files[0]))
    return blocks


def _contract(contract: Mapping[str, Any]) -> str:
    """What goes in and what comes out, for whoever writes a runner of their own."""
    given = contract["input"]
    batch = contract["onnx"]["batch"]
    sides = f"{given['size']}, {given['size']}"
    shape = (
        f"({'batch' if batch == 'dynamic' else batch}, {f'3, {sides}' if given['layout'] == 'NCHW' else f'{sides}, 3'})"
    )
    lines = [
        f"input {plain(given['name'])}: " + plain(f"{given['dtype']} {shape}, {given['layout']}, {given['color']}")
    ]
    if "mean" in given:
        lines.append(f"of pixels of 0 to 255: (pixel - {plain(given['mean'])}) / {plain(given['std'])}, a channel each")
    if "preprocess_rule" in contract:
        lines.append(f"from a picture: {plain(contract['preprocess_rule'])}")
    if "preprocess" in contract:
        lines.append(f"with {plain(', '.join(f'{key} {value}' for key, value in contract['preprocess'].items()))}")
    if "normalization" in contract:
        rule = contract["normalization"]
        lines.append(
            f"normalisation {plain(rule['where'])}: {plain(rule['scale'])}, mean {plain(rule['mean'])}, std"
            f" {plain(rule['std'])}"
        )
    lines += [f"output {plain(name)}: {plain(what)}" for name, what in contract.get("outputs", {}).items()]
    return "\n".join(f"- {line}" for line in lines)
