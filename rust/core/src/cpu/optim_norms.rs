//! Norms of gradients, parameters and updates, in float64 and in one order of summation on every device.
//!
//! Within a block of 256 lane `l` of 32 adds elements `8 l` to `8 l + 7`, then the lanes fold by halves; a tile adds its blocks. Sums of
//! tiles are taken by 1024 lanes, each of every 1024th, which fold by halves.

use super::optim::{bytes_per_element, scale};
use super::optim_block::{Lanes, decode, load};
use super::optim_coefficients::Moment;
use super::optim_rules::direction;
use super::optim_table::{Entry, Table, row};
use super::pool;
use crate::optim::{BLOCK, Bits, Control, Family, Field, Norms, Step, TILE, Trust};
use crate::{Dtype, Error, Result};

/// Adds the upper half of the sums to the lower one until one is left.
fn fold<const N: usize>(mut sums: [f64; N]) -> f64 {
    let mut width = N / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

fn block_sum(values: &[f32; BLOCK]) -> f64 {
    let mut sums = [0.0f64; 32];
    for (sum, run) in sums.iter_mut().zip(values.chunks_exact(BLOCK / 32)) {
        for value in run {
            *sum += f64::from(*value) * f64::from(*value);
        }
    }
    fold(sums)
}

/// The sum of `count` values that lie `stride` apart.
///
/// # Safety
/// The address holds `count * stride` float64.
unsafe fn sum(partials: u64, count: usize, stride: usize) -> f64 {
    let mut sums = [0.0f64; 1024];
    for i in 0..count {
        // SAFETY: the caller's promise.
        sums[i % 1024] += unsafe { (partials as *const f64).wrapping_add(i * stride).read_unaligned() };
    }
    fold(sums)
}

/// # Safety
/// As [`crate::optim::norms`].
pub(crate) unsafe fn norms(step: &Step, kind: Norms, partials: u64, threads: usize) -> Result<()> {
    // SAFETY: the caller's promise.
    let table = unsafe { Table::new(step, kind == Norms::Trust && step.family == Family::Lamb)? };
    // SAFETY: as above. A step that will be left out has sums as well.
    let scale = unsafe { scale(step.control) }.unwrap_or(1.0);
    let bytes = match kind {
        Norms::Gradient => step.gradients_dtype.size(),
        Norms::Trust => bytes_per_element(step),
    };
    pool::run_with(step.tile_count, TILE * bytes, threads, Lanes::new, |lanes, first, last| {
        for tile in first..last {
            // SAFETY: the table has been checked; `partials` has room for the sums of every tile.
            unsafe {
                let out = partials as *mut f64;
                match kind {
                    Norms::Gradient => out.add(tile).write_unaligned(gradient_tile(&table, tile, lanes)),
                    Norms::Trust => {
                        let (p, u) = trust_tile(&table, tile, scale, lanes);
                        out.add(2 * tile).write_unaligned(p);
                        out.add(2 * tile + 1).write_unaligned(u);
                    }
                }
            }
        }
    })
}

/// # Safety
/// The table has been checked and has such a tile.
unsafe fn gradient_tile(table: &Table, tile: usize, lanes: &mut Lanes) -> f64 {
    // SAFETY: the caller's promise.
    let entry = unsafe { table.of_tile(tile) };
    let (start, end) = entry.range(tile);
    let mut sum = 0.0;
    for block in (start..end).step_by(BLOCK) {
        let (dtype, count) = (table.step.gradients_dtype, BLOCK.min(end - block));
        // SAFETY: the block lies within the entry.
        unsafe { load(dtype, entry.gradient, block, count, &mut lanes.g) };
        sum += block_sum(&lanes.g);
    }
    sum
}

/// # Safety
/// The table has been checked and has such a tile.
unsafe fn trust_tile(table: &Table, tile: usize, scale: f32, lanes: &mut Lanes) -> (f64, f64) {
    // SAFETY: the caller's promise.
    let (entry, moment) = unsafe {
        let entry = table.of_tile(tile);
        let moment = Moment::new(table.group(&entry), entry.t);
        (entry, moment)
    };
    let (start, end) = entry.range(tile);
    let (mut p, mut u) = (0.0, 0.0);
    for block in (start..end).step_by(BLOCK) {
        let count = BLOCK.min(end - block);
        // SAFETY: the block lies within the entry.
        unsafe { load_block(table.step, &entry, block, count, lanes) };
        let Lanes { p: parameter, g, s: [m, v, _] } = lanes;
        for gradient in g.iter_mut() {
            *gradient *= scale;
        }
        direction(table.step.family, &moment, parameter, &mut g[..count], m, v);
        p += block_sum(parameter);
        u += block_sum(g);
    }
    (p, u)
}

/// Reads what the trust ratio depends on; past the end stands 0.
///
/// # Safety
/// The entry has elements `start..start + count`, a block.
unsafe fn load_block(step: &Step, entry: &Entry, start: usize, count: usize, lanes: &mut Lanes) {
    // SAFETY: the caller's promise.
    unsafe {
        load(step.parameters, entry.p, start, count, &mut lanes.p);
        load(step.gradients_dtype, entry.gradient, start, count, &mut lanes.g);
        if step.family == Family::Lamb {
            for (state, out) in entry.states.iter().zip(&mut lanes.s).take(2) {
                match step.bits {
                    Bits::ThirtyTwo => load(Dtype::F32, state.address, start, count, out),
                    Bits::Eight => decode(state, start, count, out),
                }
            }
        }
    }
}

/// # Safety
/// As [`crate::optim::control`].
pub(crate) unsafe fn control(control: &Control) {
    let _mode = super::float_mode::DefaultFloatMode::enter();
    let optional = |address: u64| {
        let pointer = address as *const f32;
        // SAFETY: the caller promises a float32 at any address but 0.
        (!pointer.is_null()).then(|| unsafe { pointer.read_unaligned() })
    };
    // SAFETY: the caller's promise.
    let sum = unsafe { sum(control.partials, control.count, 1) };
    let inverse = optional(control.grad_scale).map_or(1.0, |scale| 1.0 / f64::from(scale));
    let norm = sum.sqrt() * inverse;
    let clip = match control.max_norm > 0.0 {
        true => control.max_norm / (norm + 1e-6),
        false => 1.0,
    };
    // NaN stays.
    let clip = if clip >= 1.0 { 1.0 } else { clip };
    let overflow = optional(control.found_inf).is_some_and(|found| found != 0.0);
    let skip = overflow || control.skip_nonfinite && !sum.is_finite();
    // SAFETY: the caller has room for a float32 and a uint32.
    unsafe {
        (control.control as *mut f32).write_unaligned((inverse * clip) as f32);
        (control.control as *mut u32).wrapping_add(1).write_unaligned(u32::from(skip));
    }
}

/// # Safety
/// As [`crate::optim::trust`].
pub(crate) unsafe fn trust(trust: &Trust) -> Result<()> {
    let _mode = super::float_mode::DefaultFloatMode::enter();
    for index in 0..trust.count {
        // SAFETY: the table has `count` rows.
        let row = unsafe { row(trust.tensors, index) };
        let field = |field: Field| usize::try_from(row[field as usize]).ok();
        let fits = || {
            let group = field(Field::Group).and_then(|group| trust.groups.get(group))?;
            let (first, tiles) = (field(Field::FirstTile)?, field(Field::N)?.div_ceil(TILE));
            (tiles == 0 || first.checked_add(tiles)? <= trust.tile_count).then_some((group, first, tiles))
        };
        let Some((group, first, tiles)) = fits() else {
            let got = format!("group, n or first_tile of entry {index}");
            return Err(Error::argument("tensors", got, "a group and tiles that there are"));
        };
        let partials = trust.partials.wrapping_add(16 * first as u64);
        // SAFETY: the entry's tiles lie within the sums; ratios has room for one of each entry.
        unsafe {
            let p = sum(partials, tiles, 2).sqrt();
            let u = sum(partials.wrapping_add(8), tiles, 2).sqrt();
            let ratio = if p == 0.0 || u == 0.0 {
                1.0
            } else if trust.family == Family::Lamb {
                group.trust * p / u
            } else {
                group.trust * p / (u + group.weight_decay * p)
            };
            (trust.ratios as *mut f32).wrapping_add(index).write_unaligned(ratio as f32);
        }
    }
    Ok(())
}
