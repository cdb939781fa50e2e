"""Every setting of a run, once: the same word is the command-line flag, the YAML key and the attribute."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bingo_compress.errors import BingoError, nearest


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _numbers_as_text(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _one_or_several(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    return tuple(value) if len(value) > 1 else next(iter(value), "")


def whole(value: float) -> float:
    """2.0 as 2, so that what is chosen and what is read back are the same text."""
    return int(value) if value.is_integer() else value


class Recipe(BaseModel):
    """A run's settings. Frozen: what is on screen, in resolved.yaml and in the code is one and the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    data: Annotated[str | tuple[str, ...], BeforeValidator(_one_or_several)] = Field(
        "",
        description=(
            "folder of images, searched to any depth, or a list, tar shards, a zip or Parquet file; several in a list;"
            " names of folders are never used as labels"
        ),
    )
    image_column: str = Field("", description="column of a list or Parquet file that has the images; empty: by name")
    label_column: str = Field("", description="column, or key of a JSON file, that has the labels; empty: by name")
    bands: Annotated[str, BeforeValidator(_numbers_as_text)] = Field(
        "",
        pattern=r"^([1-9][0-9]*(,[1-9][0-9]*){2})?$",
        description=(
            "of TIFF files of many bands that do not say which are red, green and blue: their numbers from 1, for"
            " example 3,2,1; empty: such files are left out"
        ),
    )
    max_bad: Annotated[str, BeforeValidator(_number_as_text)] = Field(
        "100%",
        pattern=r"^([0-9]+|(100|[0-9]{1,2}(\.[0-9]+)?)%)$",
        description=(
            "a share such as 5%, or a number: with more files that cannot be used the run ends (.txt, .json and the"
            " like are not counted)"
        ),
    )
    duplicates: Literal["keep", "drop", "near"] = Field(
        "keep",
        description=(
            "copies; drop: of exact copies one is used; near: of near-copies (bursts, video frames) and exact ones, one"
            " of each scene an epoch, another each time"
        ),
    )
    teacher: str = Field("", description="a timm model, or a family name such as resnet or mobilenetv3")
    student: str = Field("", description="a timm model, or a family name")
    teacher_weights: str = Field(
        "pretrained", description="pretrained (timm's own loader), a local file, or random (must be asked for)"
    )
    student_weights: str = Field(
        "auto", description="auto (pretrained where timm has weights, else random), pretrained, random, or a file"
    )
    ema: bool = Field(
        False,
        description=(
            "of weights files that hold a moving average beside what was averaged (model_ema and model): true takes the"
            " average, false the other; of DINO's teacher and student the teacher is taken"
        ),
    )
    teacher_size: int = Field(0, ge=0, description="pixels a side the teacher sees; 0: its own input size")
    image_size: int = Field(
        0, ge=0, description="pixels a side the student sees, in training and on the device; 0: its own input size"
    )

    method: Literal["bingo", "seed", "disco", "compress", "simreg", "coss", "moco", "self"] = Field(
        "bingo",
        description="distillation method; moco has no teacher, self takes the student's own moving average for one",
    )
    variant: Literal["soft", "paper", "official"] = Field(
        "soft",
        description=(
            "soft: 2 student views, 2 targets, the teacher's distribution; paper: 2 views, 1 target; official: CutMix,"
            " 3 views, 2 targets"
        ),
    )
    inter_weight: float = Field(
        0.5, ge=0, description="soft: weight of a view against the target of its bag mate (its own image's target: 1)"
    )
    switch_epoch: int = Field(
        11, ge=0, description="official: first epoch (from 0) whose weights are (0.5, 0.5) instead of (1, 0)"
    )
    bags: Literal["knn", "adaptive", "kmeans", "labels", "none"] = Field(
        "knn",
        description=(
            "knn: nearest neighbours; adaptive: those of them that can be trusted; kmeans; labels: folder names, an"
            " oracle; none"
        ),
    )
    bag_size: int = Field(5, ge=1, description="K: images that make an image's bag, at most (paper: 5)")
    clusters: int = Field(0, ge=0, description="kmeans: clusters; 0: one for every 20 images")
    search: Literal["auto", "exact", "ivf"] = Field(
        "auto",
        description=(
            "nearest neighbours for bags and near-copies: exact, or ivf with its recall measured; auto: exact up to"
            " 100,000 images, on a GPU 10 million"
        ),
    )
    queue_size: int = Field(
        65536,
        ge=1,
        description="teacher embeddings of earlier anchors kept as negatives; never more than there are images",
    )
    queue_start: Literal["auto", "targets", "empty"] = Field(
        "auto",
        description=(
            "what the queue holds at the first step: stored targets of the training images, or nothing, as in the"
            " papers; auto: targets for bingo's soft"
        ),
    )
    mask_mates: bool = Field(
        True, description="leave the anchor's own and its mates' embeddings out of its negatives (paper: false)"
    )
    temperature: float = Field(0.0, ge=0, description="tau of the loss; 0: the method's own, 0.2 (compress: 0.04)")
    teacher_temperature: float = Field(
        0.0, ge=0, description="soft, seed: tau of the teacher's softmax; 0: the method's own, soft 0.1, seed 0.01"
    )
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="disco, moco, self: share kept by the moving average; 0: 0.999, under 50,000 steps 0.99",
    )
    rebag_epochs: int = Field(5, ge=1, description="self: bags are rebuilt this often")
    views: Annotated[str, BeforeValidator(_number_as_text)] = Field(
        "4",
        pattern=r"^([1-9][0-9]*|online)$",
        description="teacher views stored an image, or online: the teacher runs in every step",
    )
    stored_views: Literal["auto", "drawn", "mean"] = Field(
        "auto",
        description=(
            "a target is one of the stored views, drawn in each step, or their mean; auto: mean for bingo's soft, else"
            " drawn"
        ),
    )
    stored_as: Literal["float16", "int8"] = Field(
        "float16",
        description=(
            "float16: views as the teacher gave them, 2 bytes a number; int8: as targets, a byte a dimension and 6 more"
            " (262 a view; with a larger target_dim, or target raw, more), read from disk in training"
        ),
    )
    target: Literal["auto", "raw", "centred", "pca", "whitened"] = Field(
        "auto",
        description="teacher embedding as target; auto: raw where the checkpoint has a projection head, else pca",
    )
    target_dim: int = Field(256, ge=1, description="pca, whitened: dimensions kept of the centred teacher embedding")
    head_hidden: int = Field(2048, ge=1, description="hidden width of the student's projection head (paper: 2048)")

    epochs: Annotated[float, AfterValidator(whole)] = Field(
        0.0,
        ge=0,
        description=(
            "passes over the folder, each image an anchor once; 2.5: half of the images once more; 0: 100, from known"
            " weights 10"
        ),
    )
    time: str = Field(
        "",
        pattern=r"^([0-9]+(\.[0-9]+)?h)?([0-9]+(\.[0-9]+)?m)?([0-9]+(\.[0-9]+)?s)?$",
        description="instead of epochs: how long the run may take, for example 45m, 2h or 1h30m; empty: epochs say it",
    )
    batch_size: int = Field(
        128, ge=2, description="anchors a step; the student sees two views an anchor (official: three)"
    )
    optimizer: Literal["auto", "sgd", "adamw"] = Field(
        "auto", description="auto: adamw under 50,000 steps, else sgd as in the paper"
    )
    lr: float = Field(
        0.0,
        ge=0,
        description="peak rate; 0: sgd 0.03 x batch/256, adamw 0.003 x sqrt(batch/128), less if known and few steps",
    )
    backbone_lr: float = Field(
        0.0, ge=0, description="share of lr at which the student under its head learns; 0: 1, from known weights 0.1"
    )
    head_first: float = Field(
        -1.0,
        ge=-1,
        lt=1,
        description="share of the steps in which the head learns alone; -1: 0, from known weights 0.25",
    )
    norms: Literal["auto", "learnt", "frozen"] = Field(
        "auto", description="running statistics of the student's BatchNorm; auto: learnt, from known weights frozen"
    )
    weight_decay: float = Field(
        1e-4, ge=0, description="of weights, not of biases and norms under adamw (paper: 1e-4; EfficientNet-B0 4e-5)"
    )
    warmup_epochs: float = Field(
        -1.0, ge=-1, description="linear warm-up before the cosine; -1: none with sgd, 5% of the run with adamw"
    )
    crop_scale_min: float = Field(
        0.0,
        ge=0,
        le=1,
        description="smallest share of the area that a crop keeps; 0: 0.2, from random weights under a teacher 0.6",
    )

    hold_out: float = Field(
        0.05, ge=0, lt=1, description="share of the images kept out of training for the closing check (at most 1,000)"
    )
    check_every: int = Field(
        0, ge=0, description="epochs between two checks of neighbour recall on the held-out images; 0: only at the end"
    )
    keep_best: bool = Field(
        False,
        description=(
            "leave the student of the best check (10 where check_every is 0): of one half of the held-out images, the"
            " closing figure of the other"
        ),
    )
    save_every_minutes: float = Field(
        2.0,
        gt=0,
        description=(
            "a checkpoint is written this often, after an epoch if the last one is half a minute old, and at the end"
        ),
    )
    save_every_steps: int = Field(0, ge=0, description="and after so many steps; 0: by time alone")
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0: a short calibration picks, once a run")
    pixels: Literal["auto", "gpu", "memory", "disk", "encoded", "stream"] = Field(
        "auto",
        description=(
            "where decoded images are kept; disk: read by the crop; encoded: on disk as JPEGs, 7 to 12 times smaller,"
            " crops take 2 to 3 times as long and lose a little; stream: nowhere, files are decoded for every crop;"
            " auto: the first that fits; all but encoded give the same crops (on a GPU to a level or so), and --resume"
            " may change between those"
        ),
    )
    memory: str = Field(
        "",
        pattern=r"^\s*([0-9]+(\.[0-9]*)?\s*[kKmMgGtT]?[bB]?)?\s*$",
        description=(
            "memory the run may hold at most, for example 4GB: what does not fit is read from disk; empty: 80% of what"
            " is free"
        ),
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description=(
            "torch.compile of the student; auto: on a GPU, for runs of 5,000 steps or more, if a step is measured to be"
            " faster"
        ),
    )
    profile: bool = Field(False, description="write a trace of ten steps beside metrics.jsonl")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where torch sees a GPU")
    seed: int = Field(0, ge=0, description="the one source of all random numbers")


KEYS = tuple(Recipe.model_fields)
# A run's result depends on these in its last bits at most (threads, device, compile; it is said), so --resume may
# change them; but for pixels from or to `encoded`: `may_change`.
RESUME_MAY_CHANGE = frozenset(
    {"data", "image_column", "label_column", "threads", "device", "pixels", "memory", "max_bad"}
    | {"save_every_minutes", "save_every_steps", "compile", "profile"}
)
GIVEN = "given"  # weights of a module of the user's own, which a call from Python brings along
WORDS = frozenset({"auto", "pretrained", "random", GIVEN})  # weights that are no file
PLACES = ("data", "teacher_weights", "student_weights")  # where ~ is the home folder
# Names of files: what is in them is what counts, and has a digest of its own.
FILES = frozenset({"teacher_weights", "student_weights"})
_SHIPPED = (Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes")
RECIPES_DIR = next(filter(Path.is_dir, _SHIPPED), Path("recipes"))


def recipe_file(name: str) -> Path:
    """A recipe by path, or by the name of one that comes with the package. Raises BingoError."""
    shipped = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))
    for path in (Path(os.path.expanduser(name)), RECIPES_DIR / f"{name}.yaml"):
        if path.is_file():
            return path
    raise BingoError(f"--recipe: expected a YAML file or one of {', '.join(shipped)}; found no file {name!r}")


def load_recipe(file: Path | None, settings: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> Recipe:
    """Defaults, then the file, then each KEY=VALUE of `settings`, then the flags that were given. Raises BingoError."""
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_read_yaml(file))
    values.update(parse_setting(setting, "--set") for setting in settings)
    values.update({key: value for key, value in (flags or {}).items() if value is not None})
    return make_recipe(values, str(file) if file else "the command line")


def parse_setting(setting: str, option: str) -> tuple[str, Any]:
    """KEY=VALUE to (key, value). Raises BingoError."""
    key, separator, text = setting.partition("=")
    if not separator:
        raise BingoError(f"{option}: expected KEY=VALUE, found {setting!r}; for example temperature=0.1")
    return key.strip(), _yaml_scalar(text, key)


def make_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Check and build. Raises BingoError that names the key, what it wants and what it got."""
    for key in values:
        if key not in KEYS:
            raise BingoError(f"{source}: unknown key {key!r}; the nearest is {nearest(str(key), KEYS, 1)[0]!r}")
    try:
        made = Recipe.model_validate({key: _meant(key, value) for key, value in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        wrong = "expected another form" if first["type"] == "string_pattern_mismatch" else first["msg"]
        raise BingoError(
            f"{source}: {key}: {wrong}, found {shortened(first['input'])[:200]}; {key} is"
            f" {Recipe.model_fields[key].description}"
        ) from None
    if made.time and made.epochs:
        raise BingoError(
            f"{source}: expected a time or epochs, found both, {made.time} and {made.epochs}; leave one out (--epochs 0"
            " undoes a recipe's)"
        )
    return made


def may_change(*recipes: Recipe) -> frozenset[str]:
    """The settings in which runs by these recipes may differ and be one run: encoded pixels are other pixels."""
    return RESUME_MAY_CHANGE - ({"pixels"} if "encoded" in {recipe.pixels for recipe in recipes} else set())


def deciding(recipe: Recipe) -> dict[str, Any]:
    """The settings on which a result depends; files of weights have digests instead, and a time has become epochs."""
    free = may_change(recipe) | FILES | {"time"}
    return {key: value for key, value in recipe.model_dump().items() if key not in free}


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise BingoError(f"{file}: cannot be read ({error})") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise BingoError(f"{file}: expected YAML, found something else ({error})") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise BingoError(f"{file}: expected lines of 'key: value', found a {type(values).__name__}")
    assert node is not None
    if twice := repeated([key.value for key, _ in node.value]):  # YAML takes the last one without a word
        raise BingoError(f"{file}: expected each setting once, found {twice!r} more often; leave one of them")
    return values


def repeated(names: Sequence[str]) -> str:
    """The first name that was there before, or "" where each is there once."""
    return next((name for place, name in enumerate(names) if name in names[:place]), "")


def _yaml_scalar(text: str, key: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise BingoError(f"--set {key}: expected a plain value, found {text!r}") from None


def _meant(key: str, value: Any) -> Any:
    """A path from ~ on is one in the home folder. YAML 1.1 reads 3e-4 as text; where a float is wanted, people mean the
    number.
    """
    if key in PLACES and isinstance(value, str):
        return os.path.expanduser(value)
    if key in PLACES and isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return list(map(os.path.expanduser, value))
    try:
        return float(value) if isinstance(value, str) and Recipe.model_fields[key].annotation is float else value
    except ValueError:
        return value
