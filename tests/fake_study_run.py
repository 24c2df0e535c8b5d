"""A run of a study without training: python fake_study_run.py FOLDER. Its numbers depend on its settings alone.

It locks its folder, goes on where it was stopped, ends with the process that started it, and fails while there is a
file `fail` two folders above its own.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from filelock import FileLock

folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
parent = int(os.environ["PCPO_STUDY_PARENT"])
assert os.environ["OMP_NUM_THREADS"] == "1"
with FileLock(folder / ".lock").acquire(timeout=0):
    (folder / "pid").write_text(str(os.getpid()))
    plan = json.loads((folder / "study_run.json").read_text())
    settings = plan["settings"]
    print("started with seed", settings["seed"], flush=True)
    if (folder.parents[1] / "fail").exists() and settings["seed"] == 1:
        print("Traceback\nValueError: it is broken", file=sys.stderr)
        sys.exit(3)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    metrics.write_text("".join(line + "\n" for line in lines))
    (folder / "checkpoints").mkdir(exist_ok=True)
    for epoch in range(len(lines) + 1, settings["epochs"] + 1):
        if os.getppid() != parent:
            sys.exit(1)
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0.01")))
        with metrics.open("a") as file:
            file.write(json.dumps({"epoch": epoch}) + "\n")
    if (folder.parents[1] / "empty").exists():
        sys.exit(0)
    key = json.dumps([settings[name] for name in ("learning_rate", "seed", "credit", "epochs")])
    reward = -int(hashlib.sha256(key.encode()).hexdigest()[:4], 16) / 2**16
    evaluation = {"epoch": settings["epochs"], "seconds": time.time(), "reward": reward, "frechet_distance": 0.05}
    gradients = [{"epoch": settings["epochs"], "signal": [1.0]}] if plan["gradients"] else []
    result = {"evaluations": [evaluation], "training": {"seconds": [time.time()]}, "gradients": gradients}
    (folder / "partial").write_text(json.dumps(result))
    os.replace(folder / "partial", folder / "result.json")
