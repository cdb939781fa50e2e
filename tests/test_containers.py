"""The images' files and the CI jobs in the docs, read and not run: containers/build.sh runs them."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from bingo_compress import cli

ROOT = Path(__file__).parent.parent
IMAGES = (ROOT / "Dockerfile", ROOT / "export/Dockerfile")
DOCS = (ROOT / "docs/containers.md").read_text(encoding="utf-8")
JOBS = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
HOST = re.compile(r"\b[\w-]+(\.[\w-]+)*\.(io|org|com|net|dev)\b")


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined, comments left out."""
    text = re.sub(r"(?m)^\s*#.*\n", "", file.read_text(encoding="utf-8")).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.strip().partition(" ") for line in text.splitlines()) if word]


def commands(job: Any) -> Iterator[list[str]]:
    """Every bingo-compress command line among a job's strings."""
    if isinstance(job, dict):
        job = list(job.values())
    if isinstance(job, list):
        for part in job:
            yield from commands(part)
    elif isinstance(job, str) and job.startswith("bingo-compress "):
        yield shlex.split(job)


@pytest.mark.parametrize("file", IMAGES, ids=str)
def test_an_image_runs_as_a_plain_user_on_the_base_that_is_asked_for(file: Path) -> None:
    found = instructions(file)
    assert found[0][0] == "ARG" and re.fullmatch(r"BASE=\S+:\d[\w.-]+", found[0][1])  # a version, not what is newest
    assert {rest.split()[0] for word, rest in found if word == "FROM"} == {"${BASE}", "uv"}
    users = [rest for word, rest in found if word == "USER"]
    # By number: Kubernetes' runAsNonRoot refuses a name.
    assert users and all(re.fullmatch(r"[1-9]\d*(:\d+)?", user) for user in users)
    assert found[-2][0] == "ENTRYPOINT" and found[-1] == ("CMD", '["--help"]')
    labels = next(rest for word, rest in found if word == "LABEL")
    assert {"title", "description", "version", "revision"} <= set(
        re.findall(r"org\.opencontainers\.image\.(\w+)=", labels)
    )


@pytest.mark.parametrize("file", IMAGES, ids=str)
def test_nothing_is_reported_to_anyone(file: Path) -> None:
    assert any(word == "ENV" and "ORT_DISABLE_TELEMETRY=1" in rest for word, rest in instructions(file))


@pytest.mark.parametrize("file", IMAGES, ids=str)
def test_every_package_is_pinned_by_its_hash(file: Path) -> None:
    for word, rest in instructions(file):
        if word == "RUN":
            for command in re.findall(r"(?:pip install|uv build)(?:(?!&&).)*", rest):
                assert "--require-hashes" in command or "--no-deps /wheel/*.whl" in command, command


def test_the_small_image_never_sees_torch() -> None:
    text = " ".join(rest for word, rest in instructions(ROOT / "export/Dockerfile") if word != "LABEL")
    assert "torch" not in text and "bingo_compress" not in text
    needed = tomllib.loads((ROOT / "export/pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert {re.match(r"\w+", line)[0] for line in needed} == {"numpy", "pillow", "onnxruntime"}  # type: ignore[index]


def test_the_builder_is_sent_what_the_wheels_are_made_of_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    for line in lines:
        if line.startswith("!"):
            assert (ROOT / line[1:]).exists(), line


@pytest.mark.parametrize("file", [*IMAGES, ROOT / "containers/build.sh", ROOT / "docs/containers.md"], ids=str)
def test_no_host_and_no_floating_tag_is_named(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not HOST.search(text.replace("org.opencontainers.image", ""))
    assert "latest" not in text


@pytest.mark.parametrize("text", JOBS, ids=["actions", "gitlab"])
def test_the_jobs_in_the_docs_use_commands_and_options_that_exist(text: str) -> None:
    known = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    lines = list(commands(yaml.safe_load(text)))
    # The file is judged, not the student before it.
    assert [line[1] for line in lines] == [
        "distill",
        "export",
        "validate",
    ]
    for line in lines:
        options = {option for parameter in known[line[1]].params for option in parameter.opts}
        assert {word for word in line if word.startswith("--")} <= options, line


def test_both_services_are_shown() -> None:
    actions, gitlab = (yaml.safe_load(text) for text in JOBS)
    assert actions["jobs"]["distil"]["container"]["image"] == gitlab["distil"]["image"]["name"]
    assert gitlab["distil"]["image"]["entrypoint"] == [""]
