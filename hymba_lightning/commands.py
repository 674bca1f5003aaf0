"""The commands that are no part of training: `hymba prepare` and `hymba import-reference`."""

import sys

from jsonargparse import ArgumentParser


def run_command(command: str, args: list[str]) -> None:
    """Parses `args` by the signature of the command's function and runs it; bad input ends with one line."""
    runner = {"prepare": run_prepare, "import-reference": run_import_reference}[command]
    try:
        runner(args)
    except (ValueError, OSError) as error:
        sys.exit(f"hymba {command}: {error}")


def run_prepare(args: list[str]) -> None:
    """Text → tokenizer, shards and manifest."""
    from hymba_lightning.data.prepare import prepare

    parser = ArgumentParser(prog="hymba prepare", description="Turn text into a tokenizer and token shards.")
    parser.add_argument("inputs", nargs="+", help='Files, folders or glob patterns; "stdlib" is the Python standard '
                        "library's own sources")
    parser.add_function_arguments(prepare, skip={"inputs"})
    options = parser.parse_args(args).as_dict()
    options["inputs"] = ["python_stdlib" if name == "stdlib" else name for name in options["inputs"]]
    print(prepare(**options))


def run_import_reference(args: list[str]) -> None:
    """The reference run's final_model.pt or final_model.int8.ptz → our checkpoint or artifact."""
    from hymba_lightning.interop.reference import import_reference

    parser = ArgumentParser(prog="hymba import-reference",
                            description="Take over the public reference run's checkpoint or quantized file.")
    parser.add_function_arguments(import_reference, as_positional=True)
    print(import_reference(**parser.parse_args(args).as_dict()))


