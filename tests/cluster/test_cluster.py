"""The tests' cluster itself: nodes that see each other, and nothing that is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.cluster import SCRIPT, Cluster, running_cluster
from tests.cluster.conftest import REQUIRED, give_up_if
from tests.tiny_run import ROOT

pytestmark = pytest.mark.cluster


def test_two_clusters_side_by_side(cluster: Cluster) -> None:
    with running_cluster(4) as other:
        for each in (cluster, other):
            hosts = each.login("srun", f"--nodes={len(each.nodes)}", "--gpus-per-node=8", "hostname")
            assert sorted(hosts.stdout.split()) == each.nodes, hosts.output
            assert each.on(each.nodes[0], "ssh", each.nodes[1], "hostname").stdout.split() == [each.nodes[1]]
        assert other.login("ping", "-c1", cluster.nodes[0]).exit_code != 0
        assert not other.hostfile.read_text().count(cluster.nodes[0])
    assert not other.directory.exists()
    assert not any(name in namespaces() for name in other.nodes)
    assert all(name in namespaces() for name in cluster.nodes)


def test_a_cluster_ends_with_its_owner(tmp_path: Path, cluster: Cluster) -> None:
    """A test run that is killed leaves nothing."""
    settings = {"CLUSTER_ROOT": str(tmp_path), "CLUSTER_PREFIX": f"v{os.getpid()}o"}
    start = (
        "import os, subprocess, sys; "
        "subprocess.run([sys.argv[1], 'start', '2'], check=True, env={**os.environ, 'CLUSTER_OWNER': str(os.getpid())})"
    )
    subprocess.run([sys.executable, "-c", start, str(SCRIPT)], env={**os.environ, **settings}, check=True, cwd=ROOT)
    deadline = time.monotonic() + 20
    while any(name.startswith(settings["CLUSTER_PREFIX"]) for name in namespaces()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not (tmp_path / "run").exists()


def test_links_have_the_rate_that_they_are_shaped_to(cluster: Cluster) -> None:
    """Two megabytes at 8 Mbit/s take two seconds, less half a megabyte that is sent at once."""
    sender, receiver = cluster.nodes
    assert cluster.manage("shape", "8mbit").exit_code == 0
    began = time.monotonic()
    sent = cluster.on(sender, "bash", "-c", f"head -c 2000000 /dev/zero | ssh {receiver} 'cat >/dev/null'")
    assert sent.exit_code == 0, sent.output
    assert time.monotonic() - began > 1.3
    assert "tbf" in cluster.on(sender, "tc", "qdisc", "show", "dev", "eth0").stdout
    assert cluster.manage("shape", "none").exit_code == 0
    assert "tbf" not in cluster.on(sender, "tc", "qdisc", "show", "dev", "eth0").stdout


def test_without_a_cluster_tests_are_skipped_but_never_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="NOTHING ABOUT CLUSTERS IS TESTED: no root"):
        give_up_if("no root")
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="there can be no cluster: no root"):
        give_up_if("no root")


def namespaces() -> list[str]:
    """Names of the machine's network namespaces."""
    return [path.name for path in Path("/run/netns").glob("*")]
