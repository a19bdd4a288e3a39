"""Adapted models in the programs that people train with: several processes, PEFT's own tests, TRL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(*command: str) -> str:
    """The output of a program, which has to succeed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    # multi_gpu is what accelerate calls its launcher of several processes; they use gloo and the CPU
    options = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no"
    launch = (sys.executable, "-m", "accelerate.commands.launch", *options.split())
    output = run(*launch, str(HERE / "peft_processes.py"), str(tmp_path))
    assert "4 adapters on 2 processes: as on one" in output
