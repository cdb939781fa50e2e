"""The proof of a finished run: teacher, student, its start, random weights and the exported file, on a folder of
labelled images.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bingo_compress.data import image_list, pixel_store
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import finetune, probes, scores
from bingo_compress.evaluation.protocol import FIGURES, NO_EXTRAS, Extras, figures_of, protocol
from bingo_compress.evaluation.scores import Sides
from bingo_compress.features import extract, neighbours
from bingo_compress.heads import answers, fitting
from bingo_compress.html_report import looking, mistakes
from bingo_compress.models import exported, trained
from bingo_compress.models.encoder import Encoder, Preprocessing, weights_digest
from bingo_compress.models.exported import onnx_runner
from bingo_compress.models.trained import NOTHING_GIVEN, Given, Models, build_student, load_student
from bingo_compress.presenting import model_card
from bingo_compress.presenting.tables import show
from bingo_compress.recipe import Recipe, load_recipe
from bingo_compress.runtime import console, distributed, run_dir
from bingo_compress.runtime.devices import choose_device
from bingo_compress.sources.opened import Data

REQUIRED = tuple(FIGURES)  # what a threshold may be set on


def validate(
    run_path: Path,
    data: Data,
    test: Data | None = None,
    json_file: Path | None = None,
    device: str = "auto",
    *,
    extras: Extras = NO_EXTRAS,
    require: Sequence[str] = (),
    given: Given = NOTHING_GIVEN,
) -> dict[str, Any]:
    """Probe every model of a run. data: the labelled bank; test: labelled queries, or None to set a quarter of each
    class of `data` aside.

    require: "linear=0.6" and the like; given: the modules of the user's own that the run was distilled with. Returns
    and writes to RUN/validation.json and json_file {"protocol": ..., "rows": ...}, every figure with a 95% interval;
    the row of a file names its sha256. Saves a linear head and a bank beside each exported file for the edge kit. Of
    several processes each embeds its share of the images; the first does the rest. Raises BingoError, with exit status
    3, when all is written, where an exported file (without any: the student) is below a figure that `require` names;
    before anything is embedded, where one was exported from another student than the run's.
    """
    least = parse_required(require)
    specs = finetune.parse_shots(extras.shots) if extras.shots else []
    if extras.fine_tune and not specs:
        raise BingoError("--fine-tune: expected --shots beside it, found none; for example --shots 1%,10% --fine-tune")
    run_dir.refuse_no_file(json_file, "--json")
    run = run_dir.open_finished(run_path)
    other = _open_against(extras.against) if extras.against else None
    where = choose_device(device)  # the other processes are joined: they share what follows
    bank_folder, test_folder = scores.open_labelled(data, test, "--data", work=run.work)
    distributed.from_first(lambda: run_dir.hold(run.path, "--run"))
    distributed.from_first(lambda: image_list.keep(run.work, bank_folder, test_folder))
    subjects = _subjects(run, other, given)
    models = _runnable(subjects, run, where)
    keep = extract.Keep(run.work, "proof", _digests(subjects))
    distributed.from_first(lambda: run_dir.drop_stale(run.work, "proof", {keep.folder.name}))
    sides = scores.sides(models, bank_folder, test_folder, image_list.labels_of(bank_folder)[0], keep)

    def judge() -> dict[str, Any]:
        rows, heads, right = _rows(subjects, models, sides, specs, run.export)
        by_name = {row["name"]: row for row in rows}
        if extras.fine_tune or extras.literature:
            tuned = specs if extras.fine_tune else []
            _train_with_labels(by_name, subjects.trainable, sides, tuned, extras.literature, run, where)
        result: dict[str, Any] = {"protocol": protocol(sides, test_folder, specs, extras), "rows": rows}
        result |= _differences(right)
        if run.bags.exists():
            result |= scores.bag_purity(run.bags, bank_folder)
            result["protocol"]["test_images_trained_on"] = scores.trained_on(
                run.bags, sides.query_folder.only(sides.query_places)
            )
        _write(result, run, json_file, subjects.contracts, sides, heads)
        if extras.mistakes:
            _keep_mistakes(run, by_name["student"], sides, heads["student"])
        show(result, run, Models(subjects.recipe, subjects.encoders["teacher"], subjects.encoders["student"]))
        answers.say(rows, sides)
        _refuse_under(least, [by_name[name] for name in subjects.contracts or ("student",)], len(sides.labels))
        return result

    return distributed.from_first(judge)


@dataclass(frozen=True)
class Subjects:
    """What is proven. encoders: teacher, student, the student before, random weights and the student of another run, by
    their rows; contracts: of each exported file; weights: digests of the run's own files of weights.
    """

    recipe: Recipe
    encoders: dict[str, Encoder]
    contracts: dict[str, dict[str, Any]]
    weights: dict[str, str]

    @property
    def trainable(self) -> dict[str, Encoder]:
        """What may be trained with labels: the teacher would be expensive."""
        return {name: encoder for name, encoder in self.encoders.items() if name in ("student", "start", "random")}


def _subjects(run: run_dir.RunDir, other: run_dir.RunDir | None, given: Given) -> Subjects:
    """All models of a run. Raises BingoError where one of its files is not the run's."""
    recipe = load_recipe(run.as_run)
    weights = {file.stem: exported.weights_digest(file) for file in (run.student, run.start) if file.exists()}
    contracts = {name: _contract(file, weights["student"]) for name, file in exported.files(run.export).items()}
    encoders = {
        "teacher": trained.load_teacher(recipe, run, given.teacher),
        "student": load_student(recipe, run.student, given.student),
    }
    if run.start.exists():
        encoders["start"] = trained.load_start(recipe, run, given.student)
    if run.bags.exists():
        trained.refuse_other_bags(run)
    encoders["random"] = build_student(recipe, "random", "random row", given.student)
    if other:
        encoders["against"] = load_student(load_recipe(other.as_run), other.student)
    return Subjects(recipe, encoders, contracts, weights)


def _runnable(
    subjects: Subjects, run: run_dir.RunDir, device: torch.device
) -> dict[str, tuple[Preprocessing, extract.Embed]]:
    """Encoders and exported files as functions of pictures, in the order of their rows: another run's student last."""
    models = {name: extract.as_embed(encoder, device) for name, encoder in subjects.encoders.items()}
    against = models.pop("against", None)
    for name, contract in subjects.contracts.items():
        file = run.export / contract["file"]
        models[name] = _preprocessing(file, contract), _features_of(file)
    return models | ({"against": against} if against else {})


def _digests(subjects: Subjects) -> dict[str, str]:
    """Of what features are made from, by row."""
    made_from = {name: weights_digest(encoder) for name, encoder in subjects.encoders.items()}
    return made_from | {name: contract["sha256"] for name, contract in subjects.contracts.items()}


def _rows(
    subjects: Subjects,
    models: Mapping[str, tuple[Preprocessing, extract.Embed]],
    sides: Sides,
    specs: list[str],
    folder: Path,
) -> tuple[list[dict[str, Any]], dict[str, probes.LinearHead], dict[str, dict[str, Tensor]]]:
    """(figures, linear head, per test image whether kNN and linear were right) of each model. folder: of the files."""
    rows: list[dict[str, Any]] = []
    heads: dict[str, probes.LinearHead] = {}
    right: dict[str, dict[str, Tensor]] = {}
    for name in models:
        # The float file has the student's own head: one fitted anew on features that differ by rounding may end
        # elsewhere. Where a file sees pictures otherwise, and in int8, the features are others, and the head that the
        # device will have is fitted on those.
        alike = name == "onnx" and models[name][0] == models["student"][0]
        heads[name] = (
            heads["student"]
            if alike
            else probes.fit_linear(sides.bank[name], sides.labels, len(sides.classes), groups=sides.groups)
        )
        contract = subjects.contracts.get(name, {})
        knows = "scores" in contract.get("outputs", ())
        own = answers.in_classes_of(sides, folder / contract["file"], contract, models[name][0]) if knows else None
        found, right[name] = figures_of(name, sides, heads[name], own)
        if name == "student" or contract:
            found |= scores.by_class(heads[name].predict(sides.queries[name]), sides)
        if specs and not contract:
            found["shots"] = {spec: scores.few_labels(name, sides, spec) for spec in specs}
        source = {"weights": subjects.weights[name]} if name in subjects.weights else {}
        if contract:
            source = {key: contract[key] for key in ("file", "sha256")}
            found |= answers.other_classes(contract, sides) if knows else {}
        rows.append({"name": name, **source, **found})
    student = next(row for row in rows if row["name"] == "student")
    student |= scores.gap_closed(*(right[name]["linear"] for name in ("random", "student", "teacher")))
    return rows, heads, right


def _differences(right: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """The student against another run's ("paired") and against itself before ("gain"), where those were judged."""
    others = {"paired": "against", "gain": "start"}
    return {
        name: {key: scores.compared(right["student"][key], right[other][key]) for key in ("knn", "linear")}
        for name, other in others.items()
        if other in right
    }


def _keep_mistakes(run: run_dir.RunDir, row: dict[str, Any], sides: Sides, head: probes.LinearHead) -> None:
    tested, logits = sides.query_folder.only(sides.query_places), head.logits(sides.queries["student"])
    with looking.spared(run):
        mistakes.save(run, row, tested, logits, sides.query_labels, sides.classes)


def _write(
    result: dict[str, Any],
    run: run_dir.RunDir,
    json_file: Path | None,
    contracts: Mapping[str, dict[str, Any]],
    sides: Sides,
    heads: Mapping[str, probes.LinearHead],
) -> None:
    """The proof's file, a linear head and a bank beside each exported file, and the card that tells of both. One with
    classes in it keeps the head that it was exported with.
    """
    for name, contract in contracts.items():
        if "classes" not in contract:
            save_heads(run.export / contract["file"], contract["sha256"], heads[name], name, sides)
    for file in filter(None, (run.validation, json_file)):
        run_dir.write_text(file, _json(result))
    run_dir.drop_stale(run.work, "proof", set())
    if contracts:
        model_card.renew(run, run.export)
    else:  # it would say how to use files that are not there
        (run.export / exported.CARD).unlink(missing_ok=True)


def parse_required(words: Sequence[str]) -> dict[str, float]:
    """["linear=0.6"] to {"linear": 0.6}. Raises BingoError."""
    least = {}
    for word in words:
        key, _, value = word.partition("=")
        try:
            least[key] = float(value)
        except ValueError:
            least[key] = -1.0
        if key not in REQUIRED or not 0 <= least[key] <= 1:
            raise BingoError(f"--require: expected {' or '.join(f'{name}=0.60' for name in REQUIRED)}, found {word!r}")
    return least


def _refuse_under(least: dict[str, float], rows: Sequence[dict[str, Any]], bank: int) -> None:
    """Of what goes to devices: every exported file, or the student where there is none yet. bank: how many images
    recall's neighbours are found among.
    """
    if not least:
        return
    if rows[0]["name"] == "student":
        console.say("--require is asked of the student: there is no exported file yet; export, and validate again")
    notes, chance = {"neighbour_recall": f"; {neighbours.recall_title(bank)}"}, neighbours.recall_facts(bank)["chance"]
    under = []
    for row in rows:
        missed = [
            (
                f"{key} {row[key]:.4f} (at least {value:g}{notes.get(key, '')})"
                if key in row
                else f"{key} not measured ({FIGURES[key].how(bank).removeprefix('not measured: ')})"
            )
            for key, value in least.items()
            if not row.get(key, -1.0) >= value
        ]
        under += [f"{row.get('file', 'the student')} with {', '.join(missed)}"] if missed else []
    if not under and "neighbour_recall" in least and least["neighbour_recall"] <= chance:
        under = [
            f"neighbour_recall={least['neighbour_recall']:g} asks for no more than what is found by chance,"
            f" {chance:.3f}"
        ]
    if under:
        raise BingoError(f"--require: below what is asked for: {'; '.join(under)}", 3)


def _contract(file: Path, student: str) -> dict[str, Any]:
    """What an exported file says of itself. student: digest of the run's student's weights, of which the file must be.
    Raises BingoError.
    """
    contract = exported.contract(file)
    if contract.get("student_weights") != student:
        found = str(contract.get("student_weights", "one that does not say of which, as earlier versions wrote"))[:80]
        raise BingoError(
            f"{file}: expected a file exported from the run's student (weights {student}), found {found}; export again,"
            " or delete the file"
        )
    return contract


def _preprocessing(file: Path, contract: dict[str, Any]) -> Preprocessing:
    """How an exported file's pictures are to be prepared, by its own word. Raises BingoError."""
    with run_dir.made_by("export", file):
        rule, values = contract["preprocess"], contract["normalization"]
        size, mean, std = contract["input"]["size"], tuple(values["mean"]), tuple(values["std"])
        return Preprocessing(size, rule["crop_pct"], rule["interpolation"], rule.get("crop_mode", "center"), mean, std)


def _features_of(file: Path) -> extract.Embed:
    run = onnx_runner(file)
    return lambda batch: run(batch)[1]


def _open_against(path: Path) -> run_dir.RunDir:
    try:
        return run_dir.open_finished(path)
    except BingoError as error:
        raise BingoError(f"--against:{str(error).removeprefix('--run:')}") from None


def _train_with_labels(
    rows: dict[str, dict[str, Any]],
    encoders: dict[str, Encoder],
    sides: Sides,
    specs: list[str],
    literature: bool,
    run: run_dir.RunDir,
    device: torch.device,
) -> None:
    """Add what costs training on pixels to the rows of `encoders`: fine-tuning on each of `specs`, and the literature's
    linear protocol.
    """
    work = run.work / "labelled"  # of its own: building a store deletes the others of its folder
    work.mkdir(parents=True, exist_ok=True)
    classes = len(sides.classes)
    store, stored = pixel_store.build(
        sides.bank_folder, pixel_store.store_side(encoders["student"].preprocessing.size, 0), work, device
    )
    place = {path: position for position, path in enumerate(stored.files)}
    places = torch.tensor([place[sides.bank_folder.files[index]] for index in sides.places])
    bank = finetune.Labelled(store, places, sides.labels, classes)
    tuned: dict[str, tuple[Preprocessing, extract.Embed]] = {}
    for name, encoder in encoders.items():
        if literature:
            head = finetune.linear_with_augmentation(encoder, bank, device, what=f"linear, augmented: {name}")
            rows[name] |= scores.with_interval("literature", head.predict(sides.queries[name]) == sides.query_labels)
        for spec in specs:
            chosen = finetune.subset(sides.labels, spec, 0)
            what = f"fine-tune on {spec}: {name}"
            predict = finetune.fine_tune(encoder, bank.only(chosen), device, what=what)
            tuned[f"{spec}: {name}"] = encoder.preprocessing, predict
    if tuned:
        for which, predicted in scores.again(
            tuned, sides.query_folder, sides.query_places, "test the fine-tuned"
        ).items():
            spec, name = which.split(": ")
            rows[name]["shots"][spec] |= scores.with_interval("fine_tuned", predicted == sides.query_labels)


def _json(result: dict[str, Any]) -> str:
    """Readable JSON: a list of plain numbers, such as a row of a confusion matrix, on one line."""
    return (
        re.sub(
            r"\[\n[\d\s.,eE+-]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", json.dumps(result, indent=2)
        )
        + "\n"
    )


def save_heads(file: Path, sha256: str, head: probes.LinearHead, name: str, sides: Sides) -> None:
    """STEM.linear.npz and STEM.bank.npz beside the exported file of that sha256, for `bingo-edge classify`: head and
    bank of the proof's row `name`, the head calibrated as one in a file is.
    """
    on = sides.bank[name], sides.labels, sides.classes, sides.groups
    paths = [sides.bank_folder.files[place] for place in sides.places]
    fitting.save(file, sha256, fitting.fit("linear", *on, head))
    fitting.save(file, sha256, replace(fitting.knn(*on), paths=paths))
