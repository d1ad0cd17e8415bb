"""`vlm-dist doctor`: what it says about nodes that are not as they should be, and about this machine."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlm_dist.cli.doctor_checks import Examined, check_all
from vlm_dist.cli.doctor_facts import NodeFacts, SourceFacts, read_rate
from vlm_dist.cli.doctor_links import Links
from vlm_dist.cli.doctor_zero import ModelSize, advise, model_size, zero_cost
from vlm_dist.config import RunConfig
from vlm_dist.observability.findings import Level, format_table

PROJECT = Path(__file__).resolve().parents[3]
GB = 10**9

GOOD = NodeFacts(
    host="a",
    versions={"python": "3.11.7", "torch": "2.15.0"},
    cuda="13.0",
    nccl="2.28.3",
    driver="580.95",
    gpus=(("H100", 80 * 2**30),) * 8,
    cores=64,
    memory_bytes=500 * GB,
    shm_bytes=64 * GB,
    open_files=65536,
    free_bytes={"output_dir": 900 * GB},
    sources=(SourceFacts("data/train", 64, 60 * GB),),
    read_rate=1.5 * GB,
)
FINE_LINKS = Links(
    backend="nccl",
    inside={"a": 300 * GB, "b": 290 * GB},
    pairs={"b": 40 * GB, "c": 41 * GB},
    across=40 * GB,
    clock_seconds={"a": 0.0, "b": 0.02},
    unseen=(),
)


def config(**train):
    data = {"train": [{"type": "tar", "path": "data/train"}]}
    return RunConfig(model_id="m/m", deepspeed=Path("zero2.json"), train=train, data=data)


def examined(second=GOOD, links=FINE_LINKS, **train):
    nodes = [GOOD, replace(second, host="b")]
    return Examined(nodes, 16, links, config(**train), ModelSize(7_600_000_000, 40_000_000), {"a": 8, "b": 8})


def wrong(found):
    return [finding for finding in check_all(found) if finding.level is not Level.OK]


def test_equal_and_healthy_nodes_have_nothing_wrong():
    assert wrong(examined()) == []


@pytest.mark.parametrize(
    ("second", "what", "level", "named", "fix"),
    [
        (
            replace(GOOD, versions={"python": "3.11.7", "torch": "2.14.0"}),
            "torch",
            Level.PROBLEM,
            "2.14.0 on b",
            "same",
        ),
        (
            replace(GOOD, versions={"python": "3.11.7", "torch": ""}),
            "torch",
            Level.PROBLEM,
            "not installed on b",
            "same",
        ),
        (replace(GOOD, gpus=GOOD.gpus[:7]), "GPUs", Level.PROBLEM, "7 x H100, 80 GiB on b", "one kind"),
        (replace(GOOD, driver="570.1"), "GPU driver", Level.WARNING, "570.1 on b", "same driver"),
        (replace(GOOD, shm_bytes=64_000_000), "/dev/shm", Level.WARNING, "64 MB", "--shm-size"),
        (replace(GOOD, open_files=1024), "open files", Level.WARNING, "1024", "ulimit -n"),
        (replace(GOOD, has_infiniband=True, locked_bytes=65536), "locked memory", Level.PROBLEM, "on b", "ulimit -l"),
        (replace(GOOD, free_bytes={"output_dir": 10**8}), "output_dir", Level.PROBLEM, "0.1 GB free on b", "make room"),
        (replace(GOOD, free_bytes={"output_dir": 2 * GB}), "output_dir", Level.WARNING, "2.0 GB", "make room"),
        (
            replace(GOOD, sources=(SourceFacts("data/train", 0, 0),)),
            "data: data/train",
            Level.PROBLEM,
            "b",
            "all nodes",
        ),
        (replace(GOOD, sources=(SourceFacts("data/train", 63, GB),)), "data: data/train", Level.PROBLEM, "63", "node"),
        (replace(GOOD, read_rate=20e6), "reading shards", Level.WARNING, "20 MB/s on b", "node-local"),
    ],
)
def test_each_difference_and_lack_is_one_row_with_its_fix(second, what, level, named, fix):
    findings = [finding for finding in wrong(examined(second)) if finding.what == what]
    assert [finding.level for finding in findings] == [level]
    assert named in findings[0].found
    assert fix in findings[0].fix


@pytest.mark.parametrize(
    ("links", "what", "level", "named"),
    [
        (replace(FINE_LINKS, clock_seconds={"a": 0, "b": -3.2}), "clocks", Level.WARNING, "b is 3.2 s behind"),
        (replace(FINE_LINKS, unseen=("b",)), "shared file system", Level.PROBLEM, "not there on b"),
        (replace(FINE_LINKS, pairs={"b": 40 * GB, "c": 10 * GB}), "link to c", Level.WARNING, "10.00 GB/s"),
    ],
)
def test_what_lies_between_nodes_is_told_with_the_node(links, what, level, named):
    (finding,) = wrong(examined(links=links))
    assert (finding.what, finding.level) == (what, level)
    assert named in finding.found


def test_shards_that_are_staged_per_node_may_differ_but_have_to_be_enough():
    fewer = (SourceFacts("data/train", 63, GB),)
    assert wrong(examined(replace(GOOD, sources=fewer), balance_scope="node")) == []
    one = replace(GOOD, sources=(SourceFacts("data/train", 1, GB),))
    found = Examined([one, replace(one, host="b")], 2, None, config(balance_scope="node"))
    assert "1 for 2 nodes" in [finding.found for finding in wrong(found)]


def test_a_driver_without_usable_gpus_is_a_problem_and_a_machine_without_is_none():
    lost = replace(GOOD, gpus=(), cuda="")
    assert "built without CUDA" in wrong(Examined([lost]))[0].found
    assert wrong(Examined([replace(lost, driver="")])) == []


def test_problems_come_first_and_every_fix_is_below_its_row():
    bad = replace(GOOD, open_files=10, gpus=GOOD.gpus[:1])
    lines = format_table(check_all(examined(bad)), "vlm-dist doctor: 2 nodes, 16 processes").splitlines()
    assert lines[0] == "vlm-dist doctor: 2 nodes, 16 processes: 2 problems, 1 warning"
    assert [line.split()[0] for line in lines[1:6]] == ["PROBLEM", "->", "PROBLEM", "->", "WARNING"]
    assert all(line.startswith(("ok ", " ")) for line in lines[7:])


def test_the_size_of_a_model_is_read_from_headers(tmp_path):
    weights = {
        "model.embed_tokens.weight": torch.zeros(100, 8),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 8),
        "model.layers.0.norm.weight": torch.zeros(8),
    }
    save_file(weights, tmp_path / "model.safetensors")
    assert model_size(tmp_path, r=4) == ModelSize(800 + 128 + 8, 4 * 24)
    assert model_size(tmp_path / "gone", r=4) is None


def test_zero_follows_from_the_formula_and_the_measured_link():
    size = ModelSize(7_600_000_000, 40_000_000)
    slow = zero_cost(size, accumulation=2, num_ranks=16, bytes_per_second=1.25 * GB)
    assert slow.zero2_bytes == pytest.approx(15 / 16 * (2 * 8 + 2) * 40e6)
    assert slow.zero3_seconds == pytest.approx(15 / 16 * (2 * 4 * 7.64e9 + 2 * 40e6) / 1.25e9)
    big, small = 80 * 2**30, 16 * 2**30
    assert "ZeRO-2: ZeRO-3 would gather" in advise(size, slow, 2, big, several_nodes=True)
    assert "zero3_hpz" in advise(size, slow, 2, small, several_nodes=True)
    fast = zero_cost(size, accumulation=2, num_ranks=8, bytes_per_second=400 * GB)
    assert advise(size, fast, 2, small, several_nodes=False).startswith("ZeRO-3")


def test_reading_is_measured_on_what_can_be_read(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(1 << 20))
    assert read_rate([tmp_path / "gone.tar", tmp_path / "a.tar"]) > 0
    assert read_rate([]) is None


def doctor(*arguments, code=None, **more):
    environment = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = (
        [sys.executable, "-m", "vlm_dist.cli", "doctor", *arguments] if code is None else [sys.executable, "-c", code]
    )
    environment |= {"PYTHONPATH": str(PROJECT), "DS_ACCELERATOR": "cpu", **more}
    return subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=120)


def test_a_wrong_run_file_is_a_row_beside_all_else():
    ended = doctor("--run", "configs/run.yaml", "--set", "train.learning_rte=1")
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout.splitlines()[1].startswith("PROBLEM  run file")
    assert "learning_rate" in ended.stdout
    assert "\nok       torch" in ended.stdout


def test_a_node_that_does_not_come_is_told_in_bounded_time():
    code = "import sys\nfrom vlm_dist.cli import doctor, main\ndoctor.MEETING_SECONDS = 2\nsys.exit(main(['doctor']))"
    one = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    ended = doctor(code=code, MASTER_ADDR="127.0.0.1", MASTER_PORT="15999", **one)
    assert ended.returncode == 1, ended.stderr
    assert "PROBLEM  meeting" in ended.stdout
    assert "\nok       torch" in ended.stdout  # what this node is like is told all the same


@pytest.mark.e2e
def test_two_processes_measure_the_link_between_them(tmp_path):
    from launcher.plan import free_port_here

    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port_here()), "PYTHONPATH": str(PROJECT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "vlm_dist.cli", "doctor"]
    ranks = [
        subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE
        )
        for rank in "01"
    ]
    shown = [rank.communicate(timeout=120)[0].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "1 node, 2 processes: 0 problems" in shown[0]
    assert "B/s (" in next(line for line in shown[0].splitlines() if "all-reduce in" in line)
    assert shown[1] == ""
    assert list(tmp_path.iterdir()) == []
