import subprocess
import sys

import pytest

from vlm_dist.distributed.environment import Topology, resolve_topology
from vlm_dist.distributed.rendezvous import expand_hostlist
from vlm_dist.errors import DistributedError

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "15001"}
DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    **MASTER,
}  # fmt: skip
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", **MASTER,
}  # fmt: skip
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "7",
}
SRUN = BATCH_SCRIPT | {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3", **MASTER,
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Topology(0, 1, 0, 1, "python")),
        ({"HOME": "/root", "RANK": ""}, Topology(0, 1, 0, 1, "python")),
        (DEEPSPEED, Topology(3, 4, 1, 2, "deepspeed")),
        (TORCHRUN, Topology(3, 4, 1, 2, "torchrun")),
        (SRUN, Topology(5, 7, 1, 3, "slurm")),
        (SRUN | {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1"}, Topology(5, 7, 1, 3, "slurm")),
    ],
    ids=["nothing set", "empty is not set", "deepspeed", "torchrun", "srun", "srun with RANK exported per task"],
)
def test_every_launcher_is_understood(environ, expected):
    assert resolve_topology(environ) == expected


def test_torchrun_started_by_srun_has_the_ranks_of_torchrun():
    one_agent_per_node = SRUN | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert resolve_topology(one_agent_per_node | TORCHRUN) == Topology(3, 4, 1, 2, "torchrun")


INTERACTIVE_STEP = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "7", "SLURM_JOB_NUM_NODES": "2"},
        BATCH_SCRIPT | INTERACTIVE_STEP,
        BATCH_SCRIPT | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"},
    ],
    ids=["salloc's shell on the login node", "salloc's shell on a node", "a batch script of one task"],
)
def test_a_plain_python_in_an_allocation_is_one_process(environ):
    assert resolve_topology(environ) == Topology(0, 1, 0, 1, "python")


def test_srun_alone_is_enough_the_ranks_meet_at_the_first_node_of_the_step():
    environ = {name: value for name, value in SRUN.items() if name not in MASTER}
    lists = {"SLURM_JOB_NODELIST": "gpu[07-10]", "SLURM_STEP_NODELIST": "gpu[09-10]"}
    assert resolve_topology(environ | lists).rendezvous == ("gpu09", 15007)
    other_step = resolve_topology(environ | lists | {"SLURM_STEP_ID": "1"}).rendezvous
    assert other_step == ("gpu09", 15000 + 7 + 7919)
    assert resolve_topology(SRUN | lists).rendezvous == ("node1", 15001)  # said is said


@pytest.mark.parametrize(
    ("short", "hosts"),
    [
        ("a", ["a"]),
        ("gpu[07-09,11],login", ["gpu07", "gpu08", "gpu09", "gpu11", "login"]),
        ("r[1-2]n[09-10]-ib", ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]),
    ],
)
def test_slurm_writes_names_of_nodes_in_short(short, hosts):
    assert expand_hostlist(short) == hosts


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "expected"), [("8(x4)", "3", 8), ("4(x2),3", "2", 3), ("1,2(x2)", "0", 1)]
)
def test_slurm_writes_equal_nodes_in_short(tasks_per_node, node, expected):
    environ = SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_NODEID": node, "SLURM_NTASKS": "32"}
    environ["SLURM_LOCALID"] = "0"
    assert resolve_topology(environ).local_world_size == expected


def test_one_node_by_hand_needs_no_local_world_size():
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert resolve_topology(by_hand) == Topology(1, 2, 1, 2, "environment")


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE", "LOCAL_RANK", "RANK=0"]),
        ({"WORLD_SIZE": "2", "RANK": "1", **MASTER}, ["LOCAL_RANK"]),
        ({"LOCAL_RANK": "1"}, ["RANK", "WORLD_SIZE"]),
        ({k: v for k, v in DEEPSPEED.items() if k != "MASTER_PORT"}, ["MASTER_PORT"]),
        ({k: v for k, v in SRUN.items() if k != "MASTER_ADDR"}, ["MASTER_ADDR"]),
        ({k: v for k, v in SRUN.items() if k not in MASTER}, ["MASTER_ADDR", "SLURM_STEP_NODELIST"]),
        (SRUN | {"MASTER_PORT": "http"}, ["MASTER_PORT", "'http'"]),
        (SRUN | {"MASTER_PORT": "70000"}, ["MASTER_PORT is 70000"]),
        (SRUN | {"SLURM_HET_SIZE": "2"}, ["SLURM_HET_SIZE=2"]),
        (BATCH_SCRIPT, ["SLURM_NTASKS=7", "srun python -m vlm_dist.train"]),
        (BATCH_SCRIPT | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "2"}, ["SLURM_JOB_NUM_NODES=2", "srun"]),
        (SRUN | DEEPSPEED | {"LOCAL_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, ["SLURM_STEP_NUM_TASKS=2", "alone"]),
        (SRUN | TORCHRUN | {"LOCAL_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, ["torchrun 2 times"]),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "1", **MASTER},
            ["LOCAL_SIZE=2", "LOCAL_WORLD_SIZE=1"],
        ),
        ({"PMI_SIZE": "2"}, ["PMI_SIZE=2"]),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, ["SLURM_LOCALID"]),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_TASKS_PER_NODE"}, ["SLURM_STEP_TASKS_PER_NODE"]),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "four"}, ["SLURM_STEP_TASKS_PER_NODE", "'four'"]),
        (SRUN | {"SLURM_NODEID": "2"}, ["SLURM_NODEID=2"]),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "7", "LOCAL_RANK": "0"}, ["RANK=0", "SLURM_PROCID=5"]),
        (TORCHRUN | {"RANK": "4"}, ["RANK is 4", "WORLD_SIZE is 4"]),
        (TORCHRUN | {"LOCAL_RANK": "2"}, ["LOCAL_RANK is 2", "LOCAL_WORLD_SIZE is 2"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, ["LOCAL_WORLD_SIZE 8", "WORLD_SIZE 4"]),
        (TORCHRUN | {"RANK": "first"}, ["RANK", "'first'"]),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MASTER}, ["LOCAL_WORLD_SIZE", "MASTER_ADDR=node1"]),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ["OMPI_COMM_WORLD_SIZE=4", "RANK"]),
    ],
)
def test_an_uncertain_environment_is_refused_and_the_variables_are_named(environ, named):
    with pytest.raises(DistributedError) as error:
        resolve_topology(environ)
    for name in named:
        assert name in str(error.value)


def test_the_resolver_runs_on_a_login_node_without_torch():
    modules = "vlm_dist.distributed.environment, vlm_dist.distributed.process_settings"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'psutil'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
