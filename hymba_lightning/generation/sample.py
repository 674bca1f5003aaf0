"""What `hymba sample` does: load, encode, draw, print as the text comes."""

import dataclasses
import sys
import time
from pathlib import Path

import torch

from hymba_lightning.data.tokenizer import load_tokenizer
from hymba_lightning.generation.loading import find_tokenizer, load_network
from hymba_lightning.generation.sampler import SamplingConfig, generate
from hymba_lightning.generation.text import TextStream
from hymba_lightning.model import RuntimeConfig


def sample(
    prompts: list[str],
    ckpt_path: str,
    tokenizer: str | None = None,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
    device: str = "auto",
    runtime: RuntimeConfig = RuntimeConfig(),  # noqa: B008
) -> list[str]:
    """Continues each prompt and prints it: one prompt as it comes, several each when it is done.

    Returns the texts, prompts included.

    Args:
        prompts: Texts to continue; an empty one starts a document from nothing.
        ckpt_path: Artifact or checkpoint.
        tokenizer: SentencePiece model; by default the one of the run whose config.yaml lies beside the weights.
        sampling: How tokens are drawn.
        device: cpu, cuda, or auto.
        runtime: How the network is executed.
    """
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    net, fingerprint = load_network(Path(ckpt_path), runtime, where)
    processor = load_tokenizer(find_tokenizer(Path(ckpt_path), tokenizer, fingerprint))
    if processor.get_piece_size() != net.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {processor.get_piece_size()} pieces, but the network's vocab_size is "
            f"{net.config.vocab_size}: give --tokenizer the right one"
        )
    ids = [[processor.bos_id(), *processor.encode(prompt)] for prompt in prompts]
    ends = tuple(token for token in (processor.bos_id(), processor.eos_id()) if token >= 0)
    streams = [TextStream(processor, at_start=not prompt) for prompt in prompts]
    texts = list(prompts)
    live = len(prompts) == 1
    if live:
        print(prompts[0], end="", flush=True)
    started, n_new = time.monotonic(), 0
    drawn = [0] * len(prompts)
    for new in generate(net, ids, dataclasses.replace(sampling, stop_ids=ends)):
        for row, token in enumerate(new):
            if token is None:
                continue
            n_new += 1
            drawn[row] += 1
            text = streams[row].push(token)
            if token in ends or drawn[row] == sampling.max_new_tokens:
                text += streams[row].finish()
                texts[row] += text
                print(text if live else f"[{row + 1}] {texts[row]}", flush=True)
            else:
                texts[row] += text
                if live:
                    print(text, end="", flush=True)
    seconds = time.monotonic() - started
    print(f"{n_new} tokens in {seconds:.1f} s ({n_new / seconds:.0f} per second)", file=sys.stderr)
    return texts
