//! Launches of optim8.cu, optim32.cu and optim_norm.cu.

use super::kernel::Kernel;
use super::launch::{Grid, Launch, arguments};
use super::optim_kernels::OptimKernel;
use crate::optim::{BLOCK, Control, GROUPS, Group, Norms, Step, TILE, Trust};
use crate::{Error, Result};

/// A launch as kernels receive it: `Step` of optim.cuh.
#[repr(C)]
struct Parameters {
    tensors: u64,
    gradients: u64,
    tiles: u64,
    ticket: u64,
    control: u64,
    ratios: u64,
    partials: u64,
    seed: u64,
    count: i32,
    tile_count: i32,
    stochastic: i32,
    dtype_p: i32,
    dtype_g: i32,
    groups: [Group; GROUPS],
}

/// Groups with the logarithms that kernels need: those of the host, so that every device starts from the same ones.
fn groups(groups: &[Group]) -> [Group; GROUPS] {
    let mut all = [groups[0]; GROUPS];
    for (to, from) in all.iter_mut().zip(groups) {
        *to = Group { spare: [from.beta1.ln().to_bits(), from.beta3.ln().to_bits()], ..*from };
    }
    all
}

/// Kernels count tiles with 32 bits.
fn checked_tiles(tile_count: usize) -> Result<i32> {
    i32::try_from(tile_count).map_err(|_| Error::argument("tile_count", tile_count, "at most 2^31 - 1 tiles a launch"))
}

fn parameters(step: &Step, partials: u64) -> Result<Parameters> {
    Ok(Parameters {
        tensors: step.tensors,
        gradients: step.gradients,
        tiles: step.tiles,
        ticket: step.workspace,
        control: step.control,
        ratios: step.ratios,
        partials,
        seed: step.seed,
        count: step.count as i32,
        tile_count: checked_tiles(step.tile_count)?,
        stochastic: i32::from(step.stochastic),
        dtype_p: step.parameters as i32,
        dtype_g: step.gradients_dtype as i32,
        groups: groups(step.groups),
    })
}

fn describe(step: &Step) -> String {
    let (family, tensors, tiles) = (step.family.name(), step.count, step.tile_count);
    let (p, g) = (step.parameters.suffix(), step.gradients_dtype.suffix());
    format!("{family}, {tensors} tensors of {p} with gradients of {g}, {tiles} tiles")
}

/// # Safety
/// As [`crate::optim::step`].
pub unsafe fn step(step: &Step, device: usize, stream: u64) -> Result<()> {
    let mut parameters = parameters(step, 0)?;
    if !step.family.has_trust_ratio() {
        parameters.ratios = 0;
    }
    let kernel = OptimKernel::step(step.family, step.bits, step.parameters, step.gradients_dtype);
    let blocks = (step.tile_count * (TILE / BLOCK)) as u64;
    let launch = Launch {
        device,
        stream,
        kernel: Kernel::Optim(kernel),
        // A block of elements for each warp.
        grid: Grid::Overlapping(blocks.div_ceil(u64::from(kernel.threads() / 32))),
        describe: &|| describe(step),
    };
    // SAFETY: the one parameter of optim8_* and optim32_*; memory by the caller's promise.
    unsafe { launch.run(arguments![parameters]) }
}

/// # Safety
/// As [`crate::optim::norms`].
pub unsafe fn norms(step: &Step, kind: Norms, partials: u64, device: usize, stream: u64) -> Result<()> {
    let parameters = parameters(&Step { ratios: 0, ..*step }, partials)?;
    let kernel = match kind {
        Norms::Gradient => OptimKernel::NormGradient,
        Norms::Trust => OptimKernel::NormTrust { family: step.family, bits: step.bits },
    };
    let launch = Launch {
        device,
        stream,
        kernel: Kernel::Optim(kernel),
        // A tile for each of 16 warps, on few tiles a block each.
        grid: Grid::Overlapping(step.tile_count as u64),
        describe: &|| describe(step),
    };
    // SAFETY: the one parameter of optim_norm_*; memory by the caller's promise.
    unsafe { launch.run(arguments![parameters]) }
}

/// # Safety
/// As [`crate::optim::control`].
pub unsafe fn control(control: &Control, device: usize, stream: u64) -> Result<()> {
    let Control { partials, count, max_norm, grad_scale, found_inf, skip_nonfinite, control } = *control;
    let (sums, skip_nonfinite) = (count as i64, i32::from(skip_nonfinite));
    let launch = Launch {
        device,
        stream,
        kernel: Kernel::Optim(OptimKernel::Control),
        grid: Grid::Overlapping(1),
        describe: &|| format!("{count} sums"),
    };
    // SAFETY: the parameters of optim_control, in order; memory by the caller's promise.
    unsafe { launch.run(arguments![partials, sums, max_norm, grad_scale, found_inf, skip_nonfinite, control]) }
}

/// # Safety
/// As [`crate::optim::trust`].
pub unsafe fn trust(trust: &Trust, device: usize, stream: u64) -> Result<()> {
    let parameters = Parameters {
        tensors: trust.tensors,
        gradients: 0,
        tiles: 0,
        ticket: 0,
        control: 0,
        ratios: 0,
        partials: trust.partials,
        seed: 0,
        count: trust.count as i32,
        tile_count: checked_tiles(trust.tile_count)?,
        stochastic: 0,
        dtype_p: 0,
        dtype_g: 0,
        groups: groups(trust.groups),
    };
    let (lamb, ratios) = (i32::from(trust.family == crate::optim::Family::Lamb), trust.ratios);
    let launch = Launch {
        device,
        stream,
        kernel: Kernel::Optim(OptimKernel::Trust),
        grid: Grid::Overlapping(trust.count as u64),
        describe: &|| format!("{} tensors, {} tiles", trust.count, trust.tile_count),
    };
    // SAFETY: the parameters of optim_trust, in order; memory by the caller's promise.
    unsafe { launch.run(arguments![parameters, lamb, ratios]) }
}
