"""What `vlm-dist --help` says: the commands in the order in which one needs them, and an example of each."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import Any, Final

_OPENING: Final = """\
usage: vlm-dist COMMAND …          vlm-dist COMMAND --help explains one

Fine-tune vision-language models. A run is described by one YAML file (configs/run.yaml), which names the model, five
files of settings and the data; any value is changed for one run by --set section.key=value.
"""

_CLOSING: Final = """\
A first run:
  vlm-dist check configs/run.yaml                                     everything that is wrong, at once
  deepspeed --num_gpus 8 -m vlm_dist.train --config configs/run.yaml  train
  vlm-dist report runs/default                                        look at what came of it

The guide, with every key and what to do when something goes wrong: configs/README.md, in Korean configs/README.ko.md.
"""

#: When one needs them -> commands; the order is that of a run's life.
GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "Before a run": ("init", "config", "check", "preview", "estimate", "shards"),
    "To run it": ("launch", "doctor"),
    "While it runs and after": ("plan", "report", "quarantine", "eval", "generate", "export"),
}

#: Command, with its subcommand -> a line that can be typed as it stands once the files have these names.
EXAMPLES: Final[dict[str, str]] = {
    "init": "vlm-dist init configs/mine.yaml --model Qwen/Qwen2-VL-2B-Instruct --data data/vqa.jsonl --yes",
    "config": "vlm-dist config configs/run.yaml --set train.learning_rate=1e-4",
    "check": "vlm-dist check configs/run.yaml --stage data",
    "preview": "vlm-dist preview configs/run.yaml -n 12 -o preview.html",
    "estimate": "vlm-dist estimate configs/run.yaml --gpus 8 --gpu-memory 80",
    "report": "vlm-dist report runs/default",
    "eval": "vlm-dist eval configs/run.yaml --adapter runs/default/adapter",
    "generate": 'vlm-dist generate --adapter runs/default/adapter --image x.jpg "What is this?"',
    "plan": "vlm-dist plan configs/run.yaml --step 100 --world-size 8",
    "quarantine": "vlm-dist quarantine runs/default",
    "launch": "vlm-dist launch configs/run.yaml --dry-run",
    "doctor": "vlm-dist doctor --run configs/run.yaml",
    "shards": "vlm-dist shards build --path vqa.jsonl --media-root media --out data/vqa",
    "shards build": "vlm-dist shards build --path vqa.jsonl --media-root media --out data/vqa",
    "shards index": "vlm-dist shards index data/vqa",
    "shards info": "vlm-dist shards info data/vqa",
    "shards verify": "vlm-dist shards verify data/vqa",
    "shards show": "vlm-dist shards show data/vqa 000000007",
    "shards tokens": "vlm-dist shards tokens configs/run.yaml",
    "export": "vlm-dist export verify runs/default",
    "export merge": "vlm-dist export merge runs/default -o merged/default",
    "export verify": "vlm-dist export verify runs/default",
}

#: What `argparse` gives for the commands of a parser.
_Commands = Any


class TeachingParser(argparse.ArgumentParser):
    """The parser of `vlm-dist` itself, whose help is grouped; its commands are ordinary parsers."""

    commands: _Commands = None

    def format_help(self) -> str:
        """The help of the whole program."""
        said = {action.dest: action.help or "" for action in self.commands._choices_actions}
        grouped = {name for names in GROUPS.values() for name in names}
        groups = GROUPS | {"More": tuple(name for name in self.commands.choices if name not in grouped)}
        width = min(120, shutil.get_terminal_size().columns) - 15
        parts = [_OPENING]
        for title, names in groups.items():
            lines = []
            for name in (name for name in names if name in self.commands.choices):
                text = textwrap.fill(said.get(name, ""), max(width, 40), subsequent_indent=" " * 13)
                lines.append(f"  {name:<11}{text}")
            if lines:
                parts.append("\n".join([f"{title}:", *lines, ""]))
        return "\n".join([*parts, _CLOSING])


def add_examples(commands: _Commands, above: str = "") -> None:
    """Give every command below its example, unless its own epilog has one."""
    for name, parser in commands.choices.items():
        path = f"{above} {name}".strip()
        example = EXAMPLES.get(path)
        if example is not None and f"\n  vlm-dist {path} " not in f"\n{parser.epilog or ''}":
            if parser.formatter_class is argparse.HelpFormatter:  # whose text would no longer be wrapped for it
                parser.description = parser.description and textwrap.fill(parser.description, 100)
                parser.epilog = parser.epilog and textwrap.fill(parser.epilog, 100)
            parser.formatter_class = argparse.RawDescriptionHelpFormatter
            parser.epilog = f"{parser.epilog or ''}\n\nexample:\n  {example}\n".lstrip("\n")
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                add_examples(action, path)
