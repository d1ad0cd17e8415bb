"""`vlm-dist launch`, with make-believe srun, sbatch, ssh and pdsh where the real ones would begin."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launcher.deepspeed_cli import hosts_command
from launcher.plan import count_gpus, free_port_here

PROJECT = Path(__file__).resolve().parents[3]
TOOL = [sys.executable, "-m", "vlm_dist.cli"]

RECORD = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORD"], "a") as record:
    stdin = sys.stdin.read() if os.path.basename(sys.argv[0]) == "sbatch" else ""
    print(json.dumps({{"argv": sys.argv, "stdin": stdin, "env": dict(os.environ)}}), file=record)
sys.exit(int(os.environ.get("RECORD_EXIT", "0")))
"""
# What pdsh and ssh do: the words become one line, which a shell on every host reads; its Python is the recorder.
PDSH = """#!/bin/bash
shift 5
line="$*"
exec bash -c "${line//$REAL_PYTHON/$RECORDER}"
"""


@pytest.fixture
def place(tmp_path):
    """A working directory with a run, and a folder of commands."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "shards").mkdir()
    (tmp_path / "model").mkdir()
    for name in ("model", "collator", "train", "peft", "data"):
        (tmp_path / f"{name}.yaml").write_text("{}\n")
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    overrides = {
        "model": {
            "model_classes": {
                "./model": {
                    "model_class": "Qwen2VLForConditionalGeneration",
                    "processor_class": "Qwen2VLProcessor",
                    "import_path": "transformers",
                }
            }
        },
        "data": {"train": [{"type": "tar", "path": "shards"}]},
        "train": {"report_to": "none"},
    }
    files = {name: f"{name}.yaml" for name in ("model", "collator", "train", "peft", "data")}
    run = {"model": "./model", "configs": files, "deepspeed": "zero2.json", "overrides": overrides}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def environment(place, **more):
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM", "WANDB", "HF_", "CUDA_VISIBLE"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        kept.pop(name, None)
    path = f"{place / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"
    own = {"PATH": path, "PYTHONPATH": str(PROJECT), "RECORD": str(place / "record"), "HOME": str(place)}
    return kept | own | more


def fake(place, *names):
    for name in names:
        (place / "bin" / name).write_text(PDSH if name == "pdsh" else RECORD)
        (place / "bin" / name).chmod(0o755)


def launch(place, *arguments, **more):
    command = [*TOOL, "launch", "run.yaml", *arguments]
    return subprocess.run(
        command, cwd=place, env=environment(place, **more), capture_output=True, text=True, timeout=90
    )


def recorded(place):
    return [json.loads(line) for line in (place / "record").read_text().splitlines()]


def planned(ended):
    """The command of a dry run."""
    assert ended.returncode == 0, ended.stderr
    return shlex.split(ended.stdout.splitlines()[-1])


def test_the_login_node_needs_no_torch(place):
    code = (
        "import sys\nfrom vlm_dist.cli.main import main\n"
        "code = main(['launch', 'run.yaml', '--dry-run'])\n"
        "sys.exit(code or bool({'torch', 'deepspeed', 'transformers', 'numpy', 'peft', 'psutil'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=place, env=environment(place), check=True, timeout=60)
    code = (
        "import sys\nfrom vlm_dist.cli.main import _parser\n_parser()\n"
        "sys.exit(bool({'pydantic', 'yaml', 'torch'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=place, env=environment(place), check=True, timeout=60)


def test_one_process_is_plain_python_and_several_are_deepspeeds(place):
    assert planned(launch(place, "--dry-run"))[1:] == ["-m", "vlm_dist.train", "--config", "run.yaml"]
    override = "train.run_name='it''s $HOME'"
    several = planned(launch(place, "--dry-run", "--gpus-per-node", "2", "--set", override))
    assert several[1:5] == ["-m", "launcher.deepspeed_cli", "--num_gpus", "2"]
    assert several[5] == "--master_port"
    assert several[7:] == ["-m", "vlm_dist.train", "--config", "run.yaml", "--set", override]


def test_restarts_are_the_elastic_launchers(place):
    command = planned(launch(place, "--dry-run", "--gpus-per-node", "2", "--max-restarts", "3"))
    assert command[1:] == shlex.split(
        "-m launcher.elastic --nproc_per_node 2 --max_restarts 3 -m vlm_dist.train --config run.yaml"
    )


def test_what_an_earlier_launch_left_is_taken_out(place):
    assert "\nunset RANK MASTER_PORT\n" in launch(place, "--dry-run", RANK="3", MASTER_PORT="1").stdout


def test_gpus_are_counted_without_the_driver(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    assert count_gpus({}, tmp_path) == 3
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "4,5"}, tmp_path) == 2
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, tmp_path) == 1


@pytest.mark.parametrize(
    ("devices", "expected"),
    [("4,5", "launcher.deepspeed_cli --include localhost:4,5"), ("GPU-a,GPU-b", "launcher.elastic --nproc_per_node 2")],
)
def test_the_devices_that_the_user_chose_are_those_that_are_used(place, devices, expected):
    ended = launch(place, "--dry-run", CUDA_VISIBLE_DEVICES=devices)
    assert f"-m {expected}" in ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--set", "data.train=[{type: tar, path: gone}]", "--set", "train.learning_rte=1"], ["learning_rate"]),
        (["--set", "data.train=[{type: tar, path: 'gone/{0..3}.tar'}]"], ["data.train[0].path", "gone/{0..3}.tar"]),
        (["--set", "train.output_dir=run.yaml/x"], ["train.output_dir", "run.yaml"]),
        (["--nodes", "2"], ["--hostfile", "--slurm"]),
        (["--hostfile", "hosts"], ["hosts"]),
        (["--slurm", "--max-restarts", "1"], ["--max-restarts"]),
        (["--account", "me"], ["--account", "--slurm"]),
        (["--slurm", "--template", "gone.sbatch"], ["gone.sbatch"]),
        (["--slurm", "--sbatch", "-C a100"], ["--sbatch -C a100"]),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(place, arguments, named):
    fake(place, "sbatch", "srun", "ssh", "pdsh")
    ended = launch(place, *arguments)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    for name in named:
        assert name in ended.stderr
    assert not (place / "record").exists()


def test_what_may_lie_on_the_nodes_only_is_a_notice(place):
    fake(place, "sbatch")
    ended = launch(place, "--slurm", "--dry-run", "--set", "data.train=[{type: tar, path: /local/shards}]")
    assert ended.returncode == 0
    assert "there is no /local/shards, on this machine" in ended.stderr


def test_a_job_is_submitted_with_options_and_the_filled_script(place):
    fake(place, "sbatch")
    arguments = ["--slurm", "--nodes", "4", "--gpus-per-node", "2", "--account", "vision", "--sbatch=--constraint=a100"]
    ended = launch(place, *arguments, "--set", "train.run_name=a 'b'", RECORD_EXIT="7")
    assert ended.returncode == 7, ended.stderr
    (sbatch,) = recorded(place)
    assert sbatch["argv"][1:] == [
        "--account=vision", "--nodes=4", "--gpus-per-node=2", "--ntasks-per-node=2", "--constraint=a100",
    ]  # fmt: skip
    script = sbatch["stdin"]
    assert "my-account" not in script or "--account=my-account" in script  # the command line wins
    assert "--partition" not in script  # the shipped script's own word: the cluster's default is better
    assert "no --partition was given" in ended.stderr
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    # what the script would give the trainer
    lines = [line for line in script.splitlines() if line.startswith(("RUN_FILE=", "set -- "))]
    shown = subprocess.run(
        ["bash", "-c", "\n".join([*lines[:2], 'printf "%s\\n" "$RUN_FILE" "$@"'])], capture_output=True, text=True
    )
    assert shown.stdout.splitlines() == ["run.yaml", "--set", "train.run_name=a 'b'"]


def test_a_script_is_written_for_this_run(place):
    variables = ["--modules", "cuda/12.4 gcc", "--container", "/images/my train.sif"]
    ended = launch(
        place, "--render", "mine.sbatch", "--nodes", "3", "--partition", "long", "--sbatch=--exclusive", *variables
    )
    assert ended.returncode == 0, ended.stderr
    script = (place / "mine.sbatch").read_text()
    header = [line.split("#")[1].strip() for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "SBATCH --nodes=3" in header
    assert "SBATCH --partition=long" in header
    assert "SBATCH --exclusive" in header
    assert not any("account" in line for line in header)
    assert "RUN_FILE=run.yaml\n" in script
    assert script.splitlines()[1].startswith("# Made by: vlm-dist launch run.yaml --render")
    lines = [line.split("#")[0] for line in script.splitlines() if line.startswith(("MODULES=", "CONTAINER="))]
    shown = subprocess.run(
        ["bash", "-c", "\n".join([*lines, 'printf "%s\n" "$MODULES" "$CONTAINER"'])], capture_output=True, text=True
    )
    assert shown.stdout.splitlines() == ["cuda/12.4 gcc", "/images/my train.sif"]
    assert "--modules is of slurm/train.sbatch" in launch(place, "--local", *variables).stderr
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_inside_an_allocation_the_run_is_a_step_of_it(place):
    fake(place, "srun")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "6"}
    ended = launch(place, "--gpus-per-node", "4", RECORD_EXIT="75", **job)
    assert ended.returncode == 75, ended.stderr
    (srun,) = recorded(place)
    assert srun["argv"][1:7] == [
        "--export=ALL", "--kill-on-bad-exit=1", "--nodes=2", "--ntasks-per-node=4", "--ntasks=8", "--cpus-per-task=6",
    ]  # fmt: skip
    assert srun["argv"][8:] == ["-m", "vlm_dist.train", "--config", "run.yaml"]
    shell = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}  # srun --pty bash
    assert "--overlap" in planned(launch(place, "--dry-run", **job, **shell))
    assert launch(place, "--dry-run", **job, **shell | {"SLURM_STEP_NUM_TASKS": "8"}).returncode == 2
    here = launch(place, "--local", "--dry-run", **job)
    assert planned(here)[1:] == ["-m", "vlm_dist.train", "--config", "run.yaml"]


def test_a_dry_run_is_what_would_have_run(place):
    fake(place, "sbatch")
    arguments = ["--slurm", "--nodes", "2", "--set", "train.run_name=a 'b' $c"]
    launch(place, *arguments)
    dry = launch(place, *arguments, "--dry-run")
    subprocess.run(["bash", "-c", dry.stdout], cwd=place, env=environment(place), check=True, timeout=60)
    real, printed = recorded(place)
    assert printed["argv"] == real["argv"]
    without_origin = [[line for line in r["stdin"].splitlines() if "Made by" not in line] for r in (real, printed)]
    assert without_origin[0] == without_origin[1]


@pytest.mark.e2e
def test_values_arrive_on_the_hosts_as_they_were_given(place):
    """DeepSpeed's own runner, down to the line that the shell of a host reads."""
    fake(place, "ssh", "pdsh", "recorder")
    (place / "hosts").write_text("# two\n\nhost1 slots=2\nhost2 slots=2\n")
    (place / ".deepspeed_env").write_text("MINE=1\n\n# blank lines and remarks end the runner\n")
    awkward = "train.run_name=x\"a\" $HOME `id` \\ 'b'; echo &"
    more = {
        "REAL_PYTHON": sys.executable, "RECORDER": str(place / "bin" / "recorder"), "DS_ACCELERATOR": "cpu",
        "HF_HOME": "/data/h f/$x", "WANDB_API_KEY": "geheim", "WANDB_MODE": "offline",
    }  # fmt: skip
    arguments = ["--hostfile", "hosts", "--master-addr", "10.0.0.1", "--master-port", "15001"]
    ended = launch(place, *arguments, "--set", awkward, "--set", "data.index_dir=a*;b'c$d", **more)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    remote = recorded(place)[-1]
    assert remote["argv"][remote["argv"].index("vlm_dist.train") :] == [
        "vlm_dist.train", "--config", "run.yaml", "--set", awkward, "--set", "data.index_dir=a*;b'c$d",
    ]  # fmt: skip
    assert "--master_port=15001" in remote["argv"]
    expected = {"HF_HOME": "/data/h f/$x", "WANDB_MODE": "offline", "MINE": "1", "DS_ACCELERATOR": "cpu"}
    assert {name: remote["env"].get(name) for name in expected} == expected
    assert "geheim" not in ended.stdout + ended.stderr
    assert "WANDB_API_KEY is not passed" in ended.stderr


SLEEPER = """
import os, signal, sys, time
def leave(number, frame):
    open(f"got-{os.environ['RANK']}-{signal.Signals(number).name}", "w").close()
    time.sleep(0.5)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, leave)
open(f"up-{os.environ['RANK']}", "w").close()
time.sleep(60)
sys.exit(9)
"""


def stop_when_up(place, command, number, more):
    """Start, send a signal to this process alone when both ranks are there, and give back the exit code."""
    with (place / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=place, env=environment(place, **more), stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 90
            while not ((place / "up-0").exists() and (place / "up-1").exists()):
                assert process.poll() is None and time.monotonic() < deadline, (place / "log").read_text()
                time.sleep(0.1)
            process.send_signal(number)
            return process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_under_deepspeed_a_signal_reaches_every_rank_once_and_their_exit_code_comes_back(place, number):
    (place / "vlm_dist_sleeper.py").write_text(SLEEPER)
    code = (
        "import sys, os\nfrom launcher.foreground import run_in_foreground\n"
        "command = [sys.executable, '-m', 'launcher.deepspeed_cli', '--num_gpus', '2', '-m', 'vlm_dist_sleeper']\n"
        "sys.exit(run_in_foreground(command, os.environ))"
    )
    more = {"PYTHONPATH": f"{PROJECT}:{place}", "DS_ACCELERATOR": "cpu"}
    assert stop_when_up(place, [sys.executable, "-c", code], number, more) == 75
    for rank in (0, 1):
        assert (place / f"got-{rank}-{number.name}").exists()


# pdsh for hosts that are all this machine: the line on each, %n by its number, and the largest exit code (-S).
LOCAL_PDSH = """#!/bin/bash
count=$(tr -cd , <<<"$5" | wc -c)
shift 5
line="$*"
pids=()
for node in $(seq 0 "$count"); do
    bash -c "${line//%n/$node}" & pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid"; one=$?; ((one > code)) && code=$one; done
exit "$code"
"""


def test_every_host_that_does_not_answer_is_named_before_anything_starts(place):
    (place / "bin" / "ssh").write_text(
        '#!/bin/bash\n[[ " $* " == *" gpu1 "* ]] && exit 0\necho "ssh: connect to host: timed out" >&2\nexit 255\n'
    )
    (place / "bin" / "ssh").chmod(0o755)
    fake(place, "pdsh")
    (place / "hosts").write_text("gpu1 slots=1\ngpu2 slots=1\ngpu3 slots=1\n")
    ended = launch(place, "--hostfile", "hosts")
    assert ended.returncode == 2
    assert "gpu2: ssh: connect to host: timed out\n  gpu3: ssh" in ended.stderr and "gpu1:" not in ended.stderr
    assert not (place / "record").exists()


@pytest.mark.e2e
def test_a_signal_reaches_the_ranks_of_all_hosts_and_their_exit_code_comes_back(place):
    (place / "vlm_dist_sleeper.py").write_text(SLEEPER)
    fake(place, "ssh")
    (place / "bin" / "pdsh").write_text(LOCAL_PDSH)
    (place / "bin" / "pdsh").chmod(0o755)
    (place / "hosts").write_text("host1 slots=1\nhost2 slots=1\n")
    port = free_port_here()
    command = [sys.executable, "-m", "launcher.deepspeed_cli", "--hostfile", "hosts", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(port), "-m", "vlm_dist_sleeper"]
    code = f"import sys, os\nfrom launcher.foreground import *\nsys.exit(run_in_foreground({command!r}, os.environ))"
    more = {"PYTHONPATH": f"{PROJECT}:{place}", "DS_ACCELERATOR": "cpu"}
    assert stop_when_up(place, [sys.executable, "-c", code], signal.SIGTERM, more) == 75
    assert (place / "got-0-SIGTERM").exists()
    assert (place / "got-1-SIGTERM").exists()


def test_the_request_on_the_hosts_is_for_this_run_alone():
    words = ["pdsh", "-S", "-f", "1024", "-w", "a,b", "export A=b; ", "cd /x;", "python", "--master_port=15001"]
    command = hosts_command(words, signal.SIGUSR1)
    assert command[:6] == words[:6]
    assert command[6].endswith("| xargs -r -n1 pkill -USR1 -P")
    pattern = command[6].split("'")[1]
    line = "/x/python -u -m deepspeed.launcher.launch --node_rank=0 --master_port=15001"
    assert re.search(pattern, f"{line} -m vlm_dist.train")
    assert not re.search(pattern, f"{line}9 -m vlm_dist.train")
    assert not re.search(pattern, f"bash -c export A=b; {line} -m vlm_dist.train")
    assert hosts_command([sys.executable, "--master_port=15001"], signal.SIGUSR1) is None
