"""The adapter in the hands of PEFT alone, in a process that knows nothing of this project."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

from vlm_dist.errors import ExitCode
from vlm_dist.export.opening import Origin
from vlm_dist.model.checkpoint_files import read_json
from vlm_dist.model.conversion import converter_of, native_directory
from vlm_dist.observability.findings import Finding, Level

#: What a user of PEFT writes, and then looks which weights of the file are in the model.
_SCRIPT = """
import json, sys
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForImageTextToText
base, adapter, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
if rows > model.get_input_embeddings().weight.shape[0]:
    model.resize_token_embeddings(rows)
model = PeftModel.from_pretrained(model, adapter, torch_device="cpu")
values = dict(model.named_parameters(remove_duplicate=False))  # what has no module to be listed by goes in place
values |= get_peft_model_state_dict(model, save_embedding_layers=False)
there = wrong = 0
with safe_open(adapter + "/adapter_model.safetensors", framework="pt") as file:
    for key in file.keys():
        there += 1
        found = values.get(key)
        wrong += found is None or not torch.equal(found.float(), file.get_tensor(key).float())
print(json.dumps({"there": there, "wrong": wrong}))
"""


def loads_by_peft_alone(origin: Origin) -> Iterator[Finding]:
    """Load base and adapter in a fresh process with transformers and PEFT, and compare every weight."""
    config = origin.config
    revision = config.model.loading_for(config.model_id).revision
    base = config.model_id
    converter = converter_of(read_json(base, "config.json", revision).get("model_type"))
    if converter is not None:
        base = native_directory(converter, base, revision, weights=True)
    rows = max((shape[0] for key, shape in origin.point.shapes.items() if "embed_tokens" in key), default=0)
    ended = subprocess.run(  # noqa: S603 - our own interpreter, no shell
        [sys.executable, "-c", _SCRIPT, base, str(origin.path), str(rows)], capture_output=True, text=True, check=False
    )
    if ended.returncode != 0:
        said = (ended.stderr.strip().splitlines() or ["no word"])[-1]
        yield Finding(
            Level.PROBLEM, "PEFT alone", f"in a process of its own it does not load: {said}",
            exit_code=ExitCode.CHECKPOINT,
        )  # fmt: skip
        return
    told = json.loads(ended.stdout.splitlines()[-1])
    if told["wrong"]:
        yield Finding(
            Level.PROBLEM,
            "PEFT alone",
            f"{told['wrong']} of {told['there']} weights are not in the model that PEFT loads",
            exit_code=ExitCode.CHECKPOINT,
        )
    else:
        yield Finding(
            Level.OK, "PEFT alone", f"a fresh process with transformers and PEFT has all {told['there']:,} weights"
        )
