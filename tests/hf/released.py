"""A folder as a released Hymba model's repository has it: a tiny network, and a tokenizer of words."""

from __future__ import annotations

import json
from pathlib import Path

import official_statement as statement
from official_statement import SMALL


def write_released_model(folder: Path) -> Path:
    """Writes and returns it; word w<n> has the id n."""
    import tokenizers
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SMALL))
    save_file(statement.random_weights(SMALL), folder / "model.safetensors")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder
