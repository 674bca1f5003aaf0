"""Values of configs are of their fields' types: what means one becomes one, what means none is named."""

import dataclasses
import enum
import math
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from hymba_lightning.data.datamodule import HymbaDataModule
from hymba_lightning.evaluation.config import TTTConfig
from hymba_lightning.field_types import settle
from hymba_lightning.generation.sampler import SamplingConfig
from hymba_lightning.model import HymbaConfig, RuntimeConfig
from hymba_lightning.quantization import QuantizationConfig
from hymba_lightning.training.module import HymbaModule
from hymba_lightning.training.optim_config import OptimizerConfig


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (HymbaConfig, {"window": 8.5}, r"^window must be a whole number, got '8.5' \(float\)$"),
        (HymbaConfig, {"tie_embeddings": "no"}, r"^tie_embeddings must be True or False, got 'no' \(str\)$"),
        (HymbaConfig, {"global_layers": [0.5]}, r"^global_layers must be text or a list, of a whole number each"),
        (RuntimeConfig, {"activation_checkpointing": "off"}, "^activation_checkpointing must be True or False"),
        (TTTConfig, {"epochs": 1.5}, r"^ttt.epochs must be a whole number"),
        (TTTConfig, {"lr": math.nan}, "^ttt.lr must be finite and not negative, got nan$"),
        (TTTConfig, {"limit_seconds": math.nan}, "^ttt.limit_seconds must be positive"),
        (OptimizerConfig, {"matrix_lr": "0.02"}, r"^optimizer.matrix_lr must be a number or None, got '0.02' \(str\)$"),
        (OptimizerConfig, {"weight_decay": math.inf}, "^optimizer.weight_decay is inf; it must lie in 0 … 1,000,000"),
        (QuantizationConfig, {"name_bits": {"tok_emb": 4.5}}, "^name_bits must be a dictionary of names, with a whole"),
        (SamplingConfig, {"stop_ids": 5}, r"^stop_ids must be a list, of a whole number each, got '5' \(int\)$"),
        (SamplingConfig, {"temperature": math.nan}, "^temperature=nan"),
    ],
    ids=str,
)
def test_a_config_of_values_of_other_types_is_refused_by_name(config, given, message):
    with pytest.raises(ValueError, match=message):
        config(**given)


class Name(str, enum.Enum):  # noqa: UP042 - whose `str` is not its value
    MUON = "muon"


@pytest.mark.parametrize(
    ("config", "given", "plain"),
    [
        (OptimizerConfig, {"name": Name.MUON}, "muon"),
        (OptimizerConfig, {"adam_betas": np.array([0.5, 0.75])}, (0.5, 0.75)),
        (OptimizerConfig, {"matrix_lr": torch.tensor(0.5)}, 0.5),
        (QuantizationConfig, {"limit_bytes": 16e6}, 16_000_000),
        (HymbaConfig, {"smear_gate": 1}, True),
        (SamplingConfig, {"stop_ids": {3}}, (3,)),
        (SamplingConfig, {"stop_ids": range(2)}, (0, 1)),
        (TTTConfig, {"grad_clip": math.inf}, math.inf),
    ],
    ids=str,
)
def test_what_means_a_value_of_the_type_becomes_one(config, given, plain):
    (name,) = given
    value = getattr(config(**given), name)
    assert (value, type(value)) == (plain, type(plain))


def test_fields_that_a_subclass_adds_are_of_any_type():
    @dataclasses.dataclass(frozen=True)
    class Own(HymbaConfig):
        window: str = "wide"
        place: Path = Path("a")
        later: "NotImportedYet" = None  # type: ignore[name-defined] # noqa: F821
        shared: ClassVar[int] = 3

        def __post_init__(self):
            settle(self)

    assert Own(place=Path("b")).place == Path("b")
    with pytest.raises(ValueError, match=r"^n_layers must be a whole number, got '1.5'"):
        Own(n_layers=1.5)


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        (HymbaDataModule, {"seq_len": "64"}, "data.seq_len must be a whole number, got '64'"),
        (HymbaDataModule, {"ttt_chunk_tokens": None}, "data.ttt_chunk_tokens must be a whole number, got 'None'"),
        (HymbaDataModule, {"val_files": ["a", "b"]}, "data.val_files must be text"),
        (HymbaModule, {"compile": "no"}, "compile must be True or False, got 'no'"),
        (HymbaModule, {"optimizer": "adamw"}, "optimizer must be of the kind OptimizerConfig, got 'adamw'"),
        (HymbaModule, {"optimizer": {"lr": 1}}, "optimizer has no 'lr': it has name, "),
    ],
)
def test_modules_name_an_argument_of_another_type(kind, given, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        kind(**given)


def test_modules_take_paths_and_whole_floats(tmp_path):
    data = HymbaDataModule(tmp_path, tokenizer=tmp_path / "a.model", seq_len=64.0, val_tokens_limit=np.int64(9))
    assert (data.data_dir, data.tokenizer) == (tmp_path, tmp_path / "a.model")
    assert [type(data.seq_len), type(data.val_tokens_limit)] == [int, int]
