//! Optimizer steps on this machine's processor: block by block, everything between reading and writing in the nearest cache.

use super::element::Bf16;
use super::optim_block::{Lanes, decode, encode, load, store, store_stochastic};
use super::optim_coefficients::Moment;
use super::optim_rules::{Update, with_rule};
use super::optim_table::{Entry, Table, row};
use super::philox::Place;
use super::pool;
use crate::optim::{BLOCK, Bits, Field, Step, TILE};
use crate::{Dtype, Result};

/// The factor of all gradients, or `None` where the step is left out.
///
/// # Safety
/// `control` is 0 or holds a float32 and a uint32.
pub unsafe fn scale(control: u64) -> Option<f32> {
    if control == 0 {
        return Some(1.0);
    }
    // SAFETY: the caller's promise.
    let (scale, skip) =
        unsafe { ((control as *const f32).read_unaligned(), (control as *const u32).wrapping_add(1).read_unaligned()) };
    (skip == 0).then_some(scale)
}

/// Bytes read and written for each element, about.
pub fn bytes_per_element(step: &Step) -> usize {
    let states = if step.bits == Bits::Eight { 4 } else { 16 };
    2 * step.parameters.size() + step.gradients_dtype.size() + states
}

/// # Safety
/// As [`crate::optim::step`].
pub(crate) unsafe fn step(step: &Step, threads: usize) -> Result<()> {
    // SAFETY: the caller's promise.
    let (table, scale) = unsafe { (Table::new(step, true)?, scale(step.control)) };
    let Some(scale) = scale else { return Ok(()) };
    pool::run_with(step.tile_count, TILE * bytes_per_element(step), threads, Lanes::new, |lanes, first, last| {
        for tile in first..last {
            // SAFETY: the table has been checked; tiles do not overlap.
            unsafe { update_tile(&table, tile, scale, lanes) };
        }
    })?;
    for index in 0..step.count {
        // SAFETY: every row's counter has an address.
        unsafe {
            let row = row(step.tensors, index);
            if row[Field::Advance as usize] != 0 {
                let counter = row[Field::Step as usize] as *mut i64;
                counter.write_unaligned(counter.read_unaligned().wrapping_add(1));
            }
        }
    }
    Ok(())
}

/// # Safety
/// The table has been checked and has such a tile; nobody else works on it.
unsafe fn update_tile(table: &Table, tile: usize, scale: f32, lanes: &mut Lanes) {
    let step = table.step;
    // SAFETY: the caller's promise; families with a trust ratio have ratios.
    let (entry, moment, ratio) = unsafe {
        let entry = table.of_tile(tile);
        let moment = Moment::new(table.group(&entry), entry.t);
        let ratio = match step.family.has_trust_ratio() {
            true => (step.ratios as *const f32).add(entry.index).read_unaligned(),
            false => 1.0,
        };
        (entry, moment, ratio)
    };
    let (start, end) = entry.range(tile);
    // Where everything is float32 there is nothing to convert.
    let plain = step.bits == Bits::ThirtyTwo && step.parameters == Dtype::F32 && step.gradients_dtype == Dtype::F32;
    let stride = if plain { TILE } else { BLOCK };
    with_rule(step.family, &moment, ratio, |rule| {
        for first in (start..end).step_by(stride) {
            // SAFETY: the block lies within the entry.
            unsafe { update_block(step, &entry, rule, first, stride.min(end - first), scale, lanes) };
        }
    });
}

/// The memory of `count` float32.
///
/// # Safety
/// They are there, aligned, and nobody else uses them.
unsafe fn floats<'a>(address: u64, start: usize, count: usize) -> &'a mut [f32] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut((address as *mut f32).add(start), count) }
}

/// # Safety
/// The entry has elements `start..start + count`, a whole block or the last one, or more than that of float32 alone.
unsafe fn update_block(
    step: &Step,
    entry: &Entry,
    rule: &dyn Update,
    start: usize,
    count: usize,
    scale: f32,
    lanes: &mut Lanes,
) {
    let Lanes { p, g, s } = lanes;
    // SAFETY: the caller's promise; parameters, gradients and states have the entry's length.
    unsafe {
        let gradient = match step.gradients_dtype {
            Dtype::F32 => std::slice::from_raw_parts((entry.gradient as *const f32).add(start), count),
            dtype => {
                load(dtype, entry.gradient, start, count, g);
                &g[..count]
            }
        };
        let mut states = entry.states.iter().zip(s.iter_mut()).map(|(state, lanes)| match step.bits {
            _ if state.address == 0 => &mut [],
            Bits::ThirtyTwo => floats(state.address, start, count),
            Bits::Eight => {
                decode(state, start, count, lanes);
                &mut lanes[..count]
            }
        });
        let mut next = || states.next().unwrap_or_default();
        let states = [next(), next(), next()];
        if step.parameters == Dtype::F32 {
            rule.apply(scale, floats(entry.p, start, count), gradient, states);
        } else {
            load(step.parameters, entry.p, start, count, p);
            rule.apply(scale, &mut p[..count], gradient, states);
            if step.stochastic && step.parameters == Dtype::Bf16 {
                let element = entry.first.wrapping_add(start as u64);
                let place = Place { element, t: entry.t as u32, ordinal: entry.ordinal, seed: step.seed };
                store_stochastic(p, (entry.p as *mut Bf16).add(start), count, place);
            } else {
                store(step.parameters, p, entry.p, start, count);
            }
        }
        if step.bits == Bits::Eight {
            for (state, lanes) in entry.states.iter().zip(s).filter(|(state, _)| state.address != 0) {
                encode(state, start, count, lanes);
            }
        }
    }
}
