"""A fault in a command's process: FAULT=what:rank:phase:step, such as hang:1:forward:4; idle without it."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path


def act(what: str) -> None:
    """Do it, once per run; "slow" each time."""
    if what == "slow":
        time.sleep(0.3)
        return
    if what != "crash-always":
        try:
            Path(f"{os.environ['FAULT_RUN']}.fault").touch(exist_ok=False)
        except FileExistsError:
            return
    if what == "hang":
        print("hangs now", flush=True)
        hang_here()
    elif what == "usr1":
        os.kill(os.getpid(), signal.SIGUSR1)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        raise ZeroDivisionError("boom")


def hang_here() -> None:
    """Native code that does not come back, signals or not, without the GIL."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def install() -> None:
    """Reach the point when the progress of this rank does."""
    import importlib.abc
    import importlib.machinery

    what, rank, phase, step = os.environ["FAULT"].split(":")
    if os.environ.get("RANK", "0") != rank or "vlm_dist.train" not in sys.orig_argv:
        return

    def patch_progress(module):
        at = module.Progress.at

        def noted(self, told, step_now=None, samples=()):
            at(self, told, step_now, samples)
            if told == phase and self.mark.step >= int(step):
                act(what)

        module.Progress.at = noted

    def patch_run(module):
        groups, model = module.init_process_groups, module.make_model

        def then_groups(*args, **options):
            made = groups(*args, **options)
            if phase == "groups":
                act(what)
            return made

        def then_model(*args, **options):
            if phase == "loading":
                act(what)
            return model(*args, **options)

        module.init_process_groups, module.make_model = then_groups, then_model

    patches = {"vlm_dist.distributed.progress": patch_progress, "vlm_dist.build.run": patch_run}

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if phase == "import" and name == "torch":
                act(what)
            if name not in patches:
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            run = spec.loader.exec_module

            def then_patch(module):
                run(module)
                patches[name](module)

            spec.loader.exec_module = then_patch
            return spec

    sys.meta_path.insert(0, Finder())


if os.environ.get("FAULT"):
    install()
