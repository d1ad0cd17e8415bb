"""The cluster of a test file: two nodes, or as many as its NUM_NODES says."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, running_cluster, why_not

#: Set by .ci/run: there, a cluster that cannot be started is a failure.
REQUIRED = "VLM_DIST_REQUIRE_CLUSTER"


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set, and there can be no cluster: {reason}")
        pytest.skip(f"NOTHING ABOUT CLUSTERS IS TESTED: {reason}")
    with running_cluster(getattr(request.module, "NUM_NODES", 2)) as started:
        yield started
