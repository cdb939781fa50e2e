"""The hub as people have it: a cache that was copied in part, models named by their page, and names from elsewhere."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from helpers import Ran, flags, photos
from huggingface_hub import constants

from bingo_compress.errors import BingoError
from bingo_compress.models import catalogue
from bingo_compress.models.encoder import build
from bingo_compress.models.names import FAMILIES, resolve_name, resolve_names
from bingo_compress.preflight import _refuse_unknown
from bingo_compress.presenting.model_card import licence
from bingo_compress.recipe import make_recipe

OPTION = "--teacher-weights"
PAGE = "someone/small-net"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, and no network."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, page: str, settings: dict[str, Any] | None = None, linked: bool = False) -> Path:
    """The page of a model test_resnet as the hub's library keeps it. Returns its weights."""
    home = cache / f"models--{page.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    snapshot = home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    torch.manual_seed(3)
    file = snapshot / "model.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), file)
    if settings is not None:
        (snapshot / "config.json").write_text(json.dumps(settings))
    if linked:
        (home / "blobs").mkdir()
        shutil.move(file, home / "blobs" / "0123")
        file.symlink_to("../../blobs/0123")
    return file


def settings(**changes: Any) -> dict[str, Any]:
    seen = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9}
    seen |= {"interpolation": "bicubic", "first_conv": "conv1.0", "classifier": "fc", "num_classes": 1000}
    return {"architecture": "test_resnet", "num_features": 384, "pretrained_cfg": seen} | changes


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(BingoError) as caught:
        work()
    assert caught.value.exit_status == 2
    return str(caught.value)


# ---------------------------------------------------------------- a cache that was copied in part


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kept", [0, 5, 200_000])
def test_a_file_of_the_cache_that_was_cut_is_named_and_to_be_deleted(kept: int, linked: bool, cache: Path) -> None:
    file = cached(cache, "timm/test_resnet.r160_in1k", linked=linked)
    whole = file.read_bytes()
    file.resolve().write_bytes(whole[:kept])
    message = refusal(lambda: build("test_resnet", 0, "pretrained", OPTION))
    # Not the link to it: with that alone gone, the library would take the damaged file again.
    assert message.startswith(f"{OPTION}: {file.resolve()} in the hub's cache is damaged") and "delete it" in message
    assert "could not be fetched" not in message
    file.resolve().write_bytes(whole)
    found = build("test_resnet", 0, "pretrained", OPTION).backbone.state_dict()
    assert torch.equal(found["conv1.0.weight"], safetensors.torch.load_file(file)["conv1.0.weight"])


def test_weights_in_torchs_format_that_were_cut_are_named(cache: Path) -> None:
    file = cached(cache, "timm/test_resnet.r160_in1k")
    other = file.with_name("pytorch_model.bin")
    torch.save(safetensors.torch.load_file(file), other)
    file.unlink()
    other.write_bytes(other.read_bytes()[:-5000])
    assert f"{other} in the hub's cache is damaged" in refusal(lambda: build("test_resnet", 0, "pretrained", OPTION))


def test_a_whole_cache_of_another_model_is_not_called_damaged(cache: Path) -> None:
    file = cached(cache, "timm/test_resnet.r160_in1k")
    safetensors.torch.save_file({"conv1.0.weight": torch.ones(2)}, file)
    message = refusal(lambda: build("test_resnet", 0, "pretrained", OPTION))
    assert "could not be fetched" in message and "damaged" not in message


def test_what_pretrained_weights_lack_is_said_and_no_line_of_timms_log(
    cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a program that sets up no logging
    file = cached(cache, "timm/test_resnet.r160_in1k")
    build("test_resnet", 0, "pretrained", OPTION)
    assert capfd.readouterr() == ("", "")
    saved = safetensors.torch.load_file(file)
    del saved["conv1.0.weight"], saved["layer1.0.conv1.weight"]
    safetensors.torch.save_file(saved | {"other": torch.ones(2)}, file)
    build("test_resnet", 0, "pretrained", OPTION)
    out, err = capfd.readouterr()
    shown = " ".join(out.split())
    assert "have nothing for 2 of its tensors (conv1.0.weight, layer1.0.conv1.weight), which are random" in shown
    assert err == "" and "Unexpected keys" not in shown


def test_the_command_names_it(bingo: Callable[..., Ran], cache: Path, tmp_path: Path) -> None:
    file = cached(cache, "timm/test_resnet.r160_in1k")
    file.write_bytes(file.read_bytes()[:200_000])
    data = photos(tmp_path / "photos", 3)
    words = flags(data=data, teacher_weights="pretrained")
    ran = bingo("distill", *words, "--out", tmp_path / "run")
    assert ran.status == 2 and len(ran.err.splitlines()) == 1 and not (tmp_path / "run").exists()
    assert str(file) in ran.err and "delete it" in ran.err


# ---------------------------------------------------------------- a model by its page


def test_a_page_of_the_hub_is_a_model_with_its_own_settings(cache: Path) -> None:
    file = cached(cache, PAGE, settings())
    name = resolve_name(f"hf-hub:{PAGE}", "--teacher")
    _refuse_unknown(name, "--teacher")
    assert name == f"hf-hub:{PAGE}"
    encoder = build(name, 0, "pretrained", OPTION)
    found, saved = encoder.backbone.state_dict(), safetensors.torch.load_file(file)
    assert all(torch.equal(found[key], saved[key]) for key in found)
    assert (encoder.preprocessing.size, encoder.preprocessing.mean) == (96, (0.1, 0.2, 0.3))
    random = build(name, 64, "random", OPTION)
    assert random.preprocessing.size == 64 and random.preprocessing.mean == (0.1, 0.2, 0.3)
    assert not torch.equal(random.backbone.state_dict()["conv1.0.weight"], saved["conv1.0.weight"])


def test_a_page_as_transformers_writes_it_is_loaded(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = cached(cache, PAGE, settings())
    saved = safetensors.torch.load_file(file)
    safetensors.torch.save_file({f"timm_model.{key}": value for key, value in saved.items()}, file)
    found = build(f"hf-hub:{PAGE}", 0, "pretrained", OPTION).backbone.state_dict()
    assert all(torch.equal(found[key], saved[key]) for key in found)
    assert "timm_model. before every name is taken off" in capsys.readouterr().out


def test_a_page_of_a_fixed_input_size_is_resized_to_another(cache: Path) -> None:
    told = settings(architecture="test_vit")
    told["pretrained_cfg"] |= {"fixed_input_size": True, "input_size": [3, 160, 160], "classifier": "head"}
    told["pretrained_cfg"]["first_conv"] = "patch_embed.proj"
    file = cached(cache, PAGE, told)
    saved = timm.create_model("test_vit").state_dict()
    safetensors.torch.save_file(saved, file)
    encoder = build(f"hf-hub:{PAGE}", 64, "pretrained", OPTION)
    assert encoder.preprocessing.size == 64 and encoder.backbone.pos_embed.shape == (1, 17, 64)
    assert torch.equal(encoder.backbone.blocks[1].mlp.fc1.weight, saved["blocks.1.mlp.fc1.weight"])
    assert torch.equal(build(f"hf-hub:{PAGE}", 0, "pretrained", OPTION).backbone.pos_embed, saved["pos_embed"])


def test_what_a_page_lacks_is_never_left_random(cache: Path) -> None:
    file = cached(cache, PAGE, settings())
    saved = safetensors.torch.load_file(file)
    del saved["conv1.0.weight"]
    safetensors.torch.save_file(saved, file)
    message = refusal(lambda: build(f"hf-hub:{PAGE}", 0, "pretrained", OPTION))
    assert f"hf-hub:{PAGE} does not fit" in message and "1 missing keys (conv1.0.weight)" in message


@pytest.mark.slow
def test_a_whole_run_with_pages_for_both(bingo: Callable[..., Ran], cache: Path, tmp_path: Path) -> None:
    cached(cache, PAGE, settings())
    data, run, name = photos(tmp_path / "photos", 8), tmp_path / "run", f"hf-hub:{PAGE}"
    words = flags(data=data, teacher=name, student=name, teacher_weights="pretrained", student_weights="auto", epochs=1)
    for command in (
        ("distill", *words, "--out", run),
        ("export", "--run", run),
        ("validate", "--run", run, "--data", data),
        ("distill", *words, "--out", run, "--resume"),
    ):
        ran = bingo(*command)
        assert ran.status == 0, ran.err
    card = (run / "export" / "MODEL_CARD.md").read_text().replace("\\", "")
    assert name in card and not (run / "timm").exists()
    shutil.rmtree(cache)
    ran = bingo("export", "--run", run)
    assert ran.status == 2 and f"the settings of {name} could not be fetched" in ran.err


def test_a_page_is_pretrained_where_weights_are_left_open() -> None:
    chosen = make_recipe({"teacher": f"hf-hub:{PAGE}", "student": f"hf-hub:{PAGE}@v2"}, "tests")
    resolved = resolve_names(chosen, lambda line: None)
    assert (resolved.teacher, resolved.student) == (f"hf-hub:{PAGE}", f"hf-hub:{PAGE}@v2")
    assert resolved.student_weights == "pretrained"
    assert licence(f"hf-hub:{PAGE}", "pretrained") == "timm states none"


def test_a_page_of_timms_own_is_the_model_that_timm_knows() -> None:
    assert resolve_name("hf-hub:timm/resnet18.a1_in1k", "--teacher") == "resnet18.a1_in1k"
    assert resolve_name("hf-hub:timm/resnet18.later_in1k", "--teacher") == "hf-hub:timm/resnet18.later_in1k"


@pytest.mark.parametrize("source", ["pretrained", "random"])
def test_a_page_out_of_reach_is_one_line_with_the_ways_out(source: str, cache: Path) -> None:
    message = refusal(lambda: build(f"hf-hub:{PAGE}", 0, source, OPTION))
    assert f"of hf-hub:{PAGE} could not be fetched" in message and "HF_HOME" in message


@pytest.mark.parametrize("word", ["hf-hub:", "hf-hub:alone", "hf-hub:a/b/c", "hf-hub:a /b", "hf-hub:@v2"])
def test_what_is_no_page_says_how_one_is_named(word: str) -> None:
    assert "expected hf-hub:OWNER/NAME" in refusal(lambda: resolve_name(word, "--teacher"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "net_of_tomorrow"}, "found net_of_tomorrow, which timm"),
        ({"model_type": "dinov2"}, "found none at hf-hub:"),
    ],
)
def test_a_page_of_another_librarys_model_is_refused(changes: dict[str, Any], said: str, cache: Path) -> None:
    told = changes if "model_type" in changes else settings(**changes)
    cached(cache, PAGE, told)
    message = refusal(lambda: build(f"hf-hub:{PAGE}", 0, "pretrained", OPTION))
    assert message.startswith("--teacher: expected a page of a timm model") and said in message


def test_settings_that_were_cut_are_named(cache: Path) -> None:
    file = cached(cache, PAGE, settings()).with_name("config.json")
    file.write_text(file.read_text()[:50])
    message = refusal(lambda: build(f"hf-hub:{PAGE}", 0, "pretrained", OPTION))
    assert f"{file} in the hub's cache is damaged" in message and "delete it" in message


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "word", ["dinov3", "siglip", "siglip2", "mobileclip", "mobileclip2", "eupe", "clip", "mae", "tipsv2", "radio"]
)
def test_foundation_models_are_families(word: str) -> None:
    if not timm.is_model(FAMILIES[word].partition(".")[0]):
        pytest.skip(f"this timm has no {FAMILIES[word]}")
    assert resolve_name(word, "--teacher") == FAMILIES[word]


def test_a_family_that_the_installed_timm_does_not_have_yet_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "dinov9", "vit_small_patch9_dinov9.tag")
    message = refusal(lambda: resolve_name("dinov9", "--teacher"))
    assert message.startswith("--teacher: dinov9 means vit_small_patch9_dinov9.tag, which timm ") and "newer" in message


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("dinov2_vits14", "vit_small_patch14_dinov2"),
        ("dinov2_vitb14", "vit_base_patch14_dinov2"),
        ("dinov2_vitg14_reg", "vit_giant_patch14_reg4_dinov2"),
        ("dinov2_vitb14_reg_lc", "vit_base_patch14_reg4_dinov2"),
        ("dino_vits16", "vit_small_patch16_224.dino"),
        ("dino_vitb8", "vit_base_patch8_224.dino"),
        ("dinov3_vits16plus", "vit_small_plus_patch16_dinov3"),
        ("dinov3_vit7b16", "vit_7b_patch16_dinov3"),
        ("dinov3_convnext_tiny", "convnext_tiny.dinov3_lvd1689m"),
        ("facebook/dinov2-base", "vit_base_patch14_dinov2"),
        ("facebook/dinov2-with-registers-small", "vit_small_patch14_reg4_dinov2"),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", "vit_large_patch16_dinov3"),
        ("google/vit-base-patch16-224", "vit_base_patch16_224"),
        ("google/siglip-so400m-patch14-384", "vit_so400m_patch14_siglip_384"),
        ("openai/clip-vit-large-patch14", "vit_large_patch14_clip_224"),
        ("apple/MobileCLIP-S1", "fastvit_mci1"),
        ("vit_b_16", "vit_base_patch16_224"),
        ("ViT-L-14", "vit_large_patch14_224"),
        ("swin_t", "swin_tiny_patch4_window7_224"),
        ("microsoft/resnet-50", "resnet50"),
        ("mobilenet_v3_small", "mobilenetv3_small"),
    ],
)
def test_what_others_call_a_model_gets_timms_name_of_it_first(word: str, name: str) -> None:
    trunk, tag = name.partition(".")[::2]
    if not (trunk in FAMILIES or name in timm.list_pretrained(f"{trunk}.*") or (timm.is_model(trunk) and not tag)):
        pytest.skip(f"this timm has no {name}")
    message = refusal(lambda: resolve_name(word, "--teacher"))
    assert message.startswith(f"--teacher: unknown model {word!r}; the nearest are {name}, ")
    assert (f"hf-hub:{word}" in message) == ("/" in word)


def test_it_is_so_before_torch_is_there_too() -> None:
    message = refusal(lambda: _refuse_unknown("facebook/dinov2-base", "--student"))
    assert "the nearest are vit_base_patch14_dinov2, " in message and message.startswith("--student: unknown model")


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [("mobileclip", "fastvit_mci0.apple_mclip"), ("metaclip", "metaclip_400m"), ("siglip2", "v2_webli")],
)
def test_models_finds_them_by_their_weights_and_by_the_familys_name(
    pattern: str, shown: str, bingo: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(catalogue, "_row", lambda name: asked.append(name) or (name, "", "", "", ""))
    assert bingo("models", pattern).status == 0
    assert any(shown in name for name in asked)


def test_every_renaming_leads_to_a_model_or_says_nothing() -> None:
    assert "the nearest are dino, " in refusal(lambda: resolve_name("dino_", "--teacher"))
    message = refusal(lambda: resolve_name("eupe_vith16", "--teacher"))
    assert "eupe_lvd1689m" not in message
