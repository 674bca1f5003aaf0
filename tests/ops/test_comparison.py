"""The comparison that all op tests rest on."""

import pytest
import torch
from op_cases import assert_close

from hymba_lightning.ops.testing import rms_ratio


def test_ratio_is_of_root_mean_squares():
    assert rms_ratio(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx((1 / 25) ** 0.5)
    assert rms_ratio(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5


def test_close_enough_passes_and_further_off_names_the_worst_entry():
    expected = torch.ones(2, 3)
    actual = expected.clone()
    actual[1, 2] = 1.01
    assert_close("x", actual, expected, 0.005)
    with pytest.raises(AssertionError, match=r"RMS ratio 0.00408 is over 0.004; the worst entry, at \(1, 2\), is 1.01"):
        assert_close("x", actual, expected, 0.004)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_entry_fails_however_small_its_share(bad):
    actual = torch.ones(1000)
    actual[17] = bad
    with pytest.raises(AssertionError, match=r"1 of 1000 entries are not finite, the first at \(17,\)"):
        assert_close("x", actual, torch.ones(1000), 1e9)


def test_reference_that_is_not_finite_fails():
    with pytest.raises(AssertionError, match="RMS ratio nan"):
        assert_close("x", torch.ones(2), torch.tensor([1.0, float("nan")]), 1e9)


@pytest.mark.parametrize("actual", [torch.ones(3), torch.ones(2, dtype=torch.bfloat16), None])
def test_shape_type_and_absence_count(actual):
    with pytest.raises(AssertionError, match=r"x: got .*, expected float32 \(2,\)"):
        assert_close("x", actual, torch.ones(2), 1.0)
    assert_close("x", None, None, 1.0)
