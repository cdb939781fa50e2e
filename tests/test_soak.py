"""The short part of tests/soak.py: runs of one process and of two are stopped and killed, each at a random moment, and
go on to the very same result.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_interrupted_runs_end_as_the_uninterrupted_one(tmp_path: Path) -> None:
    counts = {"trials": 1, "stops": 1, "two-trials": 1, "two-stops": 1, "disks": 0, "workers": 0, "decodes": 0}
    words = [
        *(word for name, count in counts.items() for word in (f"--{name}", str(count))),
        "--traced-once",
        "--json",
        str(tmp_path / "soak.json"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), *words]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads((tmp_path / "soak.json").read_text())
    assert [
        told[name]["as_expected"]
        for name in ("kill -9", "SIGTERM", "kill -9 of two processes", "SIGTERM of two processes")
    ] == [1, 1, 1, 1]
