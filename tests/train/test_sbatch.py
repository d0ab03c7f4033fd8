"""The batch script for Slurm, with a scheduler that is faked: srun starts the tasks, scontrol notes what is asked."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fgfast
from fgfast.train.log import read_metrics
from tests.conftest import TINY

pytestmark = pytest.mark.slow

SCRIPT = Path(fgfast.__file__).parent / "examples/pretrain.sbatch"
# As Slurm does: the tasks of one step, the signal to all of them, the highest exit status.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    tasks+=($!)
done
if [[ $TIME_IS_UP_AFTER ]]; then
    until [[ -s $TIME_IS_UP_AFTER ]] || ! kill -0 "${tasks[0]}"; do sleep 0.05; done
    kill -USR1 "${tasks[@]}"
fi
status=0
for task in "${tasks[@]}"; do
    wait "$task"
    this=$?
    status=$((this > status ? this : status))
done
exit "$status"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" >>requests.txt; fi
"""


def job_with_a_free_port() -> int:
    """A job number by which the script finds a port that no program uses."""
    while True:
        job = random.randrange(12000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", 20000 + job)):
                return job


def test_a_run_is_queued_again_until_it_is_finished(drawn: Path, tmp_path: Path) -> None:
    """The first run is stopped when its time is up; the second continues it, here with another number of ranks."""
    stubs = {"srun": SRUN, "scontrol": SCONTROL, "fgfast": f'#!/bin/bash\nexec {sys.executable} -m fgfast "$@"\n'}
    for name, text in stubs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    options = f"--data {drawn} --out run --model {TINY} --size 32 --epochs 12 --hidden 16 --projection 8"
    rest = "--device cpu --threads 1 --amp off --log-every 1 --knn-every 0"
    job = job_with_a_free_port()

    def submit(tasks: int, time_is_up_after: str) -> int:
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(Path(fgfast.__file__).parents[1]),
            "SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": str(tasks),
            "TIME_IS_UP_AFTER": time_is_up_after, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = ["bash", str(SCRIPT), "simclr", *options.split(), *rest.split(), "--batch-size", str(8 // tasks)]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | environment, check=False, timeout=300).returncode

    assert submit(2, "run/metrics.jsonl") == 130
    assert (tmp_path / "requests.txt").read_text() == f"requeue {job}\n"
    assert "stopped at step" in (tmp_path / "run/log.txt").read_text()
    assert submit(1, "") == 0
    assert (tmp_path / "requests.txt").read_text() == f"requeue {job}\n"
    steps = [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")[0] if "loss" in row]
    assert steps == sorted(set(steps))


def test_the_script_asks_for_what_it_relies_on() -> None:
    """And shellcheck, where it is at hand, finds no fault in it."""
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), flags=re.MULTILINE))
    assert {"signal": "USR1@300", "open-mode": "append", "requeue": ""}.items() <= options.items()
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(SCRIPT)], check=True)
