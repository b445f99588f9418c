"""`harness run`'s second half for tests: starts a script as the ranks of a run, under the real launcher.

python drive.py RUN_DIR RANKS SCRIPT
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

from harness.config import Config
from harness.errors import HarnessError
from harness.rundir import RunDir
from launch.command import build
from launch.lock import alone
from launch.plan import make_plan
from launch.start import start

root, ranks, script = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
launcher = os.environ.get("DRIVE_LAUNCHER", "mpirun")
launch = {"ranks": ranks, "launcher": launcher, "threads": 1}
restart = {"most": int(os.environ.get("DRIVE_RESTARTS", "0")), "backoff": os.environ.get("DRIVE_BACKOFF", "50ms")}
config = Config.model_validate(
    {
        "name": "x",
        "task": {"name": "linear"},
        "train": {"steps": 1, "global_batch": 8},
        "launch": launch,
        "restart": restart,
    }
)
plan = make_plan(config, [])
job = replace(plan.job, program=(sys.executable, "-u", script, str(root)))
root.mkdir(parents=True, exist_ok=True)
run = RunDir(root)
try:
    with alone(run):
        sys.exit(start(replace(plan, job=job, command=build(job, plan.mpi)), run, config))
except HarnessError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.code)
