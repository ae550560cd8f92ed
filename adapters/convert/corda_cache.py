"""Gives a CorDA adapter its start from the pickle of singular values that CorDA's preprocessing leaves.

Must not know: the base model, the registry, servers. Runs offline.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from motet.adapters.convert.folder import new_folder, require_new
from motet.adapters.convert.plain_pickle import read_pickled_tensors
from motet.adapters.errors import MissingTensorError, ShapeError
from motet.adapters.methods.peft_config import parse
from motet.adapters.methods.residual import METHOD_KEYS
from motet.adapters.methods.tensors import PREFIX, TensorBag
from motet.adapters.source import CONFIG_FILE, WEIGHTS_FILE, read


def corda_cache(cache_file: Path, adapter_folder: Path, out_folder: Path) -> None:
    """Write the adapter with its start, made from the SVD cache that CorDA's preprocessing left.

        B0 = U √(S/s),  A0 = √(S/s) Vᵀ   from   {module}.eigens.{S_WC [r], U_WC [O, r], V_WC [I, r]}

    Args:
        cache_file: `CordaConfig.cache_file`, a pickle; only tensors in it are read.
        adapter_folder: the trained adapter in PEFT's layout.
        out_folder: is made; the adapter's files, and `corda_init` beside them.

    Raises:
        UnsafeFormatError: the pickle holds more than tensors.
        MissingTensorError, ShapeError: the cache belongs to another adapter.
        AdapterExistsError: `out_folder` is there already.
    """
    files = read(adapter_folder)
    config = parse(files.config, METHOD_KEYS, stem="corda")
    cache = read_pickled_tensors(cache_file)
    trained = TensorBag(files.tensors)
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(trained.modules_with(".lora_A.weight")):
        parts = [f"{name}.eigens.{part}" for part in ("S_WC", "U_WC", "V_WC")]
        if absent := [part for part in parts if part not in cache]:
            raise MissingTensorError(f"the SVD cache has no {absent[0]!r}; it belongs to another adapter or model")
        values_R, u_OR, v_IR = (cache[part].double() for part in parts)
        a_RI, b_OR = (files.tensors[f"{PREFIX}{name}.lora_{letter}.weight"] for letter in "AB")
        if (len(values_R), v_IR.T.shape, u_OR.shape) != (config.rank(name), a_RI.shape, b_OR.shape):
            raise ShapeError(
                f"the SVD cache of {name!r} has shapes {list(u_OR.shape)}, {list(v_IR.shape)}; the adapter has B "
                f"{list(b_OR.shape)} and A {list(a_RI.shape)}: they do not belong together"
            )
        root_R = (values_R / config.scale(name)).sqrt()
        tensors[f"{PREFIX}{name}.lora_A.weight"] = (root_R[:, None] * v_IR.T).float().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (u_OR * root_R).float().contiguous()
    _write(adapter_folder, {**files.config, "init_lora_weights": True}, tensors, out_folder)


def _write(
    adapter_folder: Path, initial: dict[str, object], tensors: dict[str, torch.Tensor], out_folder: Path
) -> None:
    require_new(out_folder)
    with new_folder(out_folder) as made:
        (made / "corda_init").mkdir()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(adapter_folder / name, made / name)
        (made / "corda_init" / CONFIG_FILE).write_text(json.dumps(initial, indent=2) + "\n")
        save_file(tensors, made / "corda_init" / WEIGHTS_FILE)
