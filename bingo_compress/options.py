"""The words of every command, once: the command line asks for them with the help that stands here, Python by name.

A field with a `Word` is an option of the command line; one without is Python's alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from bingo_compress import words
from bingo_compress.words import Data, Json, Page, Place, RunFolder, Settings, TestFolder, Word, places, setting

if TYPE_CHECKING:
    from bingo_compress.models.encoder import Encoder
    from bingo_compress.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Check:
    """Say what is in a folder, what cannot be used and why."""

    data: Annotated[Data, places(f"{words.IMAGES}; {words.AGAIN}")]
    image_column: Annotated[str, words.IMAGE_COLUMN] = ""
    label_column: Annotated[str, words.LABEL_COLUMN] = ""
    bands: Annotated[str, Word("data", "red, green and blue of TIFF files of many bands, for example 3,2,1")] = ""
    teacher: Annotated[
        str | None, Word("models", "a timm model or family that looks for near-copies: bursts, video frames")
    ] = None
    teacher_weights: Annotated[str, Word("models", "pretrained, a file, or random")] = "pretrained"
    teacher_size: Annotated[int, Word("models", words.OWN_SIZE.format("teacher"), int)] = 0
    device: Annotated[str, words.DEVICE] = "auto"
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run and a comparison of runs are both asked for."""

    data: Annotated[Data | None, places(f"{words.IMAGES}; {words.AGAIN}")]
    teacher: Annotated["str | Encoder | None", Word("models", "a timm model or family")]
    student: Annotated["str | Encoder | None", Word("models", "a timm model or family")]
    recipe: Annotated[
        "str | Path | Recipe | None", Word("run", "a YAML file, or the name of a recipe that comes with the package")
    ] = None
    settings: Annotated[Settings, setting("any setting of the recipe; may be repeated")] = ()
    teacher_weights: Annotated[str | None, Word("models", "pretrained (default), a file, or random")] = None
    student_weights: Annotated[
        str | None,
        Word("models", "auto (pretrained where timm has weights, else random), pretrained, random, or a file"),
    ] = None
    teacher_size: Annotated[int | None, Word("models", words.OWN_SIZE.format("teacher"), int)] = None
    image_size: Annotated[int | None, Word("models", words.OWN_SIZE.format("student"), int)] = None
    bag_size: Annotated[int | None, Word("method", "nearest neighbours that make an image's bag", int)] = None
    views: Annotated[str | int | None, Word("method", "teacher views stored an image, or online")] = None
    epochs: Annotated[float | None, Word("schedule", "passes over the folder", float)] = None
    batch_size: Annotated[int | None, Word("schedule", "anchors a step", int)] = None
    device: Annotated[str | None, words.DEVICE] = None
    threads: Annotated[int | None, Word("machine", "CPU threads; default: a short calibration picks", int)] = None
    pixels: Annotated[
        str | None, Word("machine", "where decoded images are kept: auto, gpu, memory, disk, encoded or stream")
    ] = None
    memory: Annotated[str | None, Word("machine", "memory the run may hold at most, for example 4GB")] = None
    image_column: Annotated[str | None, words.IMAGE_COLUMN] = None
    label_column: Annotated[str | None, words.LABEL_COLUMN] = None
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Run(Training):
    """What a run is asked for, whoever makes it."""

    data: Annotated[Data | None, places(f"{words.IMAGES}; {words.AGAIN}; no labels are needed")] = None
    teacher: Annotated["str | Encoder | None", Word("models", "a timm model or family, for example resnet152")] = None
    student: Annotated["str | Encoder | None", Word("models", "a timm model or family, for example mobilenetv3")] = None
    out: Annotated[Place, Word("run", "folder for all that it makes", Path)] = Path("runs/first")
    time: Annotated[
        str | None,
        Word("schedule", "instead of --epochs: as many as fit, with all else, for example into 45m, 2h or 1h30m"),
    ] = None
    method: Annotated[
        str | None, Word("method", "bingo, or one to compare with: seed, disco, compress, simreg, coss, moco, self")
    ] = None
    bags: Annotated[str | None, Word("method", "knn, adaptive, kmeans, labels or none")] = None
    queue_size: Annotated[int | None, Word("method", "teacher embeddings kept as negatives", int)] = None
    temperature: Annotated[float | None, Word("method", "tau of the loss", float)] = None
    max_bad: Annotated[
        str | None,
        Word("data", "end the run if more files cannot be used: a share such as 5%, or a number; default: no limit"),
    ] = None
    profile: Annotated[
        bool | None, Word("machine", "write a trace of ten steps, trace.json, beside metrics.jsonl", bool)
    ] = None
    seed: Annotated[int | None, Word("schedule", "source of all random numbers", int)] = None
    keep_best: Annotated[
        bool | None, Word("schedule", "leave the student with the best neighbour recall on held-out images", bool)
    ] = None


@dataclass(frozen=True, kw_only=True)
class Distill(Run):
    """Distil a teacher into a student on a folder of images."""

    resume: Annotated[bool, Word("run", "go on with the run in --out", bool)] = False
    report: Page = True
    logger: Annotated[str, Word("run", "also tell a tracker: tensorboard, wandb or mlflow")] = ""
    overwrite: Annotated[
        bool, Word("run", "start the run in --out anew (stored pixels and embeddings that fit are used again)", bool)
    ] = False


@dataclass(frozen=True, kw_only=True)
class Try(Distill):
    """Say what a run would do and cost."""

    images: Annotated[int, Word("run", "with --dry-run: as if the folder had so many images", int)] = 0


@dataclass(frozen=True, kw_only=True)
class DistillOrTry(Try):
    """Distil a teacher into a student on a folder of images."""

    dry_run: Annotated[bool, Word("run", "print settings, sizes, steps, memory and time, then stop", bool)] = False


@dataclass(frozen=True, kw_only=True)
class Embed(Run):
    """Decode and embed one share of a folder: an array job.

    Jobs share --out, take the words of distill and wait for nobody. The last line says what comes next.
    """

    shard: Annotated[str, Word("run", "this job's number, from 0, and how many there are", metavar="I/N")]


@dataclass(frozen=True, kw_only=True)
class Compare(Training):
    """Several methods side by side: equal passes, seeds, one table.

    A method with settings after colons is a variant; every arm's student sees as many views.
    """

    labels: Annotated[Data, places("labelled images, one folder a class: the bank of the probes")]
    test: Annotated[Data | None, places("labelled images to judge on; default: --labels, cross-validated")] = None
    methods: Annotated[
        str, Word("method", "names with commas between; settings after colons: bingo:bag_size=1:bags=kmeans")
    ] = "bingo,seed,disco,compress,simreg,coss,moco,self"
    seeds: Annotated[str, Word("schedule", "numbers with commas between")] = "0,1,2"
    epochs: Annotated[
        float | None,
        Word("schedule", "passes over the folder, two student views an image; every method gets as many views", float),
    ] = None
    out: Annotated[
        Place, Word("run", "folder for tables and shared stages; the same command again goes on where it was", Path)
    ] = Path("runs/compare")
    overwrite: Annotated[
        bool, Word("run", "run everything anew (pixels and teacher embeddings are used again)", bool)
    ] = False


@dataclass(frozen=True, kw_only=True)
class Validate:
    """Prove a run: kNN, linear probe and recall of each of its models.

    Of teacher, student, the student before, one with random weights, and every exported file.
    """

    run: RunFolder
    data: Annotated[Data, places(words.LABELLED)]
    test: TestFolder = None
    json: Json = None
    shots: Annotated[
        str, Word("method", "probe on a part of the labels too: shares or images a class with commas between, 1%,10%,5")
    ] = ""
    fine_tune: Annotated[
        bool,
        Word("method", "with --shots: also train the whole of student, start and random weights on each part", bool),
    ] = False
    literature: Annotated[
        bool, Word("method", "also the literature's linear probe: 100 epochs of crops and flips; costs time", bool)
    ] = False
    against: Annotated[
        Place | None, Word("run", "the --out folder of another run: compare the two students on the same images", Path)
    ] = None
    require: Annotated[
        Sequence[str],
        Word(
            "run",
            "end with status 3 where an exported file (without one: the student) is below; knn=0.58, linear=0.60,"
            " own_classes=0.60 (of classes in the file); may be repeated",
            list[str],
            metavar="KEY=VALUE",
        ),
    ] = ()
    image_column: Annotated[str, words.IMAGE_COLUMN] = ""
    label_column: Annotated[str, words.LABEL_COLUMN] = ""
    device: Annotated[str, words.DEVICE] = "auto"
    report: Page = True
    teacher: "Encoder | None" = None
    student: "Encoder | None" = None
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the student as ONNX files, proven on your own images.

    Float and int8, each shown to be the model that torch has.
    """

    run: RunFolder
    out: Annotated[Place | None, Word("run", "folder for the files; default: RUN/export", Path)] = None
    data: Annotated[Data | None, places("where the run's images are now, if they moved")] = None
    format: Annotated[
        str, Word("method", "onnx, onnx-fp16, onnx-int8, all of these, openvino, tflite; with commas between")
    ] = "onnx"
    python: Annotated[Sequence[str], words.PYTHON] = ()
    profile: Annotated[
        str,
        Word(
            "method",
            "modern (opset 21, any batch, uint8) or edge (opset 17, IR 8, batch 1, float32-nchw, for device makers'"
            " converters)",
        ),
    ] = "modern"
    batch: Annotated[str | None, Word("method", "dynamic or a number, instead of the profile's")] = None
    opset: Annotated[int | None, Word("method", "opset of the ONNX domain, instead of the profile's", int)] = None
    input: Annotated[
        str | None,
        Word(
            "method",
            "what the file takes, instead of the profile's: uint8-nhwc (pixels as they are), float32-nchw (0 to 1) or"
            " float32-nchw-normalised (less mean, by std)",
        ),
    ] = None
    outputs: Annotated[
        str | None,
        Word("method", "embedding, features, scores, distance with commas between; default: all that there are"),
    ] = None
    image_size: Annotated[int | None, Word("models", "pixels a side of the file; default: the run's", int)] = None
    labels: Annotated[
        Data | None,
        places("labelled images, one folder a class: for --head, and int8 may lose --max-loss points on them"),
    ] = None
    test: TestFolder = None
    head: Annotated[
        str,
        Word(
            "method",
            "classes in the file, as an output scores: linear or knn, fitted on --labels, or a head that validate wrote"
            " beside the file, student.linear.npz",
            metavar="linear|knn|FILE",
        ),
    ] = ""
    max_loss: Annotated[float, Word("method", "points of kNN and linear accuracy that int8 may lose", float)] = 0.5
    finetune: Annotated[
        bool,
        Word(
            "method",
            "where no way of quantising passes: train the quantised student on the run's own images, no labels",
            bool,
        ),
    ] = False
    calibration_set: Annotated[
        Place | None,
        Word("run", "a folder for the pictures that int8 is calibrated on: for a device maker's quantiser", Path),
    ] = None
    image_column: Annotated[str, words.IMAGE_COLUMN] = ""
    label_column: Annotated[str, words.LABEL_COLUMN] = ""
    report: Page = True
    student: "Encoder | None" = None
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the page on a run again, or one on several runs.

    One file that needs no network; without --paths it holds no path and no file name of yours.
    """

    runs: Annotated[
        Sequence[Place], Word("run", "--out folders of finished runs", list[Path], metavar="RUN...", positional=True)
    ]
    out: Annotated[
        Place | None, Word("run", "the page, an .html file; default: report.html in RUN, which is one", Path)
    ] = None
    images: Annotated[bool, Word("data", "small pictures of your images in it", bool, "--images/--no-images")] = True
    paths: Annotated[bool, Word("data", "names of your files and folders in it", bool)] = False
    device: Annotated[str, words.DEVICE] = "auto"
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time ONNX files against each other on this processor, in turn.

    p50, p90, p99, load time and memory of each, and what each is of the first.
    """

    models: Annotated[
        Sequence[Place],
        Word("models", "ONNX files; each is compared with the first", list[Path], metavar="MODEL...", positional=True),
    ]
    threads: Annotated[
        Sequence[int],
        Word("machine", "threads inside an operator; may be repeated; default: 1 and all cores", list[int]),
    ] = ()
    runs: Annotated[int, Word("schedule", "timed runs of each file", int)] = 500
    warm_up: Annotated[int, Word("schedule", "runs of each file before those", int)] = 50
    json: Json = None
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Run an exported file in other toolchains: are the answers right?

    OpenVINO, OpenCV, tract, ncnn, MNN, TFLite and RKNN, each in a process of its own, on the golden pictures.
    """

    file: Annotated[Place, Word("models", "an exported ONNX file", Path, metavar="FILE", positional=True)]
    toolchains: Annotated[
        str,
        Word("run", "with commas between, for example openvino,opencv; default: all that are installed", name="--with"),
    ] = ""
    python: Annotated[Sequence[str], words.PYTHON] = ()
    seconds: Annotated[float, Word("machine", "that a toolchain may take", float)] = 600.0
    json: Json = None
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Suggest:
    """Find the student for a budget: milliseconds and megabytes.

    timm's for the edge, timed on this processor, or on the device by `bingo-edge measure`, best first; with --data the
    best few are tried on your images.
    """

    latency_ms: Annotated[
        float | None, Word("models", "at most so many milliseconds a picture, the median; default: any", float)
    ] = None
    size_mb: Annotated[float | None, Word("models", "at most so many megabytes; default: any", float)] = None
    students: Annotated[str, Word("models", "timm models with commas between; default: a list of 40")] = ""
    files: Annotated[
        Place | None,
        Word("machine", "only write the small files that `bingo-edge measure` times on a device, to this folder", Path),
    ] = None
    on: Annotated[
        Place | None, Word("machine", "the profile.json that `bingo-edge measure` wrote there; default: here", Path)
    ] = None
    data: Annotated[Data | None, places(f"{words.IMAGES}; {words.AGAIN}; the best are distilled on them briefly")] = (
        None
    )
    teacher: Annotated[str | None, Word("models", "with --data: a timm model or family")] = None
    top: Annotated[int, Word("schedule", "with --data: so many of the best are tried", int)] = 4
    epochs: Annotated[
        float,
        Word("schedule", "with --data: passes of the first round; the better half goes on to three times those", float),
    ] = 1.0
    settings: Annotated[Settings, setting("with --data: any setting of the recipe; may be repeated")] = ()
    out: Annotated[Place, Word("run", "with --data: folder for what the trials make", Path)] = Path("runs/suggest")
    plot: Annotated[Place | None, Word("run", "draw latency against accuracy to this .svg file", Path)] = None
    json: Json = None
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the runs in a folder with their figures, best first."""

    folder: Annotated[Place, Word("run", "where runs are, at most three folders down", Path, "", "DIR", True)]
    json: Json = None


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The whole road on photos that the `demo` extra brings along.

    Solar cells, their labels used at the end to measure; nothing to prepare.
    """

    out: Annotated[Place, Word("run", "folder for all that the demo makes", Path)] = Path("runs/demo")
    epochs: Annotated[float | None, Word("schedule", "passes over the photos; fewer is worse", float)] = None
    photos: Annotated[int, Word("data", "of both kinds in all; fewer is quicker and proves less", int)] = 2624
    seed: Annotated[int | None, Word("schedule", "source of all random numbers", int)] = None
    device: Annotated[str | None, words.DEVICE] = None
    overwrite: Annotated[bool, Word("run", "replace an earlier demo in --out", bool)] = False
    report: Page = True


@dataclass(frozen=True, kw_only=True)
class Models:
    """List models that can be teacher or student, with their sizes."""

    pattern: Annotated[
        str,
        Word("models", "part of a name, or with * and ?; default: a short list", metavar="[PATTERN]", positional=True),
    ] = ""
