import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_dist.distributed import process_settings
from vlm_dist.distributed.environment import Topology
from vlm_dist.distributed.interfaces import Choice, Interface, address_towards, choose_interface, find_interfaces
from vlm_dist.distributed.process_settings import SETTINGS, settle

PROJECT = Path(__file__).resolve().parents[3]
LOOPBACK, DOCKER = Interface("lo", ("127.0.0.1",)), Interface("docker0", ("172.17.0.1",))
SLOW, FAST = Interface("eno1", ("10.0.0.5",), 1000), Interface("ens7", ("10.1.0.5", "fd00::5"), 100_000)
TWO_NODES = Topology(3, 4, 1, 2, "torchrun", ("node1", 15001))
ONE_NODE = Topology(1, 2, 1, 2, "deepspeed", ("127.0.0.1", 29500))


def choose(*interfaces, towards=None, loopback_name=False):
    return choose_interface(list(interfaces), towards, loopback_name=loopback_name, master="node1")


def test_with_one_interface_nothing_is_chosen_and_nothing_said():
    assert choose(LOOPBACK, DOCKER, SLOW, towards="10.0.0.5") == Choice(None)


def test_a_node_whose_own_name_is_loopback_uses_its_only_interface():
    chosen = choose(LOOPBACK, SLOW, loopback_name=True)
    assert chosen.interface == "eno1"
    assert "loopback" in chosen.told


def test_of_several_the_one_on_the_way_to_the_master_and_a_faster_one_is_named():
    chosen = choose(LOOPBACK, SLOW, FAST, DOCKER, towards="10.0.0.5")
    assert chosen.interface == "eno1"
    assert "NCCL_SOCKET_IFNAME=ens7" in chosen.told
    assert "docker" not in chosen.told
    other = choose(LOOPBACK, SLOW, FAST, towards="fd00::5")
    assert other.interface == "ens7"
    assert "faster" not in other.told


@pytest.mark.parametrize("towards", ["127.0.1.1", None], ids=["the master calls itself loopback", "no such host"])
def test_where_the_probe_does_not_tell_nothing_is_guessed(towards):
    chosen = choose(LOOPBACK, SLOW, FAST, towards=towards)
    assert chosen.interface is None
    assert "export NCCL_SOCKET_IFNAME" in chosen.told


def test_the_probe_of_this_machine_finds_its_own_interface():
    assert any("127.0.0.1" in interface.addresses for interface in find_interfaces())
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("no-such-host.invalid") is None


@pytest.fixture
def two_interfaces(monkeypatch, tmp_path):
    monkeypatch.setattr(process_settings, "find_interfaces", lambda: [LOOPBACK, SLOW, FAST])
    monkeypatch.setattr(process_settings, "address_towards", lambda host: "10.0.0.5")
    monkeypatch.setattr(process_settings.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(process_settings.os, "sched_getaffinity", lambda pid: set(range(32)))
    return tmp_path / f"vlm-dist-{os.getuid()}"


def test_on_several_nodes_everything_is_set_and_the_choice_is_told(two_interfaces):
    environ = {}
    (told,) = settle(environ, TWO_NODES)
    assert told.startswith(f"{socket.gethostname()}: eno1")
    assert environ == {
        "OMP_NUM_THREADS": "8",  # half of 32 cores over 2 ranks
        "NCCL_SOCKET_IFNAME": "eno1",
        "GLOO_SOCKET_IFNAME": "eno1",
        "TORCH_EXTENSIONS_DIR": str(two_interfaces / "torch_extensions"),
        "TRITON_CACHE_DIR": str(two_interfaces / "triton"),
        "HF_MODULES_CACHE": str(two_interfaces / "hf_modules"),
    }
    assert two_interfaces.stat().st_mode & 0o077 == 0


def test_what_somebody_has_set_stays_and_nothing_is_told(two_interfaces):
    given = {setting.name: "mine" for setting in SETTINGS}
    environ = dict(given)
    assert settle(environ, TWO_NODES) == []
    assert environ == given


@pytest.mark.parametrize(("given", "gloo"), [("ens7", "ens7"), ("^docker", None), ("=ens7", None), ("en", None)])
def test_an_interface_that_was_given_to_nccl_is_gloos_too_where_it_is_a_name(two_interfaces, given, gloo):
    environ = {"NCCL_SOCKET_IFNAME": given}
    settle(environ, TWO_NODES)
    assert environ.get("GLOO_SOCKET_IFNAME") == gloo


def test_on_one_node_only_threads_are_shared_out(two_interfaces):
    environ = {}
    assert settle(environ, ONE_NODE) == []
    assert environ == {"OMP_NUM_THREADS": "8"}
    alone = {}
    settle(alone, Topology(0, 1, 0, 1, "python"))
    assert alone == {}


def test_under_srun_a_tasks_cores_are_its_own(two_interfaces):
    environ = {"SLURM_CPUS_PER_TASK": "32"}
    settle(environ, Topology(3, 4, 1, 2, "slurm", ("node1", 15001)))
    assert environ["OMP_NUM_THREADS"] == "16"


def test_code_is_not_loaded_from_a_directory_that_others_can_write_to(two_interfaces):
    two_interfaces.mkdir()
    two_interfaces.chmod(0o777)
    environ = {}
    settle(environ, TWO_NODES)
    assert "TORCH_EXTENSIONS_DIR" not in environ


def test_every_variable_is_in_the_manual_with_its_reason():
    page = (PROJECT / "docs" / "launching.md").read_text()
    for setting in SETTINGS:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{setting.name}` |"))
        assert setting.why in row


def test_a_taken_port_is_one_clear_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = (
            "from vlm_dist.distributed.environment import Topology\n"
            "from vlm_dist.distributed.group import init_process_groups\n"
            f"init_process_groups(Topology(0, 2, 0, 2, 'environment', ('127.0.0.1', {port})))\n"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    last = ended.stderr.strip().splitlines()[-1]
    assert f"127.0.0.1:{port} is taken by another program" in last
    assert "--master_port" in last


def test_one_process_of_torchrun_finds_the_store_of_its_agent(tmp_path):
    """Its port is no matter of ours: torch waited for a store at another one until the time-out."""
    script = tmp_path / "alone.py"
    script.write_text(
        "import os\n"
        "from datetime import timedelta\n"
        "from vlm_dist.distributed.environment import resolve_topology\n"
        "from vlm_dist.distributed.group import init_process_groups, shut_down\n"
        "ranks = init_process_groups(resolve_topology(os.environ), timedelta(seconds=20))\n"
        "print('met', ranks.world_size)\n"
        "shut_down()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "met 1" in ended.stdout
