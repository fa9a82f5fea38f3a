"""GGUF files are made of pico checkpoints here, as llama.cpp's converter makes them."""

import json
from pathlib import Path
from typing import Any

import gguf
import pico
from torch import Tensor


def write_gguf(
    file: Path, original: Path, kind: str = "F32", *, turned: bool = True, **changes: Tensor
) -> Path:
    """Writes the tensors of a pico Llama as a GGUF file.

    Args:
        kind: the type of matrices, such as Q8_0; vectors stay F32.
        turned: whether rows of queries and keys are put in pairs, as llama.cpp wants them.
        changes: tensors in the place of the file's, by name with underscores for dots.
    """
    config: dict[str, Any] = json.loads((original / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_token_list(pico.VOCABULARY)
    for key, tensor in pico.read_state(original).items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None
        tensor = changes.get(name.replace(".", "_"), tensor.float())
        number = next((x for part, x in heads.items() if part in name), None)
        if turned and number is not None:
            rows = tensor.reshape(number, 2, len(tensor) // number // 2, -1)
            tensor = rows.swapaxes(1, 2).reshape(tensor.shape)
        numbers = tensor.contiguous().numpy()
        stored = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        data = numbers if stored.name == "F32" else gguf.quants.quantize(numbers, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
