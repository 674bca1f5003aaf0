"""The network for EleutherAI's lm-evaluation-harness (`lm_eval`): `pip install hymba-lightning[eval]`.

    from lm_eval import simple_evaluate
    from hymba_lightning.interop.harness import HymbaLM
    simple_evaluate(model=HymbaLM("runs/mine/artifact.hymba"), tasks=["lambada_openai"])

B requests of a batch, T tokens, V vocab_size, D d_model.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from hymba_lightning.data.text_encoder import TextEncoder
from hymba_lightning.evaluation.documents import token_nats
from hymba_lightning.generation.reply import Reply
from hymba_lightning.generation.sample import ends_of, load
from hymba_lightning.generation.sampler import SamplingConfig, generate
from hymba_lightning.model import RuntimeConfig

# Of a request that does not say.
MOST_NEW_TOKENS = 256
REQUESTS_AT_ONCE = 16
# Names under which requests say how many tokens they want.
MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
KNOWN = ("until", *MOST, "do_sample", "temperature", "top_k", "top_p", "seed")
# Values of other settings that change nothing.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1, "min_p": 0.0, "use_cache": True}


@register_model("hymba")
class HymbaLM(LM):
    """An lm_eval model. Contexts are read whole, whatever their length: nothing is cut off.

    Args:
        weights: Artifact, checkpoint, folder of `save_pretrained`, or hf:OWNER/NAME.
        tokenizer: SentencePiece model; by default the one that lies beside the weights, or that their run names.
        device: cpu, cuda, or auto.
        batch_size: Requests that are continued together; also bounds those that are scored together. auto is 16.
        batch_tokens: Most tokens, padding included, that are scored in one forward pass.
        runtime: How the network is executed.
        dtype: float32 or bfloat16, the runtime's compute_dtype in a word for lm_eval's command line.
        max_batch_size: What lm_eval's command line gives to every model; not used.

    Raises:
        FileNotFoundError: weights or tokenizer are not found.
        ValueError: a file is damaged, they do not belong together, or an option is out of range.
    """

    def __init__(
        self,
        weights: str,
        tokenizer: str | None = None,
        device: str | None = "auto",
        batch_size: int | str | None = 16,
        batch_tokens: int = 8192,
        runtime: RuntimeConfig = RuntimeConfig(),  # noqa: B008 - frozen
        dtype: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        runtime = runtime if dtype is None else dataclasses.replace(runtime, compute_dtype=dtype)
        self.net, self.processor = load(weights, tokenizer, device or "auto", runtime)
        self.encoder = TextEncoder(self.processor)
        self.batch_size = _batch_size(batch_size)
        self.batch_tokens = batch_tokens
        self._device = self.net.tok_emb.weight.device

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval's caches of requests are named by."""
        return f"hymba-{self.net.config.vocab_size}"

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-probability in nats, and whether greedy decoding would write it.

        Tokens are those of the whole text; the continuation's are those behind as many as the context has by itself.
        """
        pairs = []
        for request in requests:
            context, continuation = request.args
            # Spaces at the end belong to the word that follows.
            kept = context.rstrip()
            whole = self._encode(context + continuation)
            first = len(self._encode(kept)) if kept else 1
            pairs.append((whole, min(first, len(whole) - 1)))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        # A text of no tokens is certain.
        said = [i for i, request in enumerate(requests) if request.args[1] and len(pairs[i][0]) > 1]
        for group in self._groups([pairs[index][0] for index in said]):
            members = [said[place] for place in group]
            for index, result in zip(members, self._score([pairs[index] for index in members]), strict=True):
                results[index] = result
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each text: log-probability in nats, every token given all before it and BOS."""
        documents = [self._encode(request.args[0]) for request in requests]
        return [-float(nats.sum()) for nats in token_nats(self.net, documents, self.batch_tokens)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, settings): the continuation up to one of settings["until"], max_gen_toks or an end.

        Greedy unless do_sample is true or a temperature over 0 is given. Raises ValueError for settings that are not
        offered, such as beams.
        """
        texts = [""] * len(requests)
        alike: dict[SamplingConfig, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            sampling = self._sampling(request.args[1])
            if sampling is not None:
                alike[sampling].append(index)
        for sampling, members in alike.items():
            for start in range(0, len(members), self.batch_size):
                group = members[start : start + self.batch_size]
                for index, text in zip(group, self._continue([requests[i].args for i in group], sampling), strict=True):
                    texts[index] = text
        return texts

    def _encode(self, text: str) -> list[int]:
        """BOS and the text's ids."""
        return self.encoder.encode_pieces(self.encoder.cut(text)).tolist()

    def _groups(self, rows: list[list[int]]) -> Iterator[list[int]]:
        """Indices of rows of like length that fit into one forward pass, long ones first."""
        group: list[int] = []
        for index in sorted(range(len(rows)), key=lambda index: -len(rows[index])):
            if group and ((len(group) + 1) * len(rows[group[0]]) > self.batch_tokens or len(group) == self.batch_size):
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    @torch.no_grad()
    def _score(self, pairs: list[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
        longest = max(len(whole) for whole, _ in pairs)
        # Causal: what pads a row on the right changes nothing before it.
        ids_BT = torch.tensor([whole + [0] * (longest - len(whole)) for whole, _ in pairs], device=self._device)
        hidden_BTD, _ = self.net.hidden(ids_BT[:, :-1])
        for row, (whole, first) in enumerate(pairs):
            logits_NV = self.net.logits(hidden_BTD[row : row + 1, first - 1 : len(whole) - 1])[0].float()
            targets_N = ids_BT[row, first : len(whole)]
            log_p_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])
            yield float(log_p_N.double().sum()), bool((logits_NV.argmax(-1) == targets_N).all())

    def _sampling(self, settings: dict[str, Any]) -> SamplingConfig | None:
        """None where no token is asked for."""
        settings = {name: value for name, value in settings.items() if value is not None}
        other = sorted(name for name in settings.keys() - KNOWN if settings[name] != NEUTRAL.get(name))
        if other:
            raise ValueError(f"generation settings {', '.join(other)} are not offered: choose from {', '.join(KNOWN)}")
        most = int(next((settings[name] for name in MOST if name in settings), MOST_NEW_TOKENS))
        if most == 0:
            return None
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
        return SamplingConfig(
            max_new_tokens=most,
            temperature=temperature,
            top_k=int(settings.get("top_k") or 0),
            top_p=float(settings.get("top_p") or 1.0),
            seed=int(settings.get("seed") or 0),
            stop_ids=ends_of(self.processor),
        )

    def _continue(self, requests: list[tuple[str, dict[str, Any]]], sampling: SamplingConfig) -> list[str]:
        replies = []
        for context, settings in requests:
            until = settings.get("until") or []
            stops = (until,) if isinstance(until, str) else tuple(until)
            if not all(isinstance(stop, str) for stop in stops):
                raise ValueError(f"until={until!r} must be texts that end a continuation")
            replies.append(
                Reply(self.processor, sampling.stop_ids, sampling.max_new_tokens, stops, at_start=not context)
            )
        ended: set[int] = set()
        prompts = [self._encode(context) for context, _ in requests]
        for new in generate(self.net, prompts, sampling, ended=ended):
            for row, token in enumerate(new):
                if token is not None:
                    replies[row].push(token)
                    if replies[row].ended_by is not None:
                        ended.add(row)
        return [reply.text for reply in replies]


def _batch_size(given: int | str | None) -> int:
    """Of what lm_eval's command line takes: a number, auto, or auto:N."""
    if given is None or str(given).startswith("auto"):
        return REQUESTS_AT_ONCE
    if not str(given).isdigit() or int(given) < 1:
        raise ValueError(f"batch_size={given} is no number of requests: give 1 or more, or auto")
    return int(given)
