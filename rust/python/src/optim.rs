//! Optimizer steps. Arguments: `_native.pyi`.

use fewbits_core::Dtype;
use fewbits_core::optim::{self, Bits, Control, Family, GROUPS, Group, Norms, Step, Trust};
use pyo3::prelude::*;

use crate::blockwise::run;
use crate::error::{Result, unknown};
use crate::target::{dtype, target};

/// Bytes of a packed group.
const GROUP_BYTES: usize = size_of::<Group>();

fn family(number: usize) -> Result<Family> {
    Family::ALL.get(number).copied().ok_or_else(|| unknown("family", number, "an index into OPTIM_FAMILIES"))
}

fn bits(number: usize) -> Result<Bits> {
    match number {
        8 => Ok(Bits::Eight),
        32 => Ok(Bits::ThirtyTwo),
        _ => Err(unknown("bits", number, "8 or 32")),
    }
}

/// Packed groups, in this machine's byte order.
fn groups(bytes: &[u8]) -> Result<Vec<Group>> {
    if bytes.is_empty() || !bytes.len().is_multiple_of(GROUP_BYTES) || bytes.len() > GROUPS * GROUP_BYTES {
        let expected = format!("1 to {GROUPS} records of {GROUP_BYTES} bytes");
        return Err(unknown("groups", format!("{} bytes", bytes.len()), &expected));
    }
    Ok(bytes.chunks_exact(GROUP_BYTES).map(group).collect())
}

fn group(record: &[u8]) -> Group {
    let word = |i: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&record[8 * i..8 * i + 8]);
        u64::from_ne_bytes(bytes)
    };
    let number = |i: usize| f64::from_bits(word(i));
    Group {
        lr: number(0),
        lr_address: word(1),
        beta1: number(2),
        beta2: number(3),
        beta3: number(4),
        alpha: number(5),
        t_alpha: number(6),
        t_beta3: number(7),
        eps: number(8),
        weight_decay: number(9),
        dampening: number(10),
        lr_decay: number(11),
        trust: number(12),
        flags: word(13),
        spare: [0; 2],
    }
}

/// One step of all tensors of one kind.
#[pyfunction]
pub fn optim_step(
    py: Python<'_>,
    family: usize,
    bits: usize,
    dtype_p: usize,
    dtype_g: usize,
    tensors: u64,
    count: usize,
    gradients: u64,
    tiles: u64,
    tile_count: usize,
    groups: &[u8],
    workspace: u64,
    control: u64,
    ratios: u64,
    seed: u64,
    stochastic: bool,
    device: i64,
    queue: u64,
) -> Result<()> {
    let (parameters, gradients_dtype): (Dtype, Dtype) = (dtype(dtype_p)?, dtype(dtype_g)?);
    let (family, bits, groups, target) =
        (self::family(family)?, self::bits(bits)?, self::groups(groups)?, target(device, queue)?);
    // SAFETY: `fewbits.optim` passes tables of tensors on this device and keeps them alive for the call.
    run(py, target, move || unsafe {
        let step = Step {
            family,
            bits,
            parameters,
            gradients_dtype,
            tensors,
            count,
            gradients,
            tiles,
            tile_count,
            groups: &groups,
            workspace,
            control,
            ratios,
            seed,
            stochastic,
        };
        optim::step(&step, target)
    })
}

/// Sums of squares of each tile: of gradients (0), or of parameters and updates (1).
#[pyfunction]
pub fn optim_norms(
    py: Python<'_>,
    kind: usize,
    family: usize,
    bits: usize,
    dtype_p: usize,
    dtype_g: usize,
    tensors: u64,
    count: usize,
    gradients: u64,
    tiles: u64,
    tile_count: usize,
    groups: &[u8],
    control: u64,
    partials: u64,
    device: i64,
    queue: u64,
) -> Result<()> {
    let kind = match kind {
        0 => Norms::Gradient,
        1 => Norms::Trust,
        _ => return Err(unknown("kind", kind, "0 (gradients) or 1 (parameters and updates)")),
    };
    let (parameters, gradients_dtype) = (dtype(dtype_p)?, dtype(dtype_g)?);
    let (family, bits, groups, target) =
        (self::family(family)?, self::bits(bits)?, self::groups(groups)?, target(device, queue)?);
    // SAFETY: as in `optim_step`.
    run(py, target, move || unsafe {
        let step = Step {
            family,
            bits,
            parameters,
            gradients_dtype,
            tensors,
            count,
            gradients,
            tiles,
            tile_count,
            groups: &groups,
            workspace: 0,
            control,
            ratios: 0,
            seed: 0,
            stochastic: false,
        };
        optim::norms(&step, kind, partials, target)
    })
}

/// The factor of the gradients, and whether the step is left out.
#[pyfunction]
pub fn optim_control(
    py: Python<'_>,
    partials: u64,
    count: usize,
    max_norm: f64,
    grad_scale: u64,
    found_inf: u64,
    skip_nonfinite: bool,
    control: u64,
    device: i64,
    queue: u64,
) -> Result<()> {
    let target = target(device, queue)?;
    let control = Control { partials, count, max_norm, grad_scale, found_inf, skip_nonfinite, control };
    // SAFETY: as in `optim_step`.
    run(py, target, move || unsafe { optim::control(&control, target) })
}

/// The trust ratio of every entry.
#[pyfunction]
pub fn optim_trust(
    py: Python<'_>,
    partials: u64,
    tensors: u64,
    count: usize,
    tile_count: usize,
    family: usize,
    groups: &[u8],
    ratios: u64,
    device: i64,
    queue: u64,
) -> Result<()> {
    let (family, groups, target) = (self::family(family)?, self::groups(groups)?, target(device, queue)?);
    // SAFETY: as in `optim_step`.
    run(py, target, move || unsafe {
        let trust = Trust { partials, tensors, count, tile_count, family, groups: &groups, ratios };
        optim::trust(&trust, target)
    })
}

/// The numbers that callers need to make tables.
pub fn add_constants(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let names: Vec<_> = Family::ALL.into_iter().map(Family::name).collect();
    module.add("OPTIM_FAMILIES", pyo3::types::PyTuple::new(module.py(), names)?)?;
    module.add("OPTIM_FIELDS", optim::FIELDS)?;
    module.add("OPTIM_GROUPS", GROUPS)?;
    module.add("OPTIM_TILE", optim::TILE)?;
    module.add("OPTIM_WORKSPACE", optim::WORKSPACE)
}
