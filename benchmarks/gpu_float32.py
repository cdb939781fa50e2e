"""bingo-compress with every product in float32, on a GPU too: what bf16 and TF32 are compared with. Arguments as the
command's.
"""

from typing import Any

import torch

from bingo_compress.cli import main

autocast = torch.autocast


def off(device: str, dtype: Any = None, **_: Any) -> Any:
    return autocast(device, dtype, enabled=False)


torch.autocast = off  # type: ignore[assignment, misc]
torch.set_float32_matmul_precision = lambda precision: None
torch.backends.cudnn.allow_tf32 = False
main()
