"""Peak memory and time of the loss with and without all logits: `python -m tests.bench.memory`; one JSON line each.

Every measurement is a process of its own, as the peak of a process never falls.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

VOCABULARY, WIDTH, POSITIONS = 151_936, 1024, 2048
CASES = ("all logits", "labelled, 100%", "labelled, 20%", "nothing")


def measure(case: str) -> dict[str, Any]:
    """Forward and backward of head and loss, in bfloat16, with a frozen head."""
    import torch
    from torch import Tensor, nn

    from vlm_dist.loss import LabelledHead, token_loss_sum

    torch.set_num_threads(2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.bfloat16).requires_grad_(False)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

        def forward(self, hidden: Tensor) -> dict[str, Tensor]:
            return {"logits": self.lm_head(hidden)}

    model = Model()
    head = LabelledHead(model)
    hidden = torch.randn(1, POSITIONS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(VOCABULARY, (1, POSITIONS))
    if case.endswith("20%"):
        labels[:, : POSITIONS * 4 // 5] = -100
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if case == "all logits":
        token_loss_sum(model(hidden)["logits"], labels).backward()
    elif case != "nothing":
        with head.giving_loss(labels, -100):
            model(hidden)["loss"].backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"name": case, "peak_mib": (peak - before) / 1024, "seconds": seconds}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    for case in CASES:
        subprocess.run([sys.executable, "-m", "tests.bench.memory", case], check=True)


if __name__ == "__main__":
    main()
