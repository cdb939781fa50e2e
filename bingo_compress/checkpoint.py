"""A run's state in one safetensors file: written whole or not at all, no pickle."""

import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bingo_compress.errors import BingoError
from bingo_compress.run_dir import atomic, need_space


def save(path: Path, tensors: dict[str, Tensor], **facts: object) -> None:
    """Write tensors by name, and `facts` as JSON, to `path`. Raises BingoError when the disk is too small."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    need_space(path.parent, sum(tensor.nbytes for tensor in plain.values()), path.name)
    with atomic(path) as temporary:
        safetensors.torch.save_file(plain, temporary, metadata={"bingo_compress": json.dumps(facts)})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What `save` wrote. Raises BingoError for a file that is damaged or not ours."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["bingo_compress"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - not a dict
    except Exception as error:
        raise BingoError(f"{path} cannot be read as a file of this program ({error}); start anew with --overwrite") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, flat: INDEX.KEY -> tensor."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(value) for index, entry in state.items() for key, value in entry.items() if value is not None}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                # A fused optimiser walks parameter and state as they lie in memory: both channels last, or its result is wrong without a word.
                entry[key] = torch.empty_like(parameter).copy_(value)


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix` and a dot, without it."""
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
