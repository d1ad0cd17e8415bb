"""Notes, after every optimizer step of this rank, the time and what its node has sent: WIRE_LOG=directory.

On Python's path of a run of `tests.bench.nodes`; idle without the variable.
"""

import json
import os
import sys
import time
from pathlib import Path


def sent_bytes():
    """Of all interfaces but the loopback, since the node has booted."""
    rows = [line.split() for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]]
    return sum(int(row[9]) for row in rows if row[0] != "lo:")


def install():
    import importlib.abc
    import importlib.machinery

    log = (Path(os.environ["WIRE_LOG"]) / f"rank-{os.environ['SLURM_PROCID']}").open("a", buffering=1)

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name != "vlm_dist.distributed.progress":
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            run = spec.loader.exec_module

            def then_patch(module):
                run(module)
                at = module.Progress.at

                def noted(self, phase, step=None, samples=()):
                    at(self, phase, step, samples)
                    if phase == "reporting":
                        note = {"step": self.mark.step, "seconds": time.perf_counter(), "sent": sent_bytes()}
                        log.write(json.dumps(note) + "\n")

                module.Progress.at = noted

            spec.loader.exec_module = then_patch
            return spec

    sys.meta_path.insert(0, Finder())


if os.environ.get("WIRE_LOG") and "vlm_dist.train" in sys.orig_argv:
    install()
