"""The browser example against the Python kit: its resampler in node, and the whole page in a real browser."""

import functools
import http.server
import json
import queue
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bingo_edge import Embedder, preprocess
from bingo_edge.heads import named, nearest
from bingo_edge.image import load_image, preprocess_from
from edge_models import headed
from helpers import RULES, SHAPES, encoder, photo
from PIL import Image, PngImagePlugin

from bingo_compress.exporters.golden import write_golden
from bingo_compress.exporters.onnx import export_onnx, form
from bingo_compress.models.exported import runner_by_name

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[2] / "export" / "browser"
RUNTIME = SOURCE / "node_modules" / "onnxruntime-web"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NODE = shutil.which("node")
SIZE = 96


# ---------------------------------------------------------------- node


def node(code: str, *words: object) -> None:
    code = f"import fs from 'node:fs'; import * as kit from {json.dumps((SOURCE / 'resample.js').as_uri())};\n{code}"
    assert NODE
    done = subprocess.run([NODE, "--input-type=module", "-e", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not NODE, reason="needs node")
def test_the_resampler_is_pillows(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (height, width, 3), np.uint8) for width, height in SHAPES]
    jobs = []
    for place, pixels in enumerate(pictures):
        (tmp_path / f"{place}.in").write_bytes(pixels.tobytes())
        jobs.append({"file": f"{place}.in", "height": pixels.shape[0], "width": pixels.shape[1]})
    rules = [{**rule, "size": size} for rule in RULES for size in (SIZE, 33)]
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": jobs, "rules": rules}))
    node(
        """process.chdir(process.argv[1]);
        const { jobs, rules } = JSON.parse(fs.readFileSync("jobs.json"));
        rules.forEach((rule, number) => jobs.forEach(({ file, height, width }, place) => {
            if (!kit.known(rule)) throw rule;
            const picture = { width, height, data: fs.readFileSync(file) };
            fs.writeFileSync(`${number}-${place}.out`, kit.preprocess(picture, rule));
        }));""",
        tmp_path,
    )
    for number, rule in enumerate(rules):
        for place, pixels in enumerate(pictures):
            found = np.fromfile(tmp_path / f"{number}-{place}.out", np.uint8)
            assert np.array_equal(found, preprocess(pixels, **rule).ravel()), (rule, SHAPES[place])


@pytest.mark.skipif(not NODE, reason="needs node")
def test_transparency_is_laid_over_white_as_pillow_does(tmp_path: Path) -> None:
    colour, alpha = np.mgrid[:256, :256].astype(np.uint8)
    every = np.dstack([colour, colour[::-1], alpha, alpha])
    (tmp_path / "in").write_bytes(every.tobytes())
    Image.fromarray(every).save(tmp_path / "in.png")
    node(
        "fs.writeFileSync(process.argv[2], kit.overWhite(fs.readFileSync(process.argv[1])));",
        tmp_path / "in",
        tmp_path / "out",
    )
    assert np.array_equal(np.fromfile(tmp_path / "out", np.uint8), load_image(tmp_path / "in.png").ravel())


# ---------------------------------------------------------------- browser


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files, and a place where the test's own page (never the product's) leaves what it found."""

    reports: queue.Queue[Any]

    def do_POST(self) -> None:
        self.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def visit(folder: Path, script: str) -> Any:
    """What `report(..)` was called with by a module script on a page in `folder`, in headless Chromium."""
    (folder / "test.html").write_text(f"""<!doctype html><script type="module">
        const report = (what) => fetch("/", {{ method: "POST", body: JSON.stringify(what) }});
        const bytes = async (path) => await (await fetch(path)).blob();
        const until = async (ready) => {{ while (!ready()) await new Promise((go) => setTimeout(go, 20)); }};
        try {{ {script} }} catch (error) {{ report({{ error: `${{error}} ${{error.stack}}` }}); }}
        </script>""")
    handler = type("Reporting", (Handler,), {"reports": queue.Queue()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    quiet = [
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-quic",
    ]
    # A machine without a graphics card has WebGL only in software, which Chromium wants to be asked for.
    flags = ["--headless", "--no-sandbox", "--enable-unsafe-swiftshader", "--remote-debugging-port=0", *quiet]
    page = f"http://127.0.0.1:{server.server_port}/test.html"
    assert CHROMIUM
    browser = subprocess.Popen(
        [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", page],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        found = handler.reports.get(timeout=180)
    finally:
        browser.terminate()
        browser.wait(30)
        server.shutdown()
        server.server_close()
    assert "error" not in found, found
    return found


@pytest.fixture(scope="module", params=["uint8-nhwc", "float32-nchw-normalised"])
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Embedder, list[Path]]]:
    """A folder as one would serve it: the page, the runtime, a model with its golden pictures, and PNGs of many shapes
    and kinds.
    """
    if not CHROMIUM or not RUNTIME.is_dir():
        pytest.skip("needs chromium, and onnxruntime-web from npm ci in export/browser")
    folder = tmp_path_factory.mktemp("site")
    for file in (*SOURCE.glob("*.js"), SOURCE / "index.html"):
        shutil.copy(file, folder)
    (folder / "node_modules").symlink_to(SOURCE / "node_modules")
    images = torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    facts = {"version": "0", "run_id": "abc", "student": "mobilenetv3_small_050", "teacher": "t"}
    wanted = form("modern", None, None, request.param)
    export_onnx(encoder("mobilenetv3_small_050", SIZE), images, folder / "student.onnx", facts, wanted)
    (folder / "pictures").mkdir()
    pictures = png_files(folder / "pictures")
    embedder = Embedder(folder / "student.onnx")
    write_golden(folder / "student.onnx", embedder.contract, runner_by_name(folder / "student.onnx"))
    yield folder, embedder, pictures
    shutil.rmtree(folder)  # a browser's profile is large


def png_files(folder: Path) -> list[Path]:
    random = np.random.default_rng(1)
    made = {
        f"{width}x{height}": Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        for width, height in SHAPES
    }
    made |= {
        f"photo{kind}{seed}": Image.fromarray(photo(kind, seed, 90, 120)) for kind in range(3) for seed in range(3)
    }
    made["alpha"] = Image.fromarray(random.integers(0, 256, (50, 70, 4), np.uint8))
    made["grey"] = made["640x427"].convert("L")
    made["grey-alpha"] = made["alpha"].convert("LA")
    made["palette"] = made["photo00"].convert("P", palette=Image.Palette.ADAPTIVE)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, image in made.items():
        image.save(folder / f"{name}.png")
    made["photo10"].save(folder / "turned.png", exif=turned)
    gamma = PngImagePlugin.PngInfo()
    gamma.add(b"gAMA", struct.pack(">I", 100000))  # how the values are to be shown; the network is given the values
    made["photo20"].save(folder / "gamma.png", pnginfo=gamma)
    return sorted(folder.iterdir())


def test_pixels_and_embeddings_are_those_of_the_python_kit(site: tuple[Path, Embedder, list[Path]]) -> None:
    folder, embedder, pictures = site
    names = json.dumps([picture.name for picture in pictures])
    found = visit(
        folder,
        f"""const {{ decode }} = await import("./decode.js");
        const {{ openModel }} = await import("./model.js");
        const {{ preprocess }} = await import("./resample.js");
        const model = await openModel("student.onnx");
        const found = {{}};
        for (const name of {names}) {{
            const file = await bytes(`pictures/${{name}}`);
            const pixels = preprocess(await decode(file), model.rule);
            found[name] = {{ pixels: Array.from(pixels), embedding: Array.from((await model.embed(file)).embedding) }};
        }}
        report(found);""",
    )
    assert sorted(found) == sorted(picture.name for picture in pictures)
    for picture in pictures:
        pixels = preprocess_from(embedder.contract, load_image(picture))
        assert np.array_equal(found[picture.name]["pixels"], pixels.ravel()), picture.name
        assert np.abs(np.array(found[picture.name]["embedding"]) - embedder.infer(pixels[None])[0][0]).max() <= 1e-4, (
            picture.name
        )


DRIVE = """
const frame = document.body.appendChild(document.createElement("iframe"));
frame.src = "index.html?model=MODEL";
const at = (id) => frame.contentDocument?.getElementById(id);
const text = (id) => at(id)?.textContent ?? "";
await until(() => text("model-state").startsWith("error") || at("index")?.disabled === false);
const give = async (id, names) => {
    const box = new DataTransfer();
    for (const name of names) box.items.add(new File([await bytes(`pictures/${name}`)], name));
    at(id).files = box.files;
    at(id).dispatchEvent(new Event("change"));
};
"""


def test_the_page_finds_the_nearest_and_checks_itself(site: tuple[Path, Embedder, list[Path]]) -> None:
    folder, embedder, pictures = site
    kept = [picture for picture in pictures if picture.name.startswith("photo")]
    query = pictures[0]
    (folder / "pictures" / "broken.png").write_bytes(b"not a picture")
    found = visit(
        folder,
        DRIVE.replace("MODEL", "student.onnx")
        + f"""await give("index", {json.dumps(["broken.png", *(picture.name for picture in kept)])});
        await give("query", [{json.dumps(query.name)}]);
        await until(() => at("nearest").children.length);
        const captions = [...at("nearest").querySelectorAll("figcaption")].map((one) => one.textContent.split("  "));
        const said = {{ check: text("check"), index: text("index-state"), query: text("query-state") }};
        report({{ captions, passed: at("check").dataset.passed, ...said }});""",
    )
    (folder / "pictures" / "broken.png").unlink()
    assert found["passed"] == "true", found
    assert found["check"].startswith("self-check passed: 8 pictures, largest difference ")
    assert found["index"].startswith(f"{len(kept)} pictures, ") and "skipped broken.png (" in found["index"]
    assert float(found["query"].split(" ms in the network")[0].split()[-1]) > 0
    places, cosines = nearest(
        embedder.embed([str(query)]).embeddings, embedder.embed([str(one) for one in kept]).embeddings, 6
    )
    assert [name for _, name in found["captions"]] == [kept[place].name for place in places[0]]
    assert np.abs(np.array([float(cosine) for cosine, _ in found["captions"]]) - cosines[0]).max() <= 2e-4


def test_the_page_says_what_a_picture_is(site: tuple[Path, Embedder, list[Path]]) -> None:
    folder, _, pictures = site
    shown = [str(one) for one in pictures]
    path, embedder = headed(folder / "student.onnx", folder / "headed.onnx", shown, between=True)
    told = embedder.contract | {"sha256": embedder.sha256, "bytes": path.stat().st_size}
    (folder / "headed.json").write_text(json.dumps(told))
    names = json.dumps([picture.name for picture in pictures])
    found = visit(
        folder,
        f"""const {{ openModel }} = await import("./model.js");
        const model = await openModel("headed.onnx");
        const found = [];
        for (const name of {names}) found.push((await model.embed(await bytes(`pictures/${{name}}`))).answer);
        report(found);""",
    )
    expected = named(embedder, embedder.embed(shown))
    assert {one.known for one in expected} == {True, False}
    assert [(one["label"], one["known"]) for one in found] == [(one.label, one.known) for one in expected]
    assert np.allclose([one["probability"] for one in found], [one.probability for one in expected], atol=1e-4)
    said = visit(
        folder,
        DRIVE.replace("MODEL", "headed.onnx")
        + f"""await give("query", [{json.dumps(pictures[0].name)}]);
        await until(() => text("query-answer"));
        report({{ answer: text("query-answer") }});""",
    )
    first = expected[0]
    assert said["answer"] == (
        f"{first.label}, {100 * first.probability:.0f}%" if first.known else f"none of these (nearest: {first.label})"
    )


def test_a_device_that_computes_otherwise_fails_its_self_check(site: tuple[Path, Embedder, list[Path]]) -> None:
    folder, _, _ = site
    for suffix in (".onnx", ".json", ".golden"):
        source, copy = folder / f"student{suffix}", folder / f"other{suffix}"
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
    stored = json.loads((folder / "other.golden" / "golden.json").read_text())
    stored["images"][5]["embedding"][3] += 3e-4
    (folder / "other.golden" / "golden.json").write_text(json.dumps(stored))
    script = (
        DRIVE.replace("MODEL", "other.onnx") + 'report({ passed: at("check").dataset.passed, check: text("check") });'
    )
    found = visit(folder, script)
    assert found["passed"] == "false" and "FAILED" in found["check"]


def test_a_contract_of_another_file_is_refused(site: tuple[Path, Embedder, list[Path]]) -> None:
    folder, _, _ = site
    (folder / "mixed.onnx").write_bytes((folder / "student.onnx").read_bytes() + b"\0")
    shutil.copy(folder / "student.json", folder / "mixed.json")
    found = visit(
        folder,
        DRIVE.replace("MODEL", "mixed.onnx")
        + 'report({ state: text("model-state"), disabled: at("index").disabled });',
    )
    assert found == {"state": "error: student.json belongs to another file than mixed.onnx", "disabled": True}
