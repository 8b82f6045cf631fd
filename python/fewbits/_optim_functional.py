"""Optimizer steps of single tensors as functions, with the arguments of ``bitsandbytes.functional``.

An optimizer of `fewbits.optim` steps all of its tensors in one launch; these are for code that keeps its own states.
"""

from __future__ import annotations

import weakref
from math import isfinite
from typing import Any

import torch

from fewbits import _checks
from fewbits._backend import is_portable
from fewbits._launch import dense

__all__ = ["optimizer_update_8bit_blockwise", "optimizer_update_32bit"]

# bitsandbytes' names.
_NAMES = ("adam", "momentum", "rmsprop", "lion", "adagrad", "lamb", "ademamix", "lars")
_NAMES_8BIT = ("adam", "momentum", "rmsprop", "lion", "adagrad", "ademamix")


def optimizer_update_32bit(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: torch.Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: torch.Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """Update a tensor and its float32 states in place by one step.

    Parameters
    ----------
    optimizer_name : str
        ``"adam"`` (with decoupled weight decay), ``"momentum"``, ``"rmsprop"``, ``"lion"``, ``"adagrad"``, ``"lamb"``,
        ``"ademamix"`` or ``"lars"``; the rules are those of the classes of `fewbits.optim`.
    g : torch.Tensor
        The gradient: float32, float16 or bfloat16, shape of `p`.
    p : torch.Tensor
        The parameter: float32, float16 or bfloat16, on the CPU or a CUDA device.
    state1 : torch.Tensor
        float32, shape of `p`; for ``"ademamix"`` shape ``(2, *p.shape)``.
    beta1, eps : float
        As in the rule.
    step : int
        The number of this step, from 1.
    lr : float
        Learning rate.
    state2 : torch.Tensor, optional
        float32, shape of `p`; for rules with two states.
    beta2, beta3, alpha, weight_decay : float
        As in the rule.
    gnorm_scale : float
        The gradient is multiplied by it.
    unorm_vec : torch.Tensor, optional
        Not looked at: norms are kept elsewhere.
    max_unorm : float
        Trust coefficient of ``"lamb"`` and ``"lars"``; 0: none, which makes them ``"adam"`` and ``"momentum"``.
    skip_zeros : bool
        Must be False.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong. Nothing has changed then.

    Examples
    --------
    >>> p, g, m = torch.ones(2), torch.ones(2), torch.zeros(2)
    >>> optimizer_update_32bit("momentum", g, p, m, beta1=0.9, eps=0.0, step=1, lr=0.5)
    >>> p.tolist(), m.tolist()
    ([0.5, 0.5], [1.0, 1.0])
    """
    name = _name(optimizer_name, _NAMES)
    if max_unorm == 0.0:
        name = {"lamb": "adam", "lars": "momentum"}.get(name, name)
    elif name not in ("lamb", "lars"):
        raise ValueError(f"max_unorm: expected 0 for {name}, which has no trust ratio, got {max_unorm!r}")
    values = _values(beta1, beta2, beta3, alpha, eps, weight_decay, max_unorm)
    states = {"state1": state1, "state2": state2}
    _update(name, g, p, states, values, step, lr, gnorm_scale, skip_zeros)


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: torch.Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: torch.Tensor,
    qmap2: torch.Tensor | None,
    absmax1: torch.Tensor,
    absmax2: torch.Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """Update a tensor and its 8-bit states, in blocks of 256, in place by one step.

    Parameters
    ----------
    optimizer_name : str
        ``"adam"`` (with decoupled weight decay), ``"momentum"``, ``"rmsprop"``, ``"lion"``, ``"adagrad"`` or
        ``"ademamix"``.
    g, p : torch.Tensor
        As of `optimizer_update_32bit`.
    state1 : torch.Tensor
        uint8 codes, shape of `p`; for ``"ademamix"`` shape ``(2, *p.shape)``.
    state2 : torch.Tensor, optional
        uint8 codes, shape of `p`; for rules with two states.
    beta1, beta2, beta3, alpha, eps, step, lr
        As of `optimizer_update_32bit`.
    qmap1, qmap2 : torch.Tensor
        float32, shape ``(256,)``: the signed and the unsigned dynamic map (`create_dynamic_map`). Other maps are
        refused; comparing a map on a GPU for the first time waits for it.
    absmax1, absmax2 : torch.Tensor
        float32, one element a block of 256; shape ``(2, blocks)`` for the first of ``"ademamix"``.
    weight_decay, gnorm_scale, skip_zeros
        As of `optimizer_update_32bit`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is wrong. Nothing has changed then.

    Examples
    --------
    >>> from fewbits.functional import create_dynamic_map
    >>> p, g, codes, absmax = torch.ones(256), torch.ones(256), torch.zeros(256, dtype=torch.uint8), torch.zeros(1)
    >>> maps = create_dynamic_map(), None
    >>> optimizer_update_8bit_blockwise(
    ...     "momentum", g, p, codes, None, 0.9, 0.0, 0.0, 0.0, 0.0, 1, 0.5, *maps, absmax, None
    ... )
    >>> p[0].item(), codes[0].item(), absmax.tolist()
    (0.5, 255, [1.0])
    """
    name = _name(optimizer_name, _NAMES_8BIT)
    values = _values(beta1, beta2, beta3, alpha, eps, weight_decay, 0.0)
    states = {"state1": state1, "state2": state2, "absmax1": absmax1, "absmax2": absmax2}
    _update(name, g, p, states, values, step, lr, gnorm_scale, skip_zeros, {"qmap1": qmap1, "qmap2": qmap2})


def _name(given: object, known: tuple[str, ...]) -> str:
    if not isinstance(given, str) or given not in known:
        raise ValueError(f"optimizer_name: expected one of {', '.join(known)}, got {given!r}")
    return given


def _values(
    beta1: float, beta2: float, beta3: float, alpha: float, eps: float, weight_decay: float, max_unorm: float
) -> dict[str, Any]:
    return {
        **{"betas": (beta1, beta2, beta3), "eps": eps, "weight_decay": weight_decay, "alpha": alpha},
        **{"t_alpha": None, "t_beta3": None, "decoupled": True, "max_unorm": max_unorm},
    }


class _Kind:
    """What `Bundle` asks an optimizer about."""

    seed, stochastic_rounding = 0, False

    def __init__(self, optimizer_name: str) -> None:
        self.optimizer_name = optimizer_name


class _Record:
    """What `Launch` and an `Entry` ask a configuration about."""

    has_ratio = True  # without one, the rule is another

    def __init__(self, record: bytes, names: tuple[str, ...]) -> None:
        self.record, self.names = record, names


def _update(
    name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    states: dict[str, Any],
    values: dict[str, Any],
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool,
    maps: dict[str, Any] | None = None,
) -> None:
    from fewbits.optim import _states  # not everyone trains
    from fewbits.optim._families import ALIASES, DEFAULTS, FAMILIES, check_values, pack
    from fewbits.optim._launches import Bundle, Key, Launch
    from fewbits.optim._prepare import Member, check_tensors
    from fewbits.optim._whereabouts import addresses_of

    family = ALIASES.get(name, name)
    _checks.check_tensor("g", g)
    _checks.check_tensor("p", p)
    if skip_zeros:
        raise ValueError(f"skip_zeros: expected False, got {skip_zeros!r}")
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ValueError(f"step: expected a number from 1, got {step!r}")
    if not isfinite(gnorm_scale):
        raise ValueError(f"gnorm_scale: expected a finite number, got {gnorm_scale!r}")
    values = {**DEFAULTS.get(family, {}), **values, "lr": lr}
    if family in ("sgd", "lars", "adagrad", "rmsprop"):  # the rest of the betas means nothing there
        values["betas"] = (values["betas"][0], 0.0)
    bits = 32 if maps is None else 8
    check_values(family, values, bits)
    names = FAMILIES[family].states(values)
    if not names:  # momentum 0 keeps no state
        states = {}
    check_tensors([Member(0, 0, 0, p)], [p.detach()], [g])
    _states.check("states", states, family, p, names)
    for key in names:
        if _states.bits_of(states) != bits:
            raise ValueError(f"state1: expected {bits}-bit states, got {states['state1'].dtype}")
        for tensor in (states[key], states.get(_states.maxima_name(key)) if bits == 8 else None):
            if tensor is not None and (tensor.device != p.device or not tensor.is_contiguous()):
                raise ValueError(f"{key}: expected it and its maxima contiguous on {p.device}")
        if maps is not None:
            _check_map(_states.map_name(key), maps[_states.map_name(key)])

    record = _Record(pack(FAMILIES[family], values, float(lr), 0), names)
    if is_portable(p.device):
        _update_portably(family, g, p, states, record, step, gnorm_scale)
        return
    bundle = Bundle(_Kind(family), p.device)  # type: ignore[arg-type]
    counter = torch.full((), step - 1, dtype=torch.int64, device=p.device)
    planes = [states[key].data_ptr() if key in names else 0 for key in ("state1", "state2", "state3")]
    keys = [_states.maxima_name(key) for key in names] if bits == 8 else []
    maxima = [states[key].data_ptr() if key in keys else 0 for key in ("absmax1", "absmax2")]
    row = (bundle.place(p), *planes, *maxima, p.numel(), counter.data_ptr(), 0, 0, 0, 0, 1, 0, 0, 0)
    kind = Key(bits, _checks.DTYPES[p.dtype], _checks.DTYPES[g.dtype], 0, False)
    bundle.add(Launch(kind, [record], None), [row], [(0, 0)])  # type: ignore[list-item]
    bundle.finish()
    gradient = dense(g.detach())
    bundle.send(addresses_of([gradient]), [gradient], capturing=False)
    control = None
    if gnorm_scale != 1.0:
        control = torch.tensor([gnorm_scale, 0.0], dtype=torch.float32).to(p.device)  # and a flag of zero bits
    bundle.step(0 if control is None else control.data_ptr(), capturing=False)
    if not p.is_inference():
        torch.autograd.graph.increment_version(p)


def _update_portably(
    family: str,
    g: torch.Tensor,
    p: torch.Tensor,
    states: dict[str, Any],
    record: _Record,
    step: int,
    gnorm_scale: float,
) -> None:
    from fewbits.portable.optim import PortableBundle, entry_of

    bundle = PortableBundle(_Kind(family), p.device)  # type: ignore[arg-type]
    counter = torch.full((), step - 1, dtype=torch.int64, device=p.device)
    bundle.entries = [entry_of(family, 0, 0, p, {**states, "step": counter}, record)]  # type: ignore[arg-type]
    bundle.send(b"", [g], capturing=False)
    if gnorm_scale != 1.0:
        bundle.control = torch.tensor([gnorm_scale, 0.0], dtype=torch.float32).view(torch.int32).to(p.device)
    bundle.step(int(gnorm_scale != 1.0), capturing=False)
    if not p.is_inference():
        torch.autograd.graph.increment_version(p)


_known_maps: dict[int, tuple[Any, str]] = {}  # by id: a weak reference, and which map


def _check_map(key: str, table: Any) -> None:
    from fewbits.optim import _states

    known = _known_maps.get(id(table))
    if known is not None and known[0]() is table and known[1] == key:
        return
    _states.check_map("maps", key, table)
    _known_maps[id(table)] = (weakref.ref(table, lambda _: _known_maps.pop(id(table), None)), key)
