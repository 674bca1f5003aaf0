"""Entry point of the `hymba` command. Imports nothing heavy until it knows what is asked."""

from __future__ import annotations

import sys

from hymba_lightning.help_text import kept_help
from hymba_lightning.terminal import set_up_messages

OVERVIEW = """usage: hymba <command> [options]

Train a Hymba language model against the clock, export it, score it.

commands:
  prepare            text → tokenizer and token shards
  fit                train inside the budget, export the artifact, score every stage
  validate           score a checkpoint or an artifact
  test               score-first test-time training on a checkpoint or an artifact
  export             a checkpoint → an artifact, by any scheme and limit
  inspect            what an artifact holds and where its bytes are
  sample             let a checkpoint or an artifact continue a text
  report             one HTML page on one or more runs
  package            the challenge's folder for a run, scored there as a referee would
  audit              do the rules of the score hold? an artifact, or a folder of package
  import-reference   take over the public reference run's checkpoint or quantized file

`hymba <command> --help` explains every option.
"""


def main() -> None:
    """Runs the command line in sys.argv."""
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print(OVERVIEW, end="")
        return
    kept = kept_help(args)
    if kept is not None:
        print(kept, end="")
        return
    set_up_messages()
    command, rest = args[0], args[1:]
    if command in ("prepare", "export", "inspect", "sample", "report", "package", "audit", "import-reference"):
        from hymba_lightning.commands import run_command

        run_command(command, rest)
        return
    from hymba_lightning.cli import run

    run(args)


if __name__ == "__main__":
    main()
