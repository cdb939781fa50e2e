"""What makes the figures of a proof better than they are, or leaves classes out: a sentence each."""

from collections.abc import Mapping
from typing import Any

NAMED = 5  # classes in a sentence


def near_copies(protocol: Mapping[str, Any]) -> list[str]:
    """Of test images that are all but in the bank."""
    near, found = protocol.get("near_copies", {}), []
    if count := near.get("test_images_near_bank"):
        found.append(
            f"{count:,} of the {protocol['test_images']:,} test images ({near['test_share_near_bank']:.1%}) have a"
            " near-copy in the bank, which is found, not recognised; every model looks better than it is."
        )
    if whole := near.get("classes_of_one_scene"):
        more = f" and {len(whole) - NAMED:,} classes more" if len(whole) > NAMED else ""
        found.append(
            f"All images of {', '.join(whole[:NAMED])}{more} are near-copies of one another, one scene, and on both"
            " sides of the split; every model looks better than it is."
        )
    return found


def untested(row: Mapping[str, Any]) -> int:
    """How many classes have no test image. row: a model's of a proof, or what a file says of its head; of more classes
    than it lists only where they were counted.
    """
    return int(row.get("untested", sum(not entry["images"] for entry in row.get("per_class", ()))))


def without_images(row: Mapping[str, Any], classes: int) -> list[str]:
    """Of classes without test images, `classes` being all."""
    count = untested(row)
    if not count:
        return []
    have, them = ("has", "it") if count == 1 else ("have", "them")
    return [f"{count:,} of the {classes:,} classes {have} no test image; no figure tells of {them}."]


def of_proof(protocol: Mapping[str, Any], student: Mapping[str, Any]) -> list[str]:
    """All that belongs beside the figures of a proof. student: its row."""
    found = [*near_copies(protocol), *without_images(student, len(protocol["classes"]))]
    if seen := protocol.get("test_images_trained_on"):
        found.append(f"{seen:,} of the test images were also distilled on (the same contents), without their labels.")
    return found
