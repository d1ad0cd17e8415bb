"""`vlm-dist generate`: ask a trained model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_dist.cli.arguments import Commands
from vlm_dist.errors import ConfigError, DataError

_RUN_FILES = (".yaml", ".yml")


def add_commands(commands: Commands) -> None:
    """Add `generate`."""
    parser = commands.add_parser(
        "generate",
        help="ask a trained model about images and videos",
        description="Answer a question with a trained adapter. The prompt is that of training: base model, message "
        "format, processor and system prompt are those of the run, whose resolved_config.yaml stands beside the "
        "adapter. Without a question, questions are asked one after the other (Ctrl-D ends); none is remembered.",
    )
    parser.add_argument("words", nargs="*", metavar="[RUN.yaml] [QUESTION]", help="run file, question")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="adapter/ or checkpoint-N/ of a run")
    parser.add_argument("--base", action="store_true", help="without any adapter (needs RUN.yaml)")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument("--video", type=Path, action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="length limit (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (%(default)s)")
    parser.add_argument("--base-model", metavar="DIR", help="where the base model is now")
    parser.add_argument(
        "--field", action="append", default=[], metavar="VARIABLE=TEXT", help="of another variable of the prompt"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.set_defaults(command=generate)


def generate(options: argparse.Namespace) -> None:
    """Answer one question, or one after the other."""
    run, question = _split(options.words)
    values = dict(_read_field(one) for one in options.field)
    if options.max_new_tokens < 1 or options.temperature < 0:
        raise ConfigError("--max-new-tokens must be 1 or more, and --temperature 0 or more")
    from vlm_dist.cli.messages import show_messages

    show_messages()
    from vlm_dist.build.answering import find_run_file, load_answering_config, open_answering, read_media
    from vlm_dist.build.standalone import EvalRequest

    if options.adapter is None and run is None:
        raise ConfigError("name an adapter (--adapter DIR), or a run file")
    if options.adapter is not None and options.base:
        raise ConfigError("give one of --adapter and --base")
    media = {"images": read_media(options.image), "videos": read_media(options.video)}  # before the model: it is quick
    config = load_answering_config(run or find_run_file(options.adapter), options.overrides, options.base_model)
    adapter = EvalRequest(adapter=options.adapter, is_base=options.base).choose(config.train.output_dir)
    model = open_answering(config, adapter)
    limits = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    arguments = {**media, **limits, "values": values}
    if question is not None:
        _say(model, question, arguments)
        return
    for asked in _questions():
        try:
            _say(model, asked, arguments)
        except DataError as error:  # the next question may do better
            print(f"error: {error}", file=sys.stderr)


def _say(model: Any, question: str, arguments: dict[str, Any]) -> None:
    streams = sys.stdout.isatty()
    answer = model.answer(question, streams=streams, **arguments)
    if not streams:  # otherwise it is there already
        print(answer, flush=True)


def _split(words: list[str]) -> tuple[Path | None, str | None]:
    run = Path(words.pop(0)) if words and words[0].endswith(_RUN_FILES) else None
    if len(words) > 1:
        raise ConfigError(f"got {len(words)} questions; put the words of one between quotes")
    return run, words[0] if words else None


def _read_field(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--field: got {text!r}, expected VARIABLE=TEXT")
    return name, value


def _questions() -> Iterator[str]:
    """Lines from a terminal, with a prompt; from a pipe, each line of it."""
    shown = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    if shown:
        import readline  # noqa: F401 - lets `input` edit
    while True:
        try:
            question = input(shown).strip()
        except EOFError:
            if shown:
                print()
            return
        if question:
            yield question
