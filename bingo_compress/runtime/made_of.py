"""What an artefact was made from, in the artefact itself: whoever reads it back compares, and refuses what does not fit
or makes it again.

Whoever changes what a role's code computes raises its number here; tests/runtime/test_made_of.py fails where an output
on fixed input changed and its number did not.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bingo_compress.errors import BingoError

FORMATS = {
    "index": 1,  # where the members of a tar file lie
    "pixels": 5,  # pictures as the store keeps them, and which files are pictures
    "teacher": 6,  # the teacher's pass: plain views and augmented ones
    "targets": 2,  # the space of targets, and views of the teacher's pass in it
    "near-copies": 1,  # which images show one scene
    "bags": 2,
    "embeddings": 3,  # plain views of several models, for checks and proofs
    "training": 7,  # the state of the loop
    "student": 1,  # a trained student
    "start": 1,  # the student before training
    "looks": 1,  # what the report shows of a run's images
    "mistakes": 1,  # the test images that its student got wrong
    "arm": 3,  # a trained student of a comparison
    "figures": 6,  # probes of a comparison's student
}


@dataclass(frozen=True)
class MadeOf:
    """role: a key of FORMATS; inputs: digests and settings by name, as JSON has them, one level of names within a name
    at most.
    """

    role: str
    format: int
    inputs: Mapping[str, Any]

    @property
    def key(self) -> str:
        """16 hex digits that differ when anything in it does: for the names of caches."""
        return hashlib.sha256(json.dumps(self.told(), sort_keys=True).encode()).hexdigest()[:16]

    def told(self) -> dict[str, Any]:
        """As JSON, for `as_told`."""
        return {"role": self.role, "format": self.format, "inputs": dict(self.inputs)}

    def differences(self, other: "MadeOf | None") -> list[str]:
        """The names of the inputs in which `other` differs, settings with both values, `other`'s first; [] where
        nothing does.
        """
        if other is None or other.role != self.role or other.format != self.format:
            return ["the version of this program"]
        found = []
        for name in sorted({*self.inputs, *other.inputs}):
            mine, theirs = self.inputs.get(name), other.inputs.get(name)
            if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
                keys = sorted({*mine, *theirs})
                found += [
                    f"{key} ({theirs.get(key)} -> {mine.get(key)})" for key in keys if mine.get(key) != theirs.get(key)
                ]
            elif mine != theirs:
                found.append(name)
        return found


def made_of(role: str, **inputs: Any) -> MadeOf:
    """Of these inputs by the code of this version. inputs: JSON of digests and settings."""
    told: dict[str, Any] = json.loads(json.dumps(inputs))  # tuples become lists, as they will when it is read back
    return MadeOf(role, FORMATS[role], told)


def as_told(told: object) -> MadeOf | None:
    """What `MadeOf.told` gave; None where an artefact says nothing of what it was made from, as those of earlier
    versions. Raises BingoError for anything else.
    """
    if told is None:
        return None
    try:
        assert isinstance(told, dict) and isinstance(told["inputs"], dict)
        return MadeOf(str(told["role"]), int(told["format"]), told["inputs"])
    except (AssertionError, KeyError, TypeError, ValueError):
        raise BingoError(f"expected what an artefact was made of, found {str(told)[:80]!r}; make it again") from None


def file_digest(file: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_seed(*parts: object) -> int:
    """A 63-bit seed from anything: streams with different parts are independent."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
