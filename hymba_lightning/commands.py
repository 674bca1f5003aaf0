"""The commands beside training: prepare, export, sample, report, publish, …"""

import dataclasses
import sys
from pathlib import Path

from hymba_lightning.options import CommandParser, positionals_first, read_help


def run_command(command: str, args: list[str]) -> None:
    """Parses `args` by the signature of the command's function and runs it."""
    runner = {
        "prepare": run_prepare,
        "export": run_export,
        "inspect": run_inspect,
        "sample": run_sample,
        "bpb": run_bpb,
        "report": run_report,
        "package": run_package,
        "publish": run_publish,
        "audit": run_audit,
        "probe": run_probe,
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
    from hymba_lightning.model import RuntimeConfig
    from hymba_lightning.package.export import export
    from hymba_lightning.quantization.config import QuantizationConfig
    from hymba_lightning.terminal import take_over_lightnings_messages

    take_over_lightnings_messages()
    read_help(args)
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
    from hymba_lightning.files import not_a_file
    from hymba_lightning.quantization.listing import as_table, list_artifact

    parser = CommandParser(prog="hymba inspect", description="Show what an artifact holds and where its bytes are.")
    parser.add_argument("file", type=str, help="Artifact")
    parser.add_argument("--json", action="store_true", help="All of it as one JSON object")
    options = parser.parse_args(args)
    if not Path(options.file).is_file():
        raise not_a_file(options.file, options.file, "an artifact")
    listing = list_artifact(options.file, evaluation_code_bytes)
    print(json.dumps(listing, indent=1) if options.json else as_table(listing))


def run_sample(args: list[str]) -> None:
    """A trained network continues texts."""
    from hymba_lightning.errors import UsageError
    from hymba_lightning.generation.sample import OutputConfig, converse, gather_prompts, sample, typed_lines
    from hymba_lightning.generation.sampler import SamplingConfig
    from hymba_lightning.model import RuntimeConfig

    read_help(args)
    parser = CommandParser(
        prog="hymba sample", description="Let a trained network continue texts, at constant memory and time per token."
    )
    parser.add_argument(
        "weights",
        type=str,
        nargs="?",
        help="Artifact, checkpoint of `hymba fit`, folder of `hymba publish`, hf:OWNER/NAME",
    )
    parser.add_argument("texts", type=str, nargs="*", default=[], help="Texts to continue, as --prompt")
    parser.add_argument("--ckpt_path", type=str | None, default=None, help="The weights, as `hymba test` calls them")
    parser.add_argument(
        "--prompt",
        type=str,
        nargs="+",
        default=[],
        help="Texts to continue, - for stdin's; several are drawn together. Without one, what is piped in; without "
        "that, a document starts from nothing",
    )
    parser.add_argument("--prompt_file", type=str, nargs="+", default=[], help="Files whose texts are continued")
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="Each line of stdin is added to the text, and continued; an empty one goes on. The state is kept between",
    )
    parser.add_argument("--stop", type=str, nargs="+", default=[], help="Texts that end a continuation, left out of it")
    parser.add_argument("--json", action="store_true", help="One JSON object a line and text, instead of the text")
    parser.add_argument("--verbose", action="store_true", help="Tokens and seconds on stderr")
    parser.add_argument(
        "--tokenizer",
        type=str | None,
        default=None,
        help="SentencePiece model (default: the one beside the weights, or of the run whose config.yaml lies there)",
    )
    parser.add_argument("--data.tokenizer", type=str | None, default=None, help="The same, as `hymba test` calls it")
    parser.add_class_arguments(SamplingConfig, skip={"stop_ids"})
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto")
    parser.add_class_arguments(RuntimeConfig, "runtime", skip={"activation_checkpointing"})
    options = parser.parse_args(positionals_first(parser, args)).as_dict()
    weights, texts = options["weights"], [*options["texts"], *options["prompt"]]
    if options["ckpt_path"] is not None:
        # With both, what stands first is a text.
        texts, weights = ([] if weights is None else [weights]) + texts, options["ckpt_path"]
    if weights is None:
        raise UsageError(
            "nothing to sample from: give an artifact, a checkpoint or a folder, such as runs/demo/artifact.hymba"
        )
    if options["interactive"] and (texts or options["prompt_file"]):
        raise UsageError("--interactive reads its texts from stdin: leave the prompts out")
    keys = [field.name for field in dataclasses.fields(SamplingConfig) if field.name != "stop_ids"]
    common = (
        weights,
        options["tokenizer"] or options["data"]["tokenizer"],
        SamplingConfig(**{key: options[key] for key in keys}),
        OutputConfig(options["stop"], options["json"], options["verbose"]),
        options["device"],
        RuntimeConfig(**options["runtime"]),
    )
    if options["interactive"]:
        converse(typed_lines(), *common)
    else:
        sample(gather_prompts(texts, options["prompt_file"]), *common)


def run_bpb(args: list[str]) -> None:
    """Bits per byte of each document of files or a data set."""
    from hymba_lightning.evaluation.documents import print_scores, read_texts, score_texts
    from hymba_lightning.generation.sample import load
    from hymba_lightning.model import RuntimeConfig

    read_help(args)
    parser = CommandParser(
        prog="hymba bpb",
        description="Score texts document by document: each from an empty state, read whole, over its own UTF-8 bytes.",
    )
    parser.add_argument(
        "weights", type=str, help="Artifact, checkpoint of `hymba fit`, folder of `hymba publish`, hf:OWNER/NAME"
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        help="Files, folders, glob patterns, hf:NAME[:SPLIT[:CONFIG]], as `hymba prepare` takes them",
    )
    parser.add_argument("--text_key", type=str, default="text", help="Field of a JSON line, or column, with the text")
    parser.add_argument("--separator", type=str | None, default=None, help="Cut text files into documents there")
    parser.add_argument("--json", action="store_true", help="A JSON object for each document, and one for all")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="Most tokens that are read in one forward pass")
    parser.add_argument("--tokenizer", type=str | None, default=None, help="SentencePiece model (default: the run's)")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto")
    parser.add_class_arguments(RuntimeConfig, "runtime", skip={"activation_checkpointing"})
    options = parser.parse_args(positionals_first(parser, args))
    runtime = RuntimeConfig(**options.runtime.as_dict())
    net, processor = load(options.weights, options.tokenizer, options.device, runtime)
    texts = read_texts(options.inputs, options.text_key, options.separator)
    print_scores(score_texts(net, processor, texts, options.batch_tokens), options.json)


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


def run_publish(args: list[str]) -> None:
    """A run → a folder for Hugging Face's libraries, and onto the hub."""
    from hymba_lightning.package.publish import publish

    parser = CommandParser(
        prog="hymba publish",
        description="Write a run's network, tokenizer and model card as Hugging Face's libraries know them.",
    )
    parser.add_argument("path", type=str, help="Folder of a run, an artifact, or a checkpoint of `hymba fit`")
    parser.add_function_arguments(publish, skip={"path"})
    print(publish(**parser.parse_args(args).as_dict()))


def run_audit(args: list[str]) -> None:
    """The rules of the score, tried from outside: exits with 1 where one is broken, with 2 on bad input."""
    from hymba_lightning.evaluation.auditor import RuleBrokenError
    from hymba_lightning.evaluation.config import TTTConfig
    from hymba_lightning.package.audit import audit_path

    read_help(args)
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


def run_probe(args: list[str]) -> None:
    """What a network's context is worth: probe.json, probe.png and a table."""
    from hymba_lightning.model import RuntimeConfig
    from hymba_lightning.probes.probe import probe

    read_help(args)
    parser = CommandParser(
        prog="hymba probe",
        description="Measure what a trained network's context is worth: loss by position with parts of its memory "
        "taken away, copying and recall by distance, and how long its states last.",
    )
    parser.add_argument("file", type=str, help="Artifact, or checkpoint of `hymba fit`")
    parser.add_function_arguments(probe, skip={"file", "runtime"})
    parser.add_class_arguments(RuntimeConfig, "runtime", skip={"activation_checkpointing"})
    options = parser.parse_args(args).as_dict()
    print(probe(runtime=RuntimeConfig(**options.pop("runtime")), **options))


def run_import_reference(args: list[str]) -> None:
    """The reference run's final_model.pt or final_model.int8.ptz → our checkpoint or artifact."""
    from hymba_lightning.interop.reference import import_reference

    parser = CommandParser(
        prog="hymba import-reference", description="Take over the public reference run's checkpoint or quantized file."
    )
    parser.add_function_arguments(import_reference, as_positional=True)
    print(import_reference(**parser.parse_args(args).as_dict()))
