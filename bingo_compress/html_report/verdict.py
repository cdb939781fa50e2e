"""What a run came to, in sentences that claim no more than their figures."""

from collections.abc import Mapping
from typing import Any

from bingo_compress.html_report.facts import Facts
from bingo_compress.presenting import caveats, timing_table
from bingo_compress.presenting.markdown import name_of
from bingo_compress.runtime import console

ALONE = (
    "Agreement says how alike teacher and student see these images, not which of them is right: a student that agrees"
    " less need not be worse. Even a few labels tell."
)


def sentence(facts: Facts) -> str:
    """The verdict: with labels by the linear probe, without by neighbour recall."""
    if facts.row("student"):
        return _with_labels(facts)
    recall = facts.summary.get("neighbour_recall")
    return (
        _without_labels(recall)
        if recall
        else ("The student is trained, and nothing was measured: no images were held out and no labels were given.")
    )


def aside(facts: Facts) -> list[str]:
    """What belongs beside the verdict: what it does not say, and what became of the exported files."""
    said = caveats.near_copies(facts.proof["protocol"]) if facts.row("student") else [ALONE]
    if facts.row("student") and (other := _by_neighbours(facts)):
        said.append(other)
    return [*said, _exported(facts)]


def _with_labels(facts: Facts) -> str:
    student, start, teacher = (facts.row(name) for name in ("student", "start", "teacher"))
    images = facts.proof["protocol"]["test_images"]
    found = f"the student finds the class of {percent(student, 'linear')} of {images:,} test images"
    before = f", {percent(start, 'linear', plain=True)} before distillation" if start else ""
    there = f", its teacher {percent(teacher, 'linear', plain=True)}" if teacher else ""
    return f"{_better(facts)}: {found}{before}{there}."


def _better(facts: Facts) -> str:
    """Better or worse than before, by the paired difference of the linear probe where the proof has one."""
    gain = facts.proof.get("gain", {}).get("linear")
    if not gain:
        return "Measured on labels"
    low, high = gain["difference_interval"]
    points = f"{100 * gain['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    if low > 0:
        return f"Better than before, by {points}"
    return f"Worse than before, by {points}" if high < 0 else f"No clear difference from before, {points}"


def _by_neighbours(facts: Facts) -> str:
    student, start = facts.row("student"), facts.row("start")
    if "knn" not in student:
        return ""
    before = f", before {percent(start, 'knn', plain=True)}" if "knn" in start else ""
    return f"By nearest neighbours (kNN): {percent(student, 'knn')}{before}."


def _without_labels(recall: Mapping[str, Any]) -> str:
    gain = recall["student"] - recall["start"]
    if "gain_interval" in recall:
        low, high = recall["gain_interval"]
        way = "sees more" if low > 0 else "sees less" if high < 0 else "sees neither clearly more nor less"
        by = f" ({100 * gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}])"
    else:
        way, by = "sees more" if gain > 0 else "sees less" if gain < 0 else "sees as much", ""
    return (
        f"The student {way} as its teacher does than before{by}: of the teacher's {recall['k']:,} nearest images it has"
        f" {percent(recall, 'student')}, before distillation {percent(recall, 'start', plain=True)}, by chance"
        f" {percent({'chance': recall['k'] / recall['gallery']}, 'chance')} ({recall['queries']:,} held-out images)."
    )


def _exported(facts: Facts) -> str:
    if not facts.files:
        return "It is not exported for a device yet: bingo-compress export --run RUN."
    parts = []
    for contract in facts.files:
        time = facts.timing(contract)
        told = [console.size(contract["bytes"]), *([timing_table.a_picture(time)] if time else [])]
        row = facts.proven(contract)
        told += [percent(row, "linear", plain=True)] if "linear" in row else []
        parts.append(f"{name_of(contract)} ({', '.join(told)})")
    judged = [contract["int8"]["gate"] for contract in facts.files if "int8" in contract]
    gate = f" The int8 file passed its gate: mean cosine {judged[0]['mean_cosine']:.4f} to float." if judged else ""
    return f"Exported: {', '.join(parts)}.{gate}"


def percent(row: Mapping[str, Any], key: str, *, plain: bool = False) -> str:
    """74.1% [69.8, 78.1]; the interval where there is one, and not with `plain`."""
    interval = row.get(f"{key}_interval")
    if plain or interval is None:
        return f"{100 * row[key]:.1f}%"
    return f"{100 * row[key]:.1f}% [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
