"""What is in a folder: decoded to the last file, nothing written."""

from collections import Counter
from pathlib import Path

from bingo_edge.image import ImageError

from bingo_compress import images, intake, screen
from bingo_compress.errors import BingoError

SHOWN = 50


def check(data: Path) -> None:
    """Decode every image below `data` and print counts, sizes and each unusable file with its reason. Raises BingoError when none is usable."""
    folder = images.list_folder(data)
    bad = list(folder.bad)
    sides: list[tuple[int, int]] = []
    with screen.bar("decode", len(folder.files)) as advance:
        for index, result in images.decode_all(folder, range(len(folder.files)), lambda pixels: (pixels.shape[1], pixels.shape[0])):
            if isinstance(result, ImageError):
                bad.append((folder.files[index], str(result)))
            else:
                sides.append(result)
            advance(1)
    if bad:
        screen.table(f"{len(bad):,} files cannot be used", ("file", "reason"), [*sorted(bad)[:SHOWN]])
        if len(bad) > SHOWN:
            screen.say(f"... and {len(bad) - SHOWN:,} more; distill writes all of them to quarantine.csv")
        for line in intake.reasons(bad, 5):
            screen.say(f"  {line}")
    if not sides:
        raise BingoError(f"--data: expected images, found none that can be decoded among {len(bad)} files in {data}")
    short = sorted(min(side) for side in sides)
    screen.say(
        f"{len(sides):,} usable images in {data}; short side {short[0]} to {short[-1]} px, half of them {short[len(short) // 2]} px or more"
    )
    intake.say_copies(intake.copies(folder), "keep")
    try:
        classes, labels = images.labels_of(images.Folder(folder.root, folder.files, ()))
        counts = Counter(labels)
        screen.say(
            f"as labels (only `validate` reads them): {len(classes)} folders of {min(counts.values()):,} to {max(counts.values()):,} images"
        )
    except BingoError:
        screen.say("no folder names that could be labels; none are needed to distil")
    screen.say(f"next: bingo-compress distill --data {data} --teacher resnet152 --student mobilenetv3 --out runs/first")
