"""`lrc_cli.load` loads any checkpoint in one call: dense or factorised, transformers' or not."""

import json
import os
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrc_cli.checkpoint.foreign import adapter_keys, unmerged
from lrc_cli.checkpoint.headers import FLOAT_DTYPES
from lrc_cli.checkpoint.read_by_others import MODEL_FILES, check_read_by_others
from lrc_cli.checkpoint.source import Source, open_source
from lrc_cli.checkpoint.wrapped import bare, unwrapped_names
from lrc_cli.errors import InputError, LrcError
from lrc_cli.network.constructed import (
    check_constructed,
    check_second_names,
    loose_tensors,
    second_names,
    take_constructed,
)
from lrc_cli.network.disk_names import module_names, places
from lrc_cli.network.factories import Factory, resolve_factory
from lrc_cli.network.low_rank.adapters import register_lora
from lrc_cli.network.low_rank.slots import (
    check_stated,
    check_table,
    find_stored,
    finish_slots,
    insert_slots,
    stored_weights,
)
from lrc_cli.network.missing import (
    POOLER,
    UNUSED,
    check_lacking,
    fill_with_nan,
    lacks,
    takes_no_pooler,
)
from lrc_cli.network.recurrent import unroll
from lrc_cli.network.size_guard import bounded_building, check_counts, check_lists, check_widths
from lrc_cli.network.tensor_checks import check_copies, check_keys
from lrc_cli.runtime.places import check_name
from lrc_cli.runtime.strangers import answering_with, contained
from lrc_cli.text import named


@answering_with(InputError)
def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    factory: Factory | str | None = None,
    trust_remote_code: bool = False,
    state_dict: str | None = None,
) -> nn.Module:
    """Loads a checkpoint and returns the module, ready to run (in eval mode).

    On the CPU the parameters are views of mapped files, unless `dtype` changes them or torch before
    1.6 has saved the file.

    Args:
        path: a transformers directory, a .safetensors, .bin, .pt or .pth file, a directory with
            such a file, or a directory of torch.distributed.checkpoint.
        device: the device of the module.
        dtype: floating dtype of the parameters, e.g. `torch.float32` or "float32"; None: as stored.
        factory: a function, or "package.module:function" (looked up in the working directory too),
            that builds the dense module. A checkpoint that is not transformers' needs a factory; a
            factory is used even beside a config.json. A factory that the checkpoint names is not
            run unasked. The factory runs under torch's meta device first, and again on the CPU for
            a module that needs real tensors.
        trust_remote_code: let transformers run model code that comes with the checkpoint.
        state_dict: the keys that lead to the state dict in a file of torch.save that holds several,
            with dots between; ".": the tensors at the top; None: the only state dict.

    Raises:
        InputError: the path or the factory is missing, or tensors do not fit the module.
    """
    place, dtype = _device(device), _dtype(dtype)
    source = open_source(_path(path), state_dict=state_dict, factorised=True)
    model = load_source(source, dtype=dtype, factory=factory, trust_remote_code=trust_remote_code)
    # With a dtype, `Module.to` leaves integers alone. Without a dtype and with the same device, it
    # copies nothing.
    return model.to(device=place, dtype=dtype)


def load_source(
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    factory: Factory | str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Loads a checkpoint that is open already and returns the module on the CPU (see `load`).

    Raises:
        InputError: the factory is missing, or tensors do not fit the module.
    """
    model, source = load_unwrapped(
        source, dtype=dtype, factory=factory, trust_remote_code=trust_remote_code
    )
    if set(source.lacking) - set(source.record.get(UNUSED, ())):
        raise lacks(model, source, source.lacking)
    return model


def load_unwrapped(
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    factory: Factory | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Source]:
    """As `load_source`, with the checkpoint under the module's own names beside the module.

    Raises:
        InputError: for a missing factory, or tensors that do not fit the module.
    """
    if source.layer_table is not None:
        check_stated(source.tensors, source.layer_table)
    if factory is None and source.config is not None:
        model, source = _load_transformers(source, dtype, trust_remote_code)
    else:
        model, source = _load_plain(source, factory)
    return model.eval(), source


def _unwrapped(source: Source, model: nn.Module) -> Source:
    """Takes the parts that wrappers put into names off, where the module has no such names.

    Raises:
        InputError: two tensors get one name, and their numbers differ.
    """
    if source.record or (source.config or {}).get("quantization_config"):
        return source  # names that lrc wrote are the module's
    shapes = {key: info.shape for key, info in source.tensors.items()}
    return source.renamed(unwrapped_names(shapes, lambda keys: places(model, keys)))


def _path(path: str | os.PathLike[str]) -> Path:
    try:
        found = Path(path)
    except TypeError as error:
        raise InputError(f"{path!r:.80} is no path", "give a text or a pathlib.Path") from error
    check_name("path", found)
    return found


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{str(device)[:80]} is not a device", "use cpu, cuda or cuda:0"
        ) from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(
            f"{str(dtype)[:80]} is not a floating dtype", "use float32, bfloat16 or float16"
        )
    return found


# ---------------------------------------------------------------- transformers


def _load_transformers(
    source: Source, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[nn.Module, Source]:
    """Calls `from_pretrained` of the class that config.json names; a missing tensor is an error."""
    import lrc_cli.network.transformers_plugin  # noqa: F401 - registers the format

    path, config = source.path, source.config or {}
    if not {"model_type", "architectures", "auto_map"} & config.keys():
        of = "diffusers'" if "_class_name" in config else "timm's, perhaps"
        raise InputError(
            f"{path}/config.json has no model_type: it is not transformers' (but {of})",
            "set model.factory (--factory) to the function that builds the module, such as one"
            " around timm.create_model or a from_config of diffusers",
        )
    model, info = _from_pretrained(source, dtype, trust_remote_code)
    if info["missing_keys"] or any(bare(key) != key for key in source.tensors):
        unwrapped = _unwrapped(source, model)
        if unwrapped is not source:
            source = unwrapped
            model, info = _from_pretrained(source, dtype, trust_remote_code)
    missing = info["missing_keys"]
    strays = set(adapter_keys(source.tensors)) - set(places(model, source.tensors))
    if strays:
        raise unmerged(path, min(strays), is_whole=True)
    if missing and takes_no_pooler(model):
        bare_model, rest = _from_pretrained(source, dtype, trust_remote_code, **{POOLER: False})
        pooler = set(model.state_dict()) - set(bare_model.state_dict())
        if pooler and pooler <= set(missing):
            model, missing = bare_model, rest["missing_keys"]
    check_lacking(model, source, missing)
    fill_with_nan(model, missing)
    check_lists(source, model, info["unexpected_keys"])
    if not type(model).__module__.startswith("transformers."):
        # The classes of transformers set their buffers again after loading; other code does not.
        _take_constructed(model, source)
    return model, replace(source, lacking=tuple(sorted(missing)))


def _take_constructed(model: Any, source: Source) -> None:
    """Gives buffers and attributes that no file holds the constructor's values."""
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    unread: set[str] = set()
    if ignored:
        state = model.state_dict(keep_vars=True)
        read = {id(state.get(name)) for name in module_names(model, source.tensors).values()}
        passed_over = re.compile("|".join(f"({pattern})" for pattern in ignored))
        unread = {k for k, x in state.items() if id(x) not in read and passed_over.search(k)}
    try:
        take_constructed(model, lambda: type(model)._from_config(deepcopy(model.config)), unread)
    except LrcError:
        raise
    except Exception as error:  # the constructor is the checkpoint's code
        raise InputError(
            f"{source.path}: {type(model).__name__} cannot be built on the CPU, where it makes the"
            f" tensors that no file holds: {named(error)}",
            "mend the checkpoint's code, or build the module with a factory",
        ) from error


def _from_pretrained(
    source: Source, dtype: torch.dtype | None, trust_remote_code: bool, **more: Any
) -> tuple[nn.Module, Any]:
    """Returns the module, and which names of tensors the files lack and which it lacks.

    transformers finds the files by itself where it finds the files that were read here. Otherwise
    it is handed the tensors.
    """
    path, config = source.path, source.config or {}
    model: nn.Module
    check_counts(source)
    check_widths(source)
    check_read_by_others(path, MODEL_FILES)
    try:
        with contained(), bounded_building(source):
            model_class = _model_class(path, config, trust_remote_code)
            kind = dtype or _stored_dtype(source) or "auto"
            options = {"dtype": kind, "output_loading_info": True, **more}
            if "quantization_config" not in config:
                # lrc names the tensor of another shape, and transformers does not.
                options |= {"ignore_mismatched_sizes": True}
            if source.is_transformers_choice or "quantization_config" in config:
                options |= {"local_files_only": True}
                options |= {"trust_remote_code": True} if trust_remote_code else {}
                options |= _config_of_half(model_class, path, config)
                model, info = model_class.from_pretrained(path, **options)
            else:
                model, info = _from_state(model_class, source, trust_remote_code, options)
        _check_shapes(path, info)
    except LrcError:
        raise
    # On a config.json that makes no sense, a model class may raise any error: a division by zero
    # heads, a validation error of huggingface_hub, a missing key.
    except Exception as error:
        raise InputError(
            f"{path} cannot be loaded by transformers: {named(error)}",
            "check that config.json fits the weights and that this transformers knows the model",
        ) from error
    return model, info


def _check_shapes(path: Path, info: Mapping[str, Any]) -> None:
    """Raises InputError for a tensor whose shape is not the module's."""
    for key, stored, needed in sorted(info["mismatched_keys"], key=lambda found: str(found[0])):
        raise InputError(
            f"{path} cannot be loaded by transformers: {key} has shape {tuple(stored)}, and the"
            f" network of config.json needs {tuple(needed)}",
            "check that config.json fits the weights",
        )


def _config_of_half(model_class: Any, path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the option that tells a half of a model, such as CLIP's text model, its layer table.

    Such a class reads its own section of config.json, and the table stands beside the sections.
    """
    if config.get("quantization_config") is None or not hasattr(model_class, "config_class"):
        return {}
    own = model_class.config_class.from_pretrained(path, local_files_only=True)
    if getattr(own, "quantization_config", None) is not None:
        return {}
    own.quantization_config = config["quantization_config"]
    return {"config": own}


def _from_state(
    model_class: Any, source: Source, trust_remote_code: bool, options: Mapping[str, Any]
) -> Any:
    """Calls `from_pretrained` on tensors that lrc reads, for files that transformers cannot map."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(
        source.path, local_files_only=True, trust_remote_code=trust_remote_code
    )
    if not hasattr(model_class, "config_class"):  # an auto class wants a path
        with torch.device("meta"):
            model = model_class.from_config(config, trust_remote_code=trust_remote_code)
        model_class = type(model)
    state = {key: source.read(key) for key in source.tensors}
    model, info = model_class.from_pretrained(None, config=config, state_dict=state, **options)
    if (source.path / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(
            source.path, local_files_only=True
        )
    return model, info


def _stored_dtype(source: Source) -> torch.dtype | None:
    """Returns the floating dtype of most stored numbers (config.json may differ), or None."""
    numbers = dict.fromkeys(FLOAT_DTYPES, 0)
    for info in source.tensors.values():
        if info.dtype in numbers:
            numbers[info.dtype] += info.num_elements
    most = max(numbers, key=lambda dtype: numbers[dtype])
    return most if numbers[most] else None


def _model_class(path: Path, config: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """Returns the class in config.json's `architectures`, or the auto class that stands for it.

    Where config.json names no class, this is `AutoModel`. An unknown name is an error: another
    class might load a part of the network without a word.
    """
    import transformers

    names = config.get("architectures")
    if not names and not isinstance(names, str):
        return transformers.AutoModel
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise InputError(
            f"{path}/config.json: architectures is {names!r}, not a list of class names",
            f"write it as {json.dumps([names])}" if isinstance(names, str) else "restore the file",
        )
    auto_class = _auto_class(names[0], config.get("auto_map"))
    if auto_class and trust_remote_code:
        return getattr(transformers, auto_class)
    found = getattr(transformers, names[0], None)
    if isinstance(found, type) and hasattr(found, "from_pretrained"):
        return found
    raise InputError(
        f"{path}/config.json: transformers {transformers.__version__} has no class {names[0]}",
        "set trust_remote_code to run the checkpoint's own code"
        if auto_class
        else "upgrade transformers, or build the module with a factory",
    )


def _auto_class(architecture: str, auto_map: object) -> str | None:
    """Returns the auto class that `auto_map` maps to the code of the checkpoint, or None."""
    if not isinstance(auto_map, dict):
        return None
    for name, reference in auto_map.items():
        if isinstance(reference, str) and reference.rpartition(".")[2] == architecture:
            return str(name)
    return None


# ---------------------------------------------------------------- any other module


def _load_plain(source: Source, factory: Factory | str | None) -> tuple[nn.Module, Source]:
    """Builds the module by `factory` and puts the files' tensors into the module."""
    path = source.path
    record = source.record
    if factory is None:
        named = record.get("factory")
        cause = f"{path} is not a transformers checkpoint, and does not say how its module is built"
        if named:
            cause = f"{path} was made for the module that {named} builds, which is not run unasked"
        raise InputError(
            cause, f'pass factory="{named or "package.module:function"}" (config: model.factory)'
        )
    build = resolve_factory(factory)
    model = _constructed(build)
    before = second_names(model)
    model, source, made = _filled(model, source, record)
    if made:
        take_constructed(model, build, made)
    check_second_names(model, before)
    finish_slots(model)
    register_lora()
    return model, source


def _constructed(build: Factory) -> nn.Module:
    """Returns a module without private memory where the factory can run on meta.

    A module that computes tensors that no file holds is built on the CPU.

    Raises:
        InputError: the factory fails, or computes such tensors anew each time.
    """
    model = _on_meta(build)
    if model is None or any(tensor.is_meta for tensor in loose_tensors(model).values()):
        model = build()
    check_constructed(model, build)
    return model


def _on_meta(build: Factory) -> nn.Module | None:
    try:
        with torch.device("meta"):
            return build()
    except InputError:  # an operation that meta tensors lack; a real fault comes again on the CPU
        return None


def _filled(
    model: nn.Module, source: Source, record: Mapping[str, Any]
) -> tuple[nn.Module, Source, list[str]]:
    """Fills a module, with slots for its factorised layers, with the files' tensors.

    Returns:
        The module, the checkpoint under the module's names, and the names of the module's tensors
        of whole numbers that no file holds: tables of positions, counts.
    """
    source = _unwrapped(source, model)
    table = record.get("layers", {})
    weights = module_names(model, stored_weights(source.tensors, table)).values()
    unroll(model, {name.rpartition(".")[0] for name in weights})
    insert_slots(model, find_stored(model, source.tensors, table))
    check_table(model, table)
    expected = model.state_dict(keep_vars=True)
    missing = check_keys(expected, source.tensors)
    check_copies(expected, source)
    loaded = {id(expected[key]): _like(expected[key], source.read(key)) for key in source.tensors}
    lacking = tuple(key for key in missing if expected[key].is_floating_point())
    check_lacking(model, source, lacking)
    loaded |= {id(expected[key]): expected[key] for key in missing}
    loaded |= {
        id(expected[key]): _like(expected[key], torch.full_like(expected[key], nan, device="cpu"))
        for key in lacking
    }
    # All names of a tied tensor get one object, so they stay tied.
    state = {key: loaded[id(tensor)] for key, tensor in expected.items()}
    model.load_state_dict(state, assign=True)
    return model, replace(source, lacking=lacking), [x for x in missing if x not in lacking]


def _like(expected: Tensor, tensor: Tensor) -> Tensor:
    """Returns `tensor`, as a parameter where the module has a parameter, without a copy."""
    if not isinstance(expected, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=expected.requires_grad and tensor.is_floating_point())
