"""A run's state in one safetensors file: written whole or not at all, no pickle."""

import hashlib
import json
import os
import zlib
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bingo_compress.errors import BingoError
from bingo_compress.runtime import console, signals
from bingo_compress.runtime.made_of import MadeOf, as_told
from bingo_compress.runtime.run_dir import atomic, need_space


def save(path: Path, tensors: dict[str, Tensor], made: MadeOf | None = None, **facts: object) -> None:
    """Write tensors by name, and `facts` as JSON, to `path`, with a checksum of both. made: what they were made from.
    Raises BingoError when the disk is too small.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    source = {"made_of": made.told()} if made else {}
    told = json.dumps(facts | source)  # few: safetensors ends at a header of 100 MB
    need_space(path.parent, sum(tensor.nbytes for tensor in plain.values()), path.name)
    with atomic(path) as temporary:
        safetensors.torch.save_file(
            plain, temporary, metadata={"bingo_compress": told, "crc32": f"{_checksum(plain, told):08x}"}
        )


def load(path: Path, *, checked: bool = False) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What `save` wrote. checked: a file without checksum, as versions before 0.2 wrote them, is no good. Raises
    BingoError for a file that is damaged or not ours.
    """
    try:
        # A signal within would come out as an error of the file: the library turns whatever is raised in it into one of
        # its own.
        with signals.deferred(), safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            facts = json.loads(metadata["bingo_compress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if (checked or "crc32" in metadata) and metadata[
            "crc32"
        ] != f"{_checksum(tensors, metadata['bingo_compress']):08x}":
            raise ValueError("its checksum is another one")
        return tensors, facts
    except Exception as error:
        raise BingoError(
            f"{path} cannot be read as a file of this program ({error}); start anew with --overwrite"
        ) from None


def made_of(path: Path) -> MadeOf | None:
    """What a file was made from, by its header alone; None for one of an earlier version. Raises BingoError for a file
    that is damaged or not ours.
    """
    try:
        with signals.deferred(), safetensors.safe_open(path, framework="pt") as file:
            return as_told(json.loads((file.metadata() or {})["bingo_compress"]).get("made_of"))
    except BingoError:
        raise
    except Exception as error:
        raise BingoError(
            f"{path} cannot be read as a file of this program ({error}); start anew with --overwrite"
        ) from None


def is_sound(file: Path, made: MadeOf | None = None) -> bool:
    """Whether `file` is there, whole, and (with `made`) made from just that; says so when it is there and is not."""
    if not file.exists():
        return False
    try:
        _, facts = load(file, checked=True)
        if not made or not (other := made.differences(as_told(facts.get("made_of")))):
            return True
        console.say(f"{file} was made from something else ({', '.join(other)}): it is made again")
    except BingoError:
        console.say(f"{file} is damaged and is made again")
    return False


def _checksum(tensors: dict[str, Tensor], told: str) -> int:
    """Of names, types, shapes and contents, and of the facts."""
    found = zlib.crc32(told.encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        # As bytes whatever the type: numpy has no bfloat16.
        found = zlib.crc32(
            tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"", found
        )
    return found


def save_keeping(path: Path, tensors: dict[str, Tensor], made: MadeOf, **facts: object) -> None:
    """`save`; what `path` held is kept beside it for `load_newest`."""
    if path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.before")
        temporary.unlink(missing_ok=True)
        # A file system without links, such as a memory card's: for a moment only the save before is there.
        try:
            os.link(path, temporary)
        except OSError:
            temporary = path
        os.replace(temporary, before(path))
    save(path, tensors, made, **facts)


def load_newest(path: Path) -> tuple[dict[str, Tensor], dict[str, object]] | None:
    """What `save_keeping` wrote last; the save before it, said on screen, where that file is damaged; None where it
    wrote nothing.

    Whether the state belongs to the run that asks is for the caller to compare (`made_of`), of whichever was read.
    Raises BingoError where both are damaged.
    """
    if not path.exists() and not before(path).exists():
        return None
    try:
        return load(path, checked=True)
    except BingoError as error:
        if not before(path).exists():
            raise
        found = load(before(path), checked=True)
        console.say(
            f"{path} is damaged: going on from the save before it ({str(error).partition('(')[2].partition(')')[0]})"
        )
        return found


def forget(path: Path) -> None:
    """Delete what `save_keeping` wrote, both of them."""
    path.unlink(missing_ok=True)
    before(path).unlink(missing_ok=True)


def before(path: Path) -> Path:
    """Where `save_keeping` keeps what `path` held."""
    return path.with_name(f"{path.stem}-before{path.suffix}")


def of_another_run(file: Path, others: list[str]) -> BingoError:
    """The error for a state that was not made from what is there now; others: of `MadeOf.differences`."""
    return BingoError(
        f"--resume: {file} is of another run; what differs: {', '.join(others)}; bring back what it was made from, or"
        " start anew with --overwrite"
    )


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's type, shape and contents, in hex."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    plain = tensor.detach().cpu().contiguous()
    digest.update(plain.view(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, flat: INDEX.KEY -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }


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
                # A fused optimiser walks parameter and state as they lie in memory: both channels last, or its result
                # is wrong without a word.
                entry[key] = torch.empty_like(parameter).copy_(value)


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix` and a dot, without it."""
    return {
        name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")
    }
