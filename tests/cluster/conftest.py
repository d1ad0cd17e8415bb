"""The cluster of a test file: two nodes, or as many as its NUM_NODES says."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, running_cluster, why_not

#: Set by .ci/run: there, a cluster that cannot be started is a failure.
REQUIRED = "VLM_DIST_REQUIRE_CLUSTER"


def give_up_if(reason: str | None) -> None:
    """Skip the test, loudly; where a cluster is required, fail it."""
    if reason is None:
        return
    if os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, and there can be no cluster: {reason}")
    pytest.skip(f"NOTHING ABOUT CLUSTERS IS TESTED: {reason}")


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    give_up_if(why_not())
    with running_cluster(getattr(request.module, "NUM_NODES", 2)) as started:
        yield started
