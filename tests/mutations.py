"""What can be wrong with a quantized state dict: recipes that damage a good one, by a seeded source of chance.

Each recipe takes a `random.Random` and a state dict that it may change, and returns the words of which an error must
hold one: the names of the keys or fields that it touched.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import torch

from fewbits.utils import pack_dict_to_tensor, unpack_tensor_to_dict

State = dict[str, Any]
Recipe = Callable[[random.Random, State], list[str]]


def leaf(key: str) -> str:
    """Return the last part of a key: the word by which an error may call it."""
    return key.rpartition(".")[2]


def blob_key(state: State) -> str | None:
    """Return the key of the packed JSON, which 4-bit weights have."""
    return next((key for key in state if ".quant_state." in key), None)


# ---- keys ------------------------------------------------------------------------------------------------------------


def missing_key(rng: random.Random, state: State) -> list[str]:
    key = rng.choice(sorted(state))
    del state[key]
    return [leaf(key), "SCB"]  # without its scales or its format, an int8 weight misses the former


def renamed_key(rng: random.Random, state: State) -> list[str]:
    key = rng.choice(sorted(state))
    position = rng.randrange(len(key))
    other = rng.choice([
        key + rng.choice("x_.0"),
        key[:position] + rng.choice("qz-") + key[position + 1 :],
        f"model.{key}",
        key.upper(),
        "",
    ])  # fmt: skip
    state[other] = state.pop(key)
    return [leaf(key), leaf(other), "SCB"]


def foreign_key(rng: random.Random, state: State) -> list[str]:
    prefix = next(key for key in state if leaf(key) == "weight")
    key = prefix + rng.choice([
        *(".zero_points", ".g_idx", ".quant_state.bitsandbytes__nf5", ".quant_state", ".absmax.absmax", "_packed"),
        *(".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", "_scale", ".nested_absmax"),
    ])  # fmt: skip
    state[key] = rng.choice([torch.ones(3), torch.zeros(3, dtype=torch.uint8), "text"])
    return [leaf(key), "nested_absmax", "quant_state"]


# ---- tensors ---------------------------------------------------------------------------------------------------------


def truncated_tensor(rng: random.Random, state: State) -> list[str]:
    key = rng.choice(sorted(state))
    flat = state[key].reshape(-1)
    state[key] = flat[: rng.choice([0, flat.numel() // 2, flat.numel() - 1])]
    return [leaf(key), "quant_state"]


def wrong_shape(rng: random.Random, state: State) -> list[str]:
    key = rng.choice(sorted(state))
    tensor = state[key]
    flat = tensor.reshape(-1)
    state[key] = rng.choice([
        torch.cat([flat, flat]),
        torch.cat([flat, flat[:1]]),
        flat[None],
        flat[:, None],
        tensor[..., None],
        tensor.transpose(0, -1).contiguous() if tensor.dim() else flat,
        flat[:0].reshape(0, 5),
        flat[:1].expand(1 << 40),
    ])  # fmt: skip
    return [leaf(key), "quant_state"]


def wrong_dtype(rng: random.Random, state: State) -> list[str]:
    key = rng.choice(sorted(state))
    kinds = [torch.int64, torch.int32, torch.bool, torch.complex64]
    # Of a float, a lesser float is another value that nobody can know for wrong.
    kinds.append(torch.float64 if state[key].is_floating_point() else torch.float8_e4m3fn)
    state[key] = state[key].to(rng.choice(kinds))
    return [leaf(key), "quant_state"]


def no_tensor(rng: random.Random, state: State) -> list[str]:
    key = rng.choice(sorted(state))
    tensor = state[key]
    state[key] = rng.choice([
        None, "text", 7, b"bytes", [1.0, 2.0], {}, float("nan"), torch.float32, tensor.to("meta"), tensor.to_sparse(),
    ])  # fmt: skip
    return [leaf(key), "quant_state"]


def unknown_layout(rng: random.Random, state: State) -> list[str]:
    """Of int8 weights; 4-bit ones have no such key, so that it is a foreign one."""
    prefix = next(key for key in state if leaf(key) == "weight")
    values = [1, 3, 255, "col_ampere", None, float("nan"), [0], torch.tensor([0, 0]), torch.tensor(2), torch.tensor([])]
    state[f"{prefix}_format"] = rng.choice([*values, torch.tensor(float("nan")), torch.tensor(1 + 0j)])
    return ["weight_format"]


def same_values(rng: random.Random, state: State) -> list[str]:
    """Change nothing that matters."""
    key = rng.choice(sorted(state))
    tensor = state[key]
    state[key] = rng.choice([
        torch.nn.Parameter(tensor, requires_grad=False),
        torch.stack([tensor, tensor], dim=-1)[..., 0],
        tensor.clone(),
    ])  # fmt: skip
    return []


# ---- the packed JSON -------------------------------------------------------------------------------------------------


def flipped_bytes(rng: random.Random, state: State) -> list[str]:
    """Damage the text anywhere but in the digits of a number that nothing else tells of."""
    key = blob_key(state)
    if key is None:
        return missing_key(rng, state)
    data = bytearray(state[key].tolist())
    start = data.find(b"nested_offset")
    guarded = range(start, data.find(b"}", start)) if start >= 0 else range(0)
    for _ in range(rng.randint(1, 3)):
        position = rng.choice([i for i in range(len(data)) if i not in guarded])
        data[position] ^= 1 << rng.randrange(8)
    state[key] = torch.tensor(list(data), dtype=torch.uint8)
    return _FIELDS


def other_text(rng: random.Random, state: State) -> list[str]:
    key = blob_key(state)
    if key is None:
        return missing_key(rng, state)
    data = bytes(state[key].tolist())
    other = rng.choice([
        b"", b"null", b"[]", b"7", b"{}", b"\xff\xfe", b"[" * 60000, b'{"a":' * 30000, b"0" * 5000, data[:-1], data * 2,
        data[: rng.randrange(len(data))], data.replace(b":", b"="), data + b"\x00", b" " * (1 << 21) + data,
    ])  # fmt: skip
    state[key] = torch.frombuffer(bytearray(other), dtype=torch.uint8) if other else torch.empty(0, dtype=torch.uint8)
    return _FIELDS


_NUMBERS: list[Any] = [
    *(0, -1, -64, 1, 63, 65, 1 << 31, 1 << 40, 1 << 70, 10**400, 0.5, 64.0, 1e308, -1e308),
    *(float("nan"), float("inf"), -float("inf"), True, False, None, "64", [], [64], {}),
]
_ABSURD: dict[str, list[Any]] = {
    "quant_type": ["nf5", "int8", "", "NF4", None, 4, ["nf4"], {}],
    "blocksize": _NUMBERS,
    "nested_blocksize": _NUMBERS,
    "nested_offset": [
        *(float("nan"), float("inf"), -float("inf"), 10**400, 1e39, -1e300, True, None, "0.1", [], [0.1], {}),
    ],
    "dtype": ["float8", "int8", "float64", "complex64", "", "nn", "__doc__", "torch", None, 7, [], ["float32"], {}],
    "nested_dtype": ["float8", "uint8", "", "Tensor", None, 7, [], {}],
    "shape": [
        *([], [0], [-48, -64], [48], [64, 48], [48, 65], [1 << 40, 1 << 40], [1 << 70, 1], [10**400], [48.0, 64.0]),
        *(["48", "64"], [[48, 64]], [True, 3072], [None, None], None, 3072, "48x64", {}, [48, 64, 1], [3072]),
    ],
}
_FIELDS = ["quant_state", "nested_offset", "absmax", "quant_map", *_ABSURD]


def absurd_field(rng: random.Random, state: State) -> list[str]:
    key = blob_key(state)
    if key is None:
        return unknown_layout(rng, state)
    items = unpack_tensor_to_dict(state[key])
    field = rng.choice(sorted(set(items) & set(_ABSURD)))
    items[field] = rng.choice(_ABSURD[field])
    state[key] = pack_dict_to_tensor(items)
    return [field, "absmax"] if "blocksize" in field or field == "shape" else [field]


def missing_field(rng: random.Random, state: State) -> list[str]:
    key = blob_key(state)
    if key is None:
        return missing_key(rng, state)
    items = unpack_tensor_to_dict(state[key])
    field = rng.choice(sorted(items))
    value = items.pop(field)
    if rng.random() < 0.5:
        items[field + "_"] = value
    state[key] = torch.frombuffer(bytearray(json.dumps(items).encode()), dtype=torch.uint8)
    return [field]


RECIPES: list[Recipe] = [
    *(missing_key, renamed_key, foreign_key, truncated_tensor, wrong_shape, wrong_dtype, no_tensor, unknown_layout),
    *(same_values, flipped_bytes, other_text, absurd_field, missing_field),
]
