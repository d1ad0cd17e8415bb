import shlex
from pathlib import Path

import yaml

from launcher.elastic import split_arguments
from launcher.elastic_rank import FINAL
from vlm_dist.errors import ExitCode
from vlm_dist.train import parse_arguments

MANIFEST = Path(__file__).resolve().parents[3] / "slurm" / "kubernetes.yaml"


def test_the_example_fits_our_commands_and_exit_codes():
    service, job = yaml.safe_load_all(MANIFEST.read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    fail, ignore = (rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][:2])
    assert ignore == [ExitCode.PREEMPTED]
    assert set(fail) == FINAL - {ExitCode.DONE, ExitCode.PREEMPTED, 130}
    words = shlex.split(container["args"][0])
    assert words[:2] == ["exec", "vlm-dist-elastic"]
    options, command = split_arguments(words[2:])
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert int(given["--nnodes"]) == spec["completions"] == spec["parallelism"]
    assert int(given["--nproc_per_node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert given["--master_addr"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert command[:2] == ["-m", "vlm_dist.train"]
    assert parse_arguments(command[2:]).overrides == ["train.resume=auto"]
