"""Engines in processes of their own: started, told to measure one after the other, watched.

Nobody measures while another engine computes, and what the idle ones use meanwhile is reported
with every measurement.
"""

import json
import os
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

WORKER = Path(__file__).with_name("engine_worker.py")
SOURCES = WORKER.parent.parent / "src"
TICK = os.sysconf("SC_CLK_TCK")


class Key(NamedTuple):
    """One process."""

    kind: str
    form: str
    threads: int


class Ended(Exception):
    """A worker's process is gone."""


class Worker:
    """A process that has loaded one model. `missing` says why it could not."""

    def __init__(
        self, key: Key, model: Path, options: dict[str, Any], python: str, log: Path,
        script: Path = WORKER,
    ) -> None:  # fmt: skip
        threads = str(key.threads)
        environment = {
            **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        if python == sys.executable:
            paths = [str(SOURCES), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self.log = log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [python, str(script), key.kind, str(model), key.form, threads, json.dumps(options)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment,
            )  # fmt: skip
        self.ready = self._answer()
        self.missing: str | None = self.ready.get("missing")

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Its answer to one command."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        raise Ended(f"its process ended with code {code}: {' '.join(last)} (see {self.log})")

    def cpu_seconds(self) -> float:
        """That the process has used since it started; 0 when it has ended."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / TICK

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Pool:
    """At most `resident` workers; who was not used for longest is ended to make room, and loaded
    again when its turn comes."""

    def __init__(
        self, models: Any, options: dict[str, Any], resident: int, pythons: dict[str, str],
        log: Path, script: Path = WORKER,
    ) -> None:  # fmt: skip
        self.models, self.options, self.resident = models, options, resident
        self.pythons, self.log, self.script = pythons, log, script
        self.workers: OrderedDict[Key, Worker] = OrderedDict()
        self.missing: dict[tuple[str, str], str] = {}
        """(kind, form) -> why it cannot be measured."""
        self.facts: dict[str, Any] = {}

    def get(self, key: Key) -> Worker | None:
        """The worker, loaded; None if there is none, for the reason in `missing`."""
        if (key.kind, key.form) in self.missing:
            return None
        if key in self.workers:
            self.workers.move_to_end(key)
            return self.workers[key]
        while len(self.workers) >= self.resident:
            self.workers.popitem(last=False)[1].close()
        model = Path() if key.kind == "probe" else self.models.of(key.kind, key.form)
        python = self.pythons.get(key.kind, sys.executable)
        worker = Worker(key, model, self.options, python, self.log, self.script)
        if worker.missing is not None:
            worker.close()
            self.missing[key.kind, key.form] = worker.missing
            return None
        self.facts[key.kind] = {**worker.ready["versions"], **worker.ready["facts"]}
        self.workers[key] = worker
        return worker

    def measure(self, key: Key, do: str, **more: Any) -> dict[str, Any] | None:
        """One answer, with what every other worker computed in the meantime (`others_cpu`, as a
        share of one core) and the machine's load; None if this engine cannot. An engine whose
        process ends is not asked again: the measurements of the others are worth keeping."""
        try:
            worker = self.get(key)
            return None if worker is None else self._measured(key, worker, do, more)
        except Ended as error:
            self.workers.pop(key, None)
            self.missing[key.kind, key.form] = str(error)
            return None

    def _measured(
        self, key: Key, worker: Worker, do: str, more: dict[str, Any]
    ) -> dict[str, Any] | None:
        others = [other for other in self.workers.values() if other is not worker]
        before, begun = sum(other.cpu_seconds() for other in others), time.perf_counter()
        answer = worker.ask(do, **more)
        spent = time.perf_counter() - begun
        if "missing" in answer:
            self.missing[key.kind, key.form] = answer["missing"]
            return None
        used = sum(other.cpu_seconds() for other in others) - before
        return {**answer, "others_cpu": used / spent, "load": os.getloadavg()[0]}

    def close(self, form: str | None = None, threads: int | None = None) -> None:
        """End the workers of this form and thread count, or all; the probe has no form."""
        for key in list(self.workers):
            if form in (None, key.form) and threads in (None, key.threads):
                self.workers.pop(key).close()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def environment() -> dict[str, Any]:
    """What a number depends on beside the options."""
    root = WORKER.parent
    told = [
        subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True).stdout
        for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
    ]
    return {
        "commit": told[0].strip() + ("+changes" if told[1].strip() else ""),
        "cores": os.cpu_count(), "load_average": os.getloadavg(),
        "environment": {
            name: value for name, value in os.environ.items()
            if name.startswith(("OMP_", "MKL_", "MALLOC_", "KMP_", "GOMP_", "OPENBLAS_"))
        },
    }  # fmt: skip
