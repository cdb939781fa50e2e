"""What is tried out on the machine before a run: how many threads, how much memory a step takes, and whether
torch.compile pays.
"""

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bingo_compress.errors import BingoError, first_line
from bingo_compress.recipe import Recipe
from bingo_compress.runtime import console, distributed, machine

TRIED = 16  # views in a calibration's step
AHEAD = 2  # batches that wait to be used
GRADIENTS = 1.4  # a step's peak, in its activations: measured 1.1 to 1.3 beside the rest, on five students
BESIDE = 400_000_000  # bytes of the head, the targets and oneDNN's own buffers
GAIN = 0.9  # more threads, or a compiled student, must take at most this share of the time


def choose_threads(student: nn.Module, size: int) -> int:
    """Threads with which a training step of `student` on TRIED views of `size` px is fastest here; takes a second or
    two.

    More threads are not always faster: on a busy machine they wait for one another, and a step takes ten times as long.
    Two counts that are nearly as fast: the smaller, which leaves a core for making the next batch.
    """
    before = torch.get_num_threads()
    trial = copy.deepcopy(student).to("cpu", memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    views = torch.rand(TRIED, 3, size, size).contiguous(memory_format=torch.channels_last)
    counts = [1]
    while counts[-1] * 2 <= machine.free_cores():
        counts.append(counts[-1] * 2)
    best, fastest = 1, float("inf")
    for count in counts:
        torch.set_num_threads(count)
        spent = seconds(lambda: trial(views).sum().backward())
        if spent < fastest * GAIN:
            best, fastest = count, spent
        elif spent > 2 * fastest:
            break
    torch.set_num_threads(before)
    return best


def saved_bytes(work: Callable[[], object]) -> int:
    """Bytes of the activations that work() keeps for a backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(kept.values())


def step_bytes(student: nn.Module, size: int, views: int) -> int:
    """Bytes that training `student` on `views` views of `size` px a step takes on a CPU beside the pixels, from a pass
    of a few views; a little too many.
    """
    trial = copy.deepcopy(student).to("cpu", memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    tried = min(views, 4)
    images = torch.rand(tried, 3, size, size).contiguous(memory_format=torch.channels_last)
    activations = saved_bytes(lambda: trial(images).sum()) * views // tried
    made = (AHEAD + 2) * 4 * views * 3 * size * size  # float32 views that wait, are made, and are used
    # Weights, gradients and two moments.
    states: int = 4 * 4 * sum(parameter.numel() for parameter in trial.parameters())
    return int(GRADIENTS * activations) + made + states + BESIDE


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """The median time of work(), after one that does not count; on a GPU, until it has finished."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return sorted(once() for _ in range(times))[times // 2]


def compiled_if_faster(model: nn.Module, views: Tensor, wanted: str) -> Callable[[Tensor], Tensor] | None:
    """torch.compile of `model`, or None for as it is. wanted: "on", or "auto": only if a step on `views` is measured to
    be faster.

    The way back is graceful: whatever the compiler raises is said in one line, and the run goes on without it. Tried on
    a copy, so that nothing of it reaches the model's weights or statistics.
    """
    trial = copy.deepcopy(model)

    def step(run: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def work() -> None:
            trial.zero_grad(set_to_none=True)
            with torch.autocast(views.device.type, torch.bfloat16, enabled=views.is_cuda):
                run(views).float().sum().backward()

        return work

    try:
        quick = torch.compile(trial, dynamic=False)
        compiled, plain = seconds(step(quick)), seconds(step(trial))
    except Exception as error:  # The compiler raises whatever its parts raise.
        console.say(f"torch.compile: not used, it failed ({first_line(error, 120)})")
        return None
    finally:
        torch.compiler.reset()
    pays = wanted == "on" or compiled < GAIN * plain
    console.say(
        f"torch.compile: {'used' if pays else 'not used'}, a step takes {compiled / plain:.2f} of the time without"
    )
    run: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False)
    return run if pays else None


def choose_device(wanted: str) -> torch.device:
    """auto, cpu or cuda to this process's device; joins the other processes where torchrun started several. Raises
    BingoError without the GPU asked for.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BingoError("--device: expected a CUDA GPU, torch sees none; use --device cpu or auto")
    device = distributed.start(torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is not bf16: the loss, the teacher
    return device


def use_threads(recipe: Recipe, student: nn.Module, size: int, device: torch.device, kept: int = 0) -> Recipe:
    """torch's CPU threads set, and the recipe with them filled in: what it asks for; else `kept`, of the run that goes
    on; else, on a CPU, those with which a step of `student` is fastest here, or what torchrun set for each of several
    processes.

    A result depends on their number in its last bits, so a run settles it once. Where it cannot have as many again,
    that is said.
    """
    cores = max(1, machine.free_cores() // distributed.world())
    count = recipe.threads or min(kept, cores)
    if not count and device.type == "cpu":
        alone = distributed.world() == 1
        count = choose_threads(student, size) if alone else torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    if kept and count != kept:
        why = "as asked for" if recipe.threads else "there are no more cores"
        console.say(
            f"threads: {count} instead of the {kept} that this run began with, {why}: its result will differ in the"
            " last bits"
        )
    return recipe.model_copy(update={"threads": recipe.threads or kept or count})


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on the GPU, or the most that this process held in memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else machine.peak_resident()
