"""Builds tar shards from Hugging Face datasets, JSON records and other tars.

records (read by number, or one after the other) -> order -> sample maker (in threads: check, read media, encode) ->
`ShardWriter`, in order. The same input and settings give the same bytes, also when a build was stopped and resumed.
"""

from vlm_dist.data.shards.build.run import build_shards
from vlm_dist.data.shards.build.settings import BuildSettings, BuildSummary, Progress

__all__ = ["BuildSettings", "BuildSummary", "Progress", "build_shards"]
