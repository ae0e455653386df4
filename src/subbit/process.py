"""Worker processes: a step of a sweep or a round of a bench, each with a peak memory and an end of its own.

A worker reads its job, a dataclass, as one line of JSON from standard input. That input stays open until the worker is
done: when it ends, who started the worker is gone, and the worker goes too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import transformers

import subbit
from subbit.device import pick_device

__all__ = ["environment", "how_it_ended", "peak_bytes", "read_job", "resident_bytes", "run_module"]

# ---- who starts one --------------------------------------------------------------------------------------------------


def run_module(module: str, job: Any) -> tuple[int, str]:
    """Run ``python -m module`` for a job, a dataclass: its exit code and what it printed. It has ended in any case."""
    process = subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace"
    )
    assert process.stdin is not None
    assert process.stdout is not None
    output = ""
    try:
        with process.stdin, process.stdout:  # both open until the worker is done
            process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            process.stdin.flush()
            output = process.stdout.read()
            process.wait()
    except BrokenPipeError:  # it ended before it read its job
        pass
    finally:
        code = process.wait()
    return code, output


def how_it_ended(what: str, code: int) -> str:
    """In a line, for a worker that could not say it itself."""
    if code >= 0:
        return f"{what} ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"{what} was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


# ---- the worker ------------------------------------------------------------------------------------------------------


def read_job() -> dict[str, Any]:
    """The fields of the job. From here on this process ends with its standard input, and transformers warns no more."""
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    transformers.utils.logging.set_verbosity_error()
    return job


def _leave_with_parent() -> None:
    """End this process as soon as its standard input does; what a step has written so far is whole at any moment."""
    while os.read(0, 1):
        pass
    os._exit(1)


# ---- what it says of itself ------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """The most memory that this process ever had.

    Linux hands the ru_maxrss of a process on to its children, so there the mark of this process alone is read.
    """
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else 1024 * usage


def resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not say."""
    return _status_bytes("VmRSS") or 0


def _status_bytes(field: str) -> int | None:
    """A field of Linux's status of this process; None on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))
    except (OSError, StopIteration):
        return None


def environment(device: str) -> dict[str, Any]:
    """Versions and machine."""
    chosen = pick_device(device)
    return {
        "versions": {
            "subbit": subbit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
            "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else str(chosen),
        },
    }


def _processor() -> str:
    """The model name of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
