"""`python -m vlm_dist.demo`: data, model, half a training run, the other half by resuming, and the proof.

Everything it writes is under build/demo. Training is the literal command of the run file, in processes of its own.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from vlm_dist.demo.answer_format import teach_answer_format
from vlm_dist.demo.digits import build_digit_data, split_digits
from vlm_dist.demo.proof import AdapterProof, RunRecord, format_table, load_and_score, read_run
from vlm_dist.demo.tiny_model import TinyShape, build_config, build_model, build_processor, save_checkpoint
from vlm_dist.errors import ExitCode, VlmDistError
from vlm_dist.observability.jsonl import METRICS_FILE

#: The paths of configs/demo.yaml, relative to the working directory.
RUN_FILE = Path("configs/demo.yaml")
ROOT = Path("build/demo")
DATA, BASE, RUN = ROOT / "data", ROOT / "base", ROOT / "run"
HELDOUT = {"images": "images-heldout", "clips": "clips-heldout"}  # source name -> directory

NUM_PROCESSES = 2
DEFAULT_PORT = 29500  # DeepSpeed's; another one where it is taken

SHORT_STEPS = 120
#: Exact match that must be reached, by source; chance is 0.1 and 0.01.
SHORT_FLOOR = {"images": 0.3, "clips": 0.1}
FULL_FLOOR = {"images": 0.85, "clips": 0.5}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; gives back the exit code."""
    options = _parse(arguments)
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft 0.21, transformers 5.23
    disable_progress_bar()  # type: ignore[no-untyped-call]  # a checkpoint of a megabyte needs none
    started = time.monotonic()
    if not RUN_FILE.exists():
        print(f"error: no {RUN_FILE} here; run the demo in the root of the repository", file=sys.stderr)
        return ExitCode.CONFIG
    try:
        num_heldout = prepare(options.seed)
        settings = [f"deepspeed=ds_configs/zero{options.zero}.json", f"train.seed={options.seed}"]
        if options.short:
            settings.append(f"train.max_steps={SHORT_STEPS}")
        for half in ("train.stop_at_step=0.5", "train.resume=auto"):
            exit_code = train([*settings, half])
            if exit_code:
                print(f"error: training ended with exit code {exit_code}; see above", file=sys.stderr)
                return exit_code
        record = read_run(RUN / METRICS_FILE, list(HELDOUT))
        _announce("load the adapter with PEFT")
        proof = load_and_score(BASE, RUN / "adapter", split_digits()[1])
    except VlmDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    missed = shortfalls(record, proof, SHORT_FLOOR if options.short else FULL_FLOOR)
    print(f"\ndemo: ZeRO-{options.zero}, {_num_processes()} processes, {time.monotonic() - started:.0f} s")
    print(format_table(record, proof, BASE, num_heldout))
    for line in missed:
        print(f"error: {line}", file=sys.stderr)
    return ExitCode.FAILURE if missed else ExitCode.DONE


def prepare(seed: int) -> dict[str, int]:
    """Make data and base model anew.

    Returns:
        Number of held-out samples by source name.
    """
    _announce("build shards of digits")
    shutil.rmtree(ROOT, ignore_errors=True)
    data = build_digit_data(DATA)
    print(f"{DATA}: {', '.join(f'{n} {name}' for name, n in data.num_samples.items())}; {data.num_bytes:,} bytes")

    _announce("make a tiny Qwen2-VL and teach it what an answer looks like")
    torch.set_num_threads(1)  # the order of sums, and with it the base, shall not depend on the number of cores
    shape = TinyShape()
    processor = build_processor(shape)
    model = build_model(build_config(shape, processor.tokenizer), seed)
    loss = teach_answer_format(model, processor, seed=seed)
    save_checkpoint(BASE, model, processor, torch.bfloat16)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{BASE}: {num_parameters:,} parameters, {loss:.2f} nats per token on noise")
    return {source: data.num_samples[directory] for source, directory in HELDOUT.items()}


def train(settings: Sequence[str]) -> int:
    """Run the training command in processes of its own; gives back its exit code."""
    command = ["deepspeed", "--num_gpus", str(_num_processes())]
    if not _is_free(DEFAULT_PORT):
        command += ["--master_port", str(_free_port())]
    command += ["-m", "vlm_dist.train", "--config", str(RUN_FILE)]
    for setting in settings:
        command += ["--set", setting]
    _announce(shlex.join(command))
    environment = dict(os.environ)
    # the `deepspeed` of this environment, also where it is not activated
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if not torch.cuda.is_available():
        environment.setdefault("OMP_NUM_THREADS", "1")  # two processes on two cores
    return subprocess.run(command, env=environment, check=False).returncode  # noqa: S603 - our own command


def shortfalls(record: RunRecord, proof: AdapterProof, floor: dict[str, float]) -> list[str]:
    """What the run should have reached and has not."""
    reached = {name: record.tuned.exact_match[name] for name in floor}
    reached["images, loaded with PEFT"] = proof.images_exact_match
    floor = {**floor, "images, loaded with PEFT": floor["images"]}
    return [
        f"{name}: exact match {reached[name]:.3f} is below {least}"
        for name, least in floor.items()
        if reached[name] < least
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vlm_dist.demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--short", action="store_true", help=f"{SHORT_STEPS} steps, and only better than chance")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=2, help="ZeRO stage (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the base model and the run (%(default)s)")
    return parser.parse_args(arguments)


def _num_processes() -> int:
    return min(NUM_PROCESSES, torch.cuda.device_count()) if torch.cuda.is_available() else NUM_PROCESSES


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _announce(what: str) -> None:
    print(f"\n== {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
