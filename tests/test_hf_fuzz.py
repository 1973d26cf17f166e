"""2,000 hostile model folders; tests/hf_fuzz.py says what they are and what must hold for each."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_hostile_folders(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.hf_fuzz", "2000", "0", str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["refused"] + outcome["harmless"] == 2000
    assert outcome["refused"] > 1500
    assert outcome["harmless"] > 20  # else the good folders are not good
    assert outcome["memory"] < 512 << 20
    assert not outcome["code_was_run"]
