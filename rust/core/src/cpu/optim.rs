//! Optimizer steps on this machine's processor: block by block, everything between reading and writing in the nearest cache.

use super::element::Bf16;
use super::optim_block::{Lanes, load, load_states, store, store_states, store_stochastic};
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
    with_rule(step.family, &moment, ratio, |rule| {
        for block in (start..end).step_by(BLOCK) {
            // SAFETY: the block lies within the entry.
            unsafe { update_block(step, &entry, rule, block, BLOCK.min(end - block), scale, lanes) };
        }
    });
}

/// # Safety
/// The entry has elements `start..start + count`.
unsafe fn update_block(
    step: &Step,
    entry: &Entry,
    rule: &dyn Update,
    start: usize,
    count: usize,
    scale: f32,
    lanes: &mut Lanes,
) {
    // SAFETY: the caller's promise; parameters, gradients and states have the entry's length.
    unsafe {
        load(step.parameters, entry.p, start, count, 1.0, &mut lanes.p);
        load(step.gradients_dtype, entry.gradient, start, count, scale, &mut lanes.g);
        load_states(step.bits, entry, start, count, lanes);
        rule.apply(lanes);
        if step.stochastic && step.parameters == Dtype::Bf16 {
            let element = entry.first.wrapping_add(start as u64);
            let place = Place { element, t: entry.t as u32, ordinal: entry.ordinal, seed: step.seed };
            store_stochastic(&lanes.p, (entry.p as *mut Bf16).add(start), count, place);
        } else {
            store(step.parameters, &lanes.p, entry.p, start, count);
        }
        store_states(step.bits, entry, start, count, lanes);
    }
}
