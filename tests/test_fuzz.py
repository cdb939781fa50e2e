"""Some hundred damaged inputs for each reader of files from elsewhere; `python tests/fuzz.py --inputs N` runs as many
as wanted.
"""

import os

import fuzz
import numpy as np
import pytest

INPUTS = int(os.environ.get("BINGO_FUZZ_INPUTS", "300"))


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_damaged_input_gives_a_result_or_the_one_kind_of_error(target: str) -> None:
    assert fuzz.failures(target, range(INPUTS)) == []


def test_the_fuzzer_sees_another_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(random: np.random.Generator) -> None:
        if random.integers(0, 4) == 0:
            raise LookupError("as a reader would")

    monkeypatch.setitem(fuzz.TARGETS, "image", lambda home: once)
    found = fuzz.failures("image", range(40))
    assert 0 < len(found) < 40
    assert {text for _, text in found} == {"LookupError: as a reader would"}
    assert fuzz.failures("image", [found[0][0]]) == found[:1]  # an input is its number, whatever ran before it


def test_inputs_differ_and_are_the_same_again() -> None:
    made = [fuzz.mutated(b"one two three" * 9, np.random.default_rng([0, number])) for number in range(50)]
    assert len(set(made)) > 40
    assert made[7] == fuzz.mutated(b"one two three" * 9, np.random.default_rng([0, 7]))
