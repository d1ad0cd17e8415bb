import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from launcher.deepspeed_cli import OPTIONS_WITH_VALUE, rewrite_module_option

PROJECT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--num_gpus 2 -m vlm_dist.train --config x", "--num_gpus 2 --module vlm_dist.train --config x"),
        ("-m vlm_dist.train", "--module vlm_dist.train"),
        ("-mvlm_dist.train -m x", "--module vlm_dist.train -m x"),
        ("--module vlm_dist.train -m x", "--module vlm_dist.train -m x"),
        ("-m vlm_dist.train -m x", "--module vlm_dist.train -m x"),
        ("train.py -m x", "train.py -m x"),
        ("--num_gpus=2 -q train.py -m x", "--num_gpus=2 -q train.py -m x"),
        ("-H hosts -i a:0 --no_ssh -m t", "-H hosts -i a:0 --no_ssh --module t"),
        ("--num_gpu 2 -m t", "--num_gpu 2 --module t"),
        ("--launcher_args -m train.py", "--launcher_args -m train.py"),
        ("--help", "--help"),
        ("", ""),
    ],
)
def test_m_means_module_before_the_script_and_nothing_after_it(given, expected):
    assert rewrite_module_option(given.split()) == expected.split()


def test_the_options_with_a_value_are_those_of_the_installed_runner():
    runner = _deepspeed_directory() / "launcher" / "runner.py"
    found = set()
    for call in ast.walk(ast.parse(runner.read_text())):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            names = {argument.value for argument in call.args if isinstance(argument, ast.Constant)}
            if not any(keyword.arg == "action" for keyword in call.keywords):
                found |= {name for name in names if name.startswith("-")}
    assert found == OPTIONS_WITH_VALUE


def test_the_launcher_is_light():
    code = (
        "import sys, launcher.deepspeed_cli, launcher.entry_point_check\n"
        "sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)


@pytest.mark.e2e
@pytest.mark.parametrize(("ending", "expected"), [("pass", 0), ("sys.exit(6)", 6), ("os.kill(os.getpid(), 9)", 247)])
def test_two_ranks_of_a_module_start_and_their_failure_comes_out(tmp_path, ending, expected):
    (tmp_path / "probe_module.py").write_text(
        textwrap.dedent(f"""
            import os, sys
            from vlm_dist.distributed.environment import resolve_topology
            topology = resolve_topology(os.environ)
            with open(f"rank{{topology.rank}}", "w") as found:
                print(topology.world_size, topology.local_rank, topology.launcher, *sys.argv[1:], file=found)
            if topology.rank == 1:
                {ending}
        """)
    )
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-m", "launcher.deepspeed_cli", "--num_gpus", "2", "-m", "probe_module", "-m", "kept"],
        cwd=tmp_path,
        env=environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    if expected == 0:
        for rank in range(2):
            found = (tmp_path / f"rank{rank}").read_text()
            assert found == f"2 {rank} deepspeed --local_rank={rank} -m kept\n"


@pytest.mark.e2e
def test_a_killed_launcher_is_no_success(tmp_path):
    (tmp_path / "probe_module.py").write_text("import os\nif os.environ['RANK'] == '0': os.kill(os.getppid(), 9)\n")
    command = [sys.executable, "-m", "launcher.deepspeed_cli", "--num_gpus", "2", "-m", "probe_module"]
    environ = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, timeout=120)
    assert done.returncode == 128 + 9


def _deepspeed_directory() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("deepspeed")
    assert spec and spec.origin
    return Path(spec.origin).parent
