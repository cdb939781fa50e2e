"""What a run says of itself before it begins: who is distilled into whom, on what, where, and how each model sees a picture."""

import torch

from bingo_compress import __version__
from bingo_compress.data.image_folder import Folder
from bingo_compress.models.encoder import Encoder
from bingo_compress.recipe import Recipe
from bingo_compress.runtime import console
from bingo_compress.training.loop import loss_of
from bingo_compress.training.unread import unread


def header(recipe: Recipe, teacher: Encoder, student: Encoder, folder: Folder, device: torch.device) -> None:
    """The models with their sizes, weights and preprocessing; the images, the device and the method."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    roles = (("teacher", teacher, recipe.teacher_weights), ("student", student, recipe.student_weights))
    rows = [
        (role, encoder.name, f"{encoder.parameters_count() / 1e6:.2f} M", f"{encoder.preprocessing.size} px", str(encoder.width), source)
        for role, encoder, source in roles
    ]
    console.table(f"bingo-compress {__version__}", ("", "model", "parameters", "input", "width", "weights"), rows)
    for role, encoder, _ in roles:
        console.say(f"{role} sees: {encoder.preprocessing.describe()}")
    console.say(f"images: {len(folder.files):,} files in {folder.root}; device: {where}")
    targets = "an online teacher" if recipe.views == "online" else f"{recipe.views} stored views an image"
    method = f"bingo ({recipe.variant})" if recipe.method == "bingo" else recipe.method
    source = targets if loss_of(recipe).teacher else "the student's own moving average"
    idle = unread(recipe)
    bags = "" if "bags" in idle else f", bags: {recipe.bags}" + ("" if "bag_size" in idle else f" of {recipe.bag_size}")
    tau = "" if "temperature" in idle else f", temperature {recipe.temperature}"
    console.say(f"method: {method}{bags}{tau}, targets from {source}, {recipe.epochs} epochs")
