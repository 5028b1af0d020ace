"""Tensor-parallel ranks agree about a near tie, on vLLM's own group of two processes."""

import json
import os
import socket
import subprocess
import sys


def test_ranks_take_choice_and_rows_of_the_first():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.engine.unit.ranks"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), outputs
    found = [json.loads(out.strip().splitlines()[-1]) for out, _ in outputs]
    assert found == [[[0, 1], [[0.0, 1.0], [2.0, 3.0]]]] * 2
