"""What artefacts say of what they were made from."""

import pytest

from bingo_compress.errors import BingoError
from bingo_compress.runtime.made_of import FORMATS, MadeOf, as_told, hash_seed, made_of


def test_it_reads_back_equal() -> None:
    made = made_of("training", images="ab", settings={"lr": 0.1, "sizes": (1, 2)})
    assert as_told(made.told()) == made
    assert made.format == FORMATS["training"]
    assert made.differences(made) == []


def test_every_difference_has_a_name_and_another_key() -> None:
    made = made_of("training", images="ab", teacher="cd", settings={"lr": 0.1, "method": "bingo"})
    other = made_of("training", images="ab", teacher="ce", settings={"lr": 0.1, "method": "seed"})
    assert made.differences(other) == ["method (seed -> bingo)", "teacher"]
    assert made.key != other.key
    assert made.differences(MadeOf("training", made.format - 1, made.inputs)) == ["the version of this program"]
    assert made.differences(MadeOf("student", made.format, made.inputs)) == ["the version of this program"]
    assert made.differences(None) == ["the version of this program"]
    assert (
        len(
            {
                made.key,
                MadeOf("training", made.format - 1, made.inputs).key,
                MadeOf("student", made.format, made.inputs).key,
            }
        )
        == 3
    )


def test_what_says_nothing_is_of_an_earlier_version() -> None:
    assert as_told(None) is None


@pytest.mark.parametrize(
    "told",
    [
        "words",
        {},
        {"role": "training"},
        {"role": "training", "format": "x", "inputs": {}},
        {"role": 1, "format": 1, "inputs": []},
    ],
)
def test_what_is_none_of_ours_is_an_error(told: object) -> None:
    with pytest.raises(BingoError, match="made of"):
        as_told(told)


# ---------------------------------------------------------------- seeds


def test_seeds_of_other_streams_differ_and_fit_torch() -> None:
    seeds = {hash_seed(0, "view", view, start) for view in range(10) for start in range(10)} | {
        hash_seed("0", "view", 0, 0)
    }
    assert len(seeds) == 101
    assert all(0 <= seed < 2**63 for seed in seeds)
