"""The commands that are no part of training: prepare, export, inspect, sample, report, package, import-reference."""

import dataclasses
import sys

from hymba_lightning.options import CommandParser


def run_command(command: str, args: list[str]) -> None:
    """Parses `args` by the signature of the command's function and runs it."""
    runner = {
        "prepare": run_prepare,
        "export": run_export,
        "inspect": run_inspect,
        "sample": run_sample,
        "report": run_report,
        "package": run_package,
        "audit": run_audit,
        "import-reference": run_import_reference,
    }[command]
    runner(args)


def run_prepare(args: list[str]) -> None:
    """Text → tokenizer, shards and manifest."""
    from hymba_lightning.data.prepare import prepare

    parser = CommandParser(prog="hymba prepare", description="Turn text into a tokenizer and token shards.")
    parser.add_argument(
        "inputs",
        nargs="+",
        help="Files, folders, glob patterns, hf:NAME[:SPLIT[:CONFIG]] (Hugging "
        "Face); stdlib is the Python standard library's own sources",
    )
    parser.add_argument(
        "--val_inputs",
        nargs="+",
        type=str | None,
        default=None,
        help="The validation texts, named as the inputs are; all inputs are for training then",
    )
    parser.add_function_arguments(prepare, skip={"inputs", "val_inputs"})
    options = parser.parse_args(args).as_dict()
    for key in ("inputs", "val_inputs"):
        options[key] = options[key] and ["python_stdlib" if name == "stdlib" else name for name in options[key]]
    print(prepare(**options))


def run_export(args: list[str]) -> None:
    """A checkpoint → an artifact, by any scheme and limit."""
    from jsonargparse import set_parsing_settings

    from hymba_lightning.model import RuntimeConfig
    from hymba_lightning.package.export import export
    from hymba_lightning.quantization.config import QuantizationConfig
    from hymba_lightning.terminal import take_over_lightnings_messages

    take_over_lightnings_messages()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = CommandParser(
        prog="hymba export",
        description="Write an artifact of a checkpoint's weights, the "
        "averaged ones where it has them. With --data_dir the rounding is calibrated on training "
        "batches.",
    )
    parser.add_argument("--scheme", type=str, default="mixed", help="As export.quantization.scheme of `hymba fit`")
    parser.add_argument(
        "--limit",
        type=int,
        default=16_000_000,
        help="Most bytes that the artifact and the code for its evaluation may have together",
    )
    parser.add_argument(
        "--gptq", type=bool | None, default=None, help="Round by GPTQ (default: where --data_dir is given)"
    )
    parser.add_function_arguments(export, skip={"quantization", "runtime"})
    parser.add_class_arguments(QuantizationConfig, "quantization", skip={"scheme", "limit_bytes", "gptq"})
    parser.add_class_arguments(RuntimeConfig, "runtime", skip={"activation_checkpointing"})
    options = parser.parse_args(args).as_dict()
    scheme, limit, gptq = (options.pop(key) for key in ("scheme", "limit", "gptq"))
    if gptq is None:
        gptq = options["data_dir"] is not None and scheme != "reference"
    quantization = QuantizationConfig(scheme=scheme, limit_bytes=limit, gptq=gptq, **options.pop("quantization"))
    print(export(quantization=quantization, runtime=RuntimeConfig(**options.pop("runtime")), **options))


def run_inspect(args: list[str]) -> None:
    """An artifact's config and tensors, and where its bytes are."""
    import json

    from hymba_lightning.closure import evaluation_code_bytes
    from hymba_lightning.quantization.listing import as_table, list_artifact

    parser = CommandParser(prog="hymba inspect", description="Show what an artifact holds and where its bytes are.")
    parser.add_argument("file", type=str, help="Artifact")
    parser.add_argument("--json", action="store_true", help="All of it as one JSON object")
    options = parser.parse_args(args)
    listing = list_artifact(options.file, evaluation_code_bytes)
    print(json.dumps(listing, indent=1) if options.json else as_table(listing))


def run_sample(args: list[str]) -> None:
    """A trained network continues texts."""
    from jsonargparse import set_parsing_settings

    from hymba_lightning.generation.sample import sample
    from hymba_lightning.generation.sampler import SamplingConfig
    from hymba_lightning.model import RuntimeConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = CommandParser(
        prog="hymba sample", description="Let a trained network continue texts, at constant memory and time per token."
    )
    parser.add_argument("--ckpt_path", type=str, required=True, help="Artifact, or checkpoint of `hymba fit`")
    parser.add_argument(
        "--prompt",
        type=str,
        nargs="+",
        default=[""],
        help="Texts to continue; several are drawn together. Without one a document starts from nothing",
    )
    parser.add_argument(
        "--tokenizer",
        type=str | None,
        default=None,
        help="SentencePiece model (default: the one of the run whose config.yaml lies beside the weights)",
    )
    parser.add_argument("--data.tokenizer", type=str | None, default=None, help="The same, as `hymba test` calls it")
    parser.add_class_arguments(SamplingConfig, skip={"stop_ids"})
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto")
    parser.add_class_arguments(RuntimeConfig, "runtime", skip={"activation_checkpointing"})
    options = parser.parse_args(args).as_dict()
    keys = [field.name for field in dataclasses.fields(SamplingConfig) if field.name != "stop_ids"]
    sample(
        options["prompt"],
        options["ckpt_path"],
        options["tokenizer"] or options["data"]["tokenizer"],
        SamplingConfig(**{key: options[key] for key in keys}),
        options["device"],
        RuntimeConfig(**options["runtime"]),
    )


def run_report(args: list[str]) -> None:
    """Runs → one HTML page and PNGs."""
    from hymba_lightning.report.page import write_report

    parser = CommandParser(prog="hymba report", description="Write one self-contained HTML page on one or more runs.")
    parser.add_argument("run", nargs="+", help="Folders of runs (--run_dir of hymba fit)")
    parser.add_argument("--out", type=str, default="report", help="Folder to write")
    print(write_report(**parser.parse_args(args).as_dict()))


def run_package(args: list[str]) -> None:
    """A run → the challenge's folder, scored there."""
    from hymba_lightning.package.submission import package

    parser = CommandParser(
        prog="hymba package",
        description="Lay out the challenge's folder for a run and score it there in a clean environment.",
    )
    parser.add_argument("run", type=str, help="Folder of a run that was fitted, exported and tested")
    parser.add_function_arguments(package, skip={"run"})
    print(package(**parser.parse_args(args).as_dict()))


def run_audit(args: list[str]) -> None:
    """The rules of the score, tried from outside: exits with 1 where one is broken, with 2 on bad input."""
    from jsonargparse import set_parsing_settings

    from hymba_lightning.evaluation.auditor import RuleBrokenError
    from hymba_lightning.evaluation.config import TTTConfig
    from hymba_lightning.package.audit import audit_path

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = CommandParser(
        prog="hymba audit",
        description="Try the rules of the score on an artifact, or on a folder "
        "of `hymba package` with the folder's own code: every token once, the same again, the past "
        "is fixed, a full distribution.",
    )
    parser.add_argument("path", type=str, help="Artifact, or folder that `hymba package` wrote")
    parser.add_function_arguments(audit_path, skip={"path", "ttt", "progress"})
    parser.add_class_arguments(TTTConfig, "ttt")
    options = parser.parse_args(args).as_dict()
    try:
        print(audit_path(ttt=TTTConfig(**options.pop("ttt")), **options))
    except RuleBrokenError as broken:
        print(broken, file=sys.stderr)
        sys.exit(1)


def run_import_reference(args: list[str]) -> None:
    """The reference run's final_model.pt or final_model.int8.ptz → our checkpoint or artifact."""
    from hymba_lightning.interop.reference import import_reference

    parser = CommandParser(
        prog="hymba import-reference", description="Take over the public reference run's checkpoint or quantized file."
    )
    parser.add_function_arguments(import_reference, as_positional=True)
    print(import_reference(**parser.parse_args(args).as_dict()))
