"""Many processes that each write a run through our tracking code.

    python -m tests.support.tracking_load URI PROCESSES STEPS PAUSE

Prints a JSON list of run ids, in order of the processes. They are forks of one that has imported MLflow, since so many
imports at once take longer than what is tested.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from pipelines.tracking.run import EXPERIMENT, Tracker, connect


def value(process: int, step: int) -> float:
    """What the process writes at a step."""
    return process + step / 1000


def write(uri: str, process: int, steps: int, pause: float) -> str:
    """One run; returns its id, and raises where a point is left unsent."""
    tracker = Tracker.start(uri, EXPERIMENT, f"writer-{process}", {"process": str(process)}, {})
    for step in range(steps):
        tracker.log({"train/loss/total": value(process, step), "perf/samples_per_second": 1.0}, step)
        time.sleep(pause)
    unsent = tracker.finish(limit=120)
    assert unsent == 0, f"{unsent} points are unsent"
    return tracker.run_id


def main() -> None:
    """Fork, write, wait, print."""
    uri, count, steps, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    connect(uri)
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for process in range(count):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    os.chdir(folder)
                    (Path(folder) / str(process)).write_text(write(uri, process, steps, pause))
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert not any(codes), codes
        sys.stdout.write(json.dumps([(Path(folder) / str(process)).read_text() for process in range(count)]))


if __name__ == "__main__":
    main()
