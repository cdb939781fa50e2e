"""Settings: who wins, what is refused and in which words, and that a saved recipe reads back equal."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from bingo_compress.errors import BingoError
from bingo_compress.recipe import KEYS, RECIPES_DIR, Recipe, load_recipe, make_recipe, recipe_file, recipe_text

SHIPPED = sorted(RECIPES_DIR.glob("*.yaml"))


def written(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "settings.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refusal(file: Path | None, *settings: str, **flags: object) -> str:
    with pytest.raises(BingoError) as caught:
        load_recipe(file, list(settings), flags)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- who wins


def test_flags_beat_set_beats_the_file_beats_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, "epochs: 7\ntemperature: 0.1\nseed: 3\n")
    recipe = load_recipe(file, ["temperature=0.15", "epochs=8"], {"epochs": 9, "temperature": None, "seed": None})
    assert (recipe.epochs, recipe.temperature, recipe.seed) == (9, 0.15, 3)
    assert recipe.bag_size == 5


def test_the_last_set_wins() -> None:
    assert load_recipe(None, ["epochs=2", "epochs=3"], {}).epochs == 3
    assert [repr(load_recipe(None, [f"epochs={text}"], {}).epochs) for text in ("3", "3.0", "2.5")] == ["3", "3", "2.5"]


def test_nothing_given_is_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(None, [], {}) == Recipe() == load_recipe(written(tmp_path, "# only a comment\n"), [], {})


def test_flags_that_are_false_or_zero_count_as_given(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path, "mask_mates: true\nhold_out: 0.1\n"), [], {"mask_mates": False, "hold_out": 0.0}
    )
    assert (recipe.mask_mates, recipe.hold_out) == (False, 0.0)


# ---------------------------------------------------------------- how values are read


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("3E-4", 3e-4), ("0.03", 0.03), ("1", 1.0), ("1e-05", 1e-5), (" .5", 0.5), ("'2'", 2.0)],
)
def test_numbers_are_read_alike_from_set_and_file(tmp_path: Path, text: str, value: float) -> None:
    for recipe in (load_recipe(None, [f"lr={text}"], {}), load_recipe(written(tmp_path, f"lr: {text}\n"), [], {})):
        assert recipe.lr == value
        assert type(recipe.lr) is float


@pytest.mark.parametrize(("value", "stored"), [(4, "4"), ("4", "4"), ("online", "online"), (200, "200")])
def test_views_are_a_count_or_online(tmp_path: Path, value: object, stored: str) -> None:
    file = written(tmp_path, yaml.safe_dump({"views": value}))
    for recipe in (
        load_recipe(file, [], {}),
        load_recipe(None, [f"views={value}"], {}),
        load_recipe(None, [], {"views": str(value)}),
    ):
        assert recipe.views == stored


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true", "'4 '", "offline", "null"])
def test_other_views_are_refused(value: str) -> None:
    assert "views:" in refusal(None, f"views={value}")


def test_words_that_look_like_numbers_stay_words(tmp_path: Path) -> None:
    assert load_recipe(None, ["data=1e3"], {}).data == "1e3"
    assert load_recipe(None, [], {"data": "2024"}).data == "2024"
    assert load_recipe(None, ["data=a=b"], {}).data == "a=b"
    assert load_recipe(written(tmp_path, "data: données/☃\n"), [], {}).data == "données/☃"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("temprature", "temperature"),
        ("learning_rate", "lr"),
        ("bagsize", "bag_size"),
        ("Epochs", "epochs"),
        ("teacher-size", "teacher_size"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, wrong: str, meant: str) -> None:
    from_file = refusal(written(tmp_path, f"{wrong}: 1\n"))
    from_set = refusal(None, f"{wrong}=1")
    assert repr(wrong) in from_file and str(tmp_path) in from_file
    assert repr(wrong) in from_set
    nearest = re.search(r"nearest is '(\w+)'", from_set)
    assert nearest is not None and nearest[1] in KEYS
    if wrong != "learning_rate":  # the words have no letters in common order; any known key may be nearest
        assert nearest[1] == meant


@pytest.mark.parametrize(
    ("key", "value", "wanted", "found"),
    [
        ("epochs", "many", "valid number", "'many'"),
        ("epochs", "true", "valid number", "True"),
        ("epochs", "", "valid number", "None"),
        ("epochs", "-1", "greater than or equal to 0", "-1"),
        ("bag_size", "2.5", "valid integer", "2.5"),
        ("batch_size", "1", "greater than or equal to 2", "1"),
        ("temperature", "warm", "valid number", "'warm'"),
        ("temperature", "-1", "greater than or equal to 0", "-1"),
        ("temperature", ".inf", "finite", "inf"),
        ("lr", "nan", "finite", "nan"),
        ("lr", "1e999", "finite", "inf"),
        ("crop_scale_min", "1.5", "less than or equal to 1", "1.5"),
        ("hold_out", "1", "less than 1", "1"),
        ("mask_mates", "1", "valid boolean", "1"),
        ("method", "dino", "'bingo'", "'dino'"),
        ("device", "gpu", "'auto', 'cpu' or 'cuda'", "'gpu'"),
        ("data", "{a: b}", "valid string", "{'a': 'b'}"),
        ("data", "2024-01-01", "valid string", "2024"),
        ("seed", "-1", "greater than or equal to 0", "-1"),
    ],
)
def test_a_wrong_value_names_the_key_what_is_wanted_and_what_was_found(
    key: str, value: str, wanted: str, found: str
) -> None:
    message = refusal(None, f"{key}={value}")
    assert message.startswith(f"the command line: {key}: ")
    assert wanted in message
    assert found in message.split("found", 1)[1]
    assert str(Recipe.model_fields[key].description) in message


@pytest.mark.parametrize("setting", ["epochs", "", "epochs:3"])
def test_set_wants_key_and_value(setting: str) -> None:
    assert "KEY=VALUE" in refusal(None, setting)


def test_set_refuses_broken_yaml() -> None:
    assert "--set lr" in refusal(None, "lr=[1")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"epochs: [1", "expected YAML"),
        (b"epochs: 1\n\tseed: 2", "expected YAML"),
        (b"a: b: c", "expected YAML"),
        (bytes(range(256)), "cannot be read"),
        (b"\x00\x01", "expected YAML"),
        (b"- epochs\n- 3\n", "found a list"),
        (b"just words", "found a str"),
        (b"3", "found a int"),
        (b"1: 2", "key: value"),
        (b"data: !!python/object/apply:os.system [ls]", "expected YAML"),
        (b"[" * 1000, "expected YAML"),
        (b"data: &a [*a]", "data: "),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    message = refusal(written(tmp_path, content))
    assert words in message
    assert str(tmp_path) in message


def test_a_key_that_stands_in_a_file_twice_is_refused(tmp_path: Path) -> None:
    """On 4500913 the last one was taken without a word."""
    assert "found 'epochs' more often" in refusal(written(tmp_path, "epochs: 3\nlr: 0.1\nepochs: 5\n"))


def test_a_folder_or_a_missing_file_as_recipe(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path)
    assert "cannot be read" in refusal(tmp_path / "none.yaml")


# ---------------------------------------------------------------- the object


def test_it_is_frozen() -> None:
    recipe = Recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.epochs = 3  # type: ignore[misc]
    assert recipe.epochs == 0


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"data": "photos/☃ é: '#x' \n y", "teacher": "resnet152", "views": "online", "lr": 3e-4, "mask_mates": False},
        {
            "data": "caf\udce9",
            "views": 12,
            "weight_decay": 1e-12,
            "warmup_epochs": -1,
            "variant": "official",
            "temperature": 0.1 + 0.2,
        },
        {"data": "yes", "teacher_weights": "null", "student": "1e5"},
    ],
)
def test_recipe_text_reads_back_equal(tmp_path: Path, values: dict[str, object]) -> None:
    recipe = make_recipe(values, "here")
    again = load_recipe(written(tmp_path, recipe_text(recipe)), [], {})
    assert again == recipe
    assert again.model_dump() == recipe.model_dump()
    assert {**recipe.model_dump(), **values, "views": recipe.views} == recipe.model_dump()


def test_every_key_has_a_description() -> None:
    assert [key for key, field in Recipe.model_fields.items() if not field.description] == []


# ---------------------------------------------------------------- files that come with the package


def test_recipe_file_takes_a_path_or_a_name(tmp_path: Path) -> None:
    file = written(tmp_path, "epochs: 1\n")
    assert recipe_file(str(file)) == file
    with pytest.raises(BingoError, match=r"found no file 'nowhere'") as caught:
        recipe_file("nowhere")
    for shipped in SHIPPED:
        assert recipe_file(shipped.stem) == shipped
        assert shipped.stem in str(caught.value)


@pytest.mark.parametrize("file", SHIPPED or [None], ids=lambda file: file.stem if file else "none")
def test_a_shipped_recipe_loads(file: Path | None) -> None:
    if file is None:
        pytest.skip("no recipes yet")
    given = yaml.safe_load(file.read_text(encoding="utf-8"))
    dumped = load_recipe(file, [], {}).model_dump()
    assert given and {key: dumped[key] for key in given} == {
        **given,
        **({"views": str(given["views"])} if "views" in given else {}),
    }


@pytest.mark.parametrize("file", SHIPPED or [None], ids=lambda file: file.stem if file else "none")
def test_a_shipped_recipe_opens_with_command_cost_and_result(file: Path | None) -> None:
    """`# bingo-compress COMMAND ...`, `# cost: ...` and `# result: ...`, the two last with a figure or the words "not
    measured".
    """
    if file is None:
        pytest.skip("no recipes yet")
    lines = file.read_text(encoding="utf-8").splitlines()
    opening = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert re.search(r"^# *bingo-compress (distill|demo|validate|export)\b", opening, re.MULTILINE)
    for word in ("cost", "result"):
        found = re.search(rf"^# *{word}\w*: *(.+(?:\n# {{2,}}.+)*)", opening, re.MULTILINE | re.IGNORECASE)
        assert found, f"no line '# {word}: ...'"
        assert re.search(r"\d|not measured", found[1]), f"neither a figure nor 'not measured' in {found[1]!r}"
