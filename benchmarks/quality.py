"""Is the fast path as good as the plain one? `compare` twice: as it is, and with an online teacher in fp32 and
torchvision's operations image by image.

python benchmarks/quality.py fast|plain ...the options of `bingo-compress compare`...

plain: every view is cropped and augmented by torchvision.transforms.v2.functional with the same drawn parameters, and
the teacher runs in every step. Compare the two tables; figures count as equal within the spread over seeds.
"""

import sys

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from bingo_compress.cli import main
from bingo_compress.data import augment


def apply_plainly(views: Tensor, drawn: augment.Draw) -> Tensor:
    """augment.apply, one image after the other."""
    return torch.stack([_one(view, augment.rows(drawn, torch.tensor([row]))) for row, view in enumerate(views)])


def _one(view: Tensor, drawn: augment.Draw) -> Tensor:
    image = reference.to_dtype(reference.horizontal_flip(view) if bool(drawn.flip) else view, torch.float32, scale=True)
    if int(drawn.order) >= 0:
        steps = (
            reference.adjust_brightness,
            reference.adjust_contrast,
            reference.adjust_saturation,
            reference.adjust_hue,
        )
        values = (drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue)
        for step in augment.ORDERS[int(drawn.order)]:
            image = steps[step](image, float(values[step]))
    if bool(drawn.grey):
        image = reference.rgb_to_grayscale(image, num_output_channels=3)
    sigma = float(drawn.sigma) * view.shape[-1] / augment.BLUR_SIZE
    if sigma > 0:
        reach = min(2 * round(3 * sigma + 0.5) + 1, 2 * view.shape[-1] - 1)
        image = reference.gaussian_blur(image, [reach, reach], [sigma, sigma])
    return torch.as_tensor(image)


if __name__ == "__main__":
    path = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if path not in ("fast", "plain"):
        print(__doc__)
        sys.exit(0 if path in ("-h", "--help") else 2)
    sys.argv[1:1] = ["compare"]
    if path == "plain":
        augment.apply = apply_plainly
        sys.argv += ["--views", "online"]
    main()
