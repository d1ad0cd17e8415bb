"""Small pictures of held-out samples, for whoever shows their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_dist.config import RunConfig
from vlm_dist.data.encoding.preconditions import choose_kinds
from vlm_dist.data.encoding.template import MessageBuilder
from vlm_dist.data.media.images import decode_image
from vlm_dist.data.types import Source
from vlm_dist.errors import DataError, SkipSample
from vlm_dist.evaluate import distinct_names
from vlm_dist.families import Family
from vlm_dist.observability.log import MAX_PREDICTIONS

#: Longest side, in pixels.
SIZE = 160
#: Rows of a source that are looked through for a sample: answers that are shown are those of its first rows.
_NUM_ROWS = 8 * MAX_PREDICTIONS


class Thumbnails:
    """The first picture of a sample, by the names that its answer has. Clips have none: decoding them takes long.

    Args:
        config: of the run.
        sources: held-out.
        family: of the model.
    """

    def __init__(self, config: RunConfig, sources: Sequence[Source], family: Family) -> None:
        collator = config.collator
        kinds = choose_kinds(collator, family) & {"image"}
        self._builder = MessageBuilder(collator.dataset_columns.mapping, collator.message_format, kinds)
        self._sources = dict(zip(distinct_names(sources), sources, strict=True))
        self._rows: dict[str, dict[tuple[str, str], int]] = {}

    def __call__(self, answer: Mapping[str, Any]) -> Any | None:
        """A Pillow picture; None where there is none, or where it cannot be read now.

        Args:
            answer: a line of a file of predictions.
        """
        try:
            source = self._sources[answer["source"]]
            row = self._find(answer["source"], source)[answer["shard"], answer["key"]]
            images = self._builder.build(source.read(row).fields).images
            if not images:
                return None
            picture = decode_image(images[0], max_size=SIZE)
        except (KeyError, SkipSample, DataError, OSError):
            return None  # the answer is shown without it
        return _as_pillow(picture)

    def _find(self, name: str, source: Source) -> dict[tuple[str, str], int]:
        if name not in self._rows:
            origins = [source.origin(row) for row in range(min(len(source), _NUM_ROWS))]
            self._rows[name] = {(origin.shard, origin.key): row for row, origin in enumerate(origins)}
        return self._rows[name]


def _as_pillow(picture: Any) -> Any:
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture
    return Image.fromarray(picture.permute(1, 2, 0).numpy())
