"""The trainer, `python -m tests.e2e.faulty_decoder --config …`, with a decoder that crashes and hangs on some pictures.

A picture is marked by what stands behind its last byte, so that it is sound for every other reader. FAULTY_LEDGER names
a file that gets the key of every sample that was trained on; FAULTY_NULL a file with keys of samples that are left out.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.types import Condemned, MicroBatch, MicroBatchJob

CRASHES, HANGS = b"crashes", b"hangs"


class FaultyMaterialiser(Materialiser):
    """As the true one, but for marked pictures and for keys that are left out by hand."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        path = os.environ.get("FAULTY_NULL")
        self.left_out = frozenset(json.loads(Path(path).read_text())) if path else frozenset()

    def __call__(self, job: MicroBatchJob) -> MicroBatch:
        by_hand = tuple(
            Condemned(slot, "decode", "left out by hand")
            for slot, ref in enumerate(job.refs)
            if ref is not None and self._sources[ref.source].origin(ref.index).key in self.left_out
        )
        return super().__call__(replace(job, condemned=job.condemned + by_hand))

    def _decode_image(self, media: Any) -> Any:
        if bytes(media).endswith(CRASHES):
            ctypes.string_at(0)
        while bytes(media).endswith(HANGS):
            time.sleep(1)
        return super()._decode_image(media)


def main() -> int:
    """Patch, and train."""
    import vlm_dist.build.data
    from vlm_dist.train import main as train
    from vlm_dist.trainer import Trainer

    vlm_dist.build.data.Materialiser = FaultyMaterialiser  # type: ignore[misc]
    train_step = Trainer._train_step

    def noted(trainer: Trainer, fetched: Any) -> Any:
        with Path(f"{os.environ['FAULTY_LEDGER']}-{trainer.ranks.rank}").open("a") as ledger:
            for batch in fetched.micro_batches:
                ledger.writelines(f"{origin.key}\n" for origin in batch.origins)
        return train_step(trainer, fetched)

    Trainer._train_step = noted  # type: ignore[method-assign]
    return train()


if __name__ == "__main__":
    from tests.e2e import faulty_decoder  # the class must have a name that workers find
    from vlm_dist.entry import leave

    leave(faulty_decoder.main()) if len(sys.argv) > 1 else sys.exit(2)
