"""python kill_driver.py FOLDER CONFIG.json: kills runs with SIGKILL at injected points, resumes them, prints JSON.

One process imports everything, then forks: for each point a child that trains until it is killed, then one that resumes.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

from diffgen.registry import register
from diffgen.training import Trainer, checkpoint, load_config


@register("reward", "test_red")
def red(samples, prompts, **columns):
    """Mean of the red channel."""
    return samples.float().mean((2, 3))[:, 0]


def die_at(name, count):
    """From now on the count-th call of that function is the process's last; a file is left cut in half."""
    owner = {"replace": os, "fsync": os, "rmtree": shutil, "save_file": checkpoint}[name]
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def wrapper(*args, **kwargs):
        if next(calls) == count:
            if name == "save_file":
                original(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def train(config, point=None):
    """A forked child that trains; its wait status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if point and point[0] != "time":
                die_at(*point)
            Trainer(load_config(config), quiet=True).fit()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    if point and point[0] == "time":
        time.sleep(point[1])
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main(folder, config):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    Trainer(load_config(config | {"output_dir": str(folder / "warm-up")}), quiet=True)  # children find all imported
    started = time.monotonic()
    whole = train(config | {"output_dir": str(folder / "whole")})
    took = time.monotonic() - started
    points = [("save_file", k) for k in (1, 5, 9)]
    points += [("fsync", k) for k in (1, 5, 6, 7, 14, 20)]
    points += [("replace", k) for k in (1, 2, 4, 5)] + [("rmtree", k) for k in (2, 4, 6)]
    points += [("time", random.Random().uniform(0.2, 1.0) * took)]
    results = []
    for i, point in enumerate(points):
        here = config | {"output_dir": str(folder / str(i))}
        killed = train(here, point)
        left = sorted(p.name for p in Path(here["output_dir"]).glob("checkpoints/*"))
        results.append({"point": point, "killed": killed, "left": left, "resumed": train(here)})
    print(json.dumps({"whole": whole, "runs": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
