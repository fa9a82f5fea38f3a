"""A layer table that does not speak of the checkpoint's layers is refused when it is loaded."""

from typing import Any

import pytest
import torch

from lrc_cli.checkpoint.foreign import not_dense
from lrc_cli.checkpoint.headers import TensorInfo
from lrc_cli.errors import InputError
from lrc_cli.network.low_rank.slots import check_stated

KEYS = ("a.weight", "a.up.weight", "b.weight", "b.bias")
ENTRY: dict[str, Any] = {"storage": "factors", "rank": 2}


@pytest.mark.parametrize(
    ("table", "cause"),
    [
        pytest.param({}, "a is factorised, and the layer table is empty", id="empty"),
        pytest.param({"a": ENTRY, "ghost": ENTRY}, "no tensor is its", id="ghost"),
        pytest.param({"a": ENTRY, "a.up.more": ENTRY}, "no tensor is its", id="below a layer"),
        pytest.param({"a": ENTRY}, None, id="right"),
    ],
)
def test_the_table_names_the_layers_that_are_there(
    table: Any, cause: str | None, tmp_path: Any
) -> None:
    headers = {k: TensorInfo(file=tmp_path, shape=(2, 2), dtype=torch.float32) for k in KEYS}
    if cause is None:
        check_stated(headers, table)
        return
    with pytest.raises(InputError, match=cause):
        check_stated(headers, table)


@pytest.mark.parametrize("dtype", ["C64", "complex64", "complex128"])
def test_complex_weights_are_called_complex(dtype: str, tmp_path: Any) -> None:
    assert "takes real weights" in str(not_dense(tmp_path, "w", dtype))
    assert "dequantise" in str(not_dense(tmp_path, "w", "float8_e4m3fn"))
