//! Blocks of optimizer states, parameters and gradients: to float32 side by side, and back.

use super::element::{Bf16, Element, F32, LANES, for_dtype, for_runs};
use super::optim_table::State;
use super::path::multiversion;
use super::philox::{Place, halves};
use super::{dequantize, quantize};
use crate::Dtype;
use crate::optim::BLOCK;

/// A block as float32: parameter, gradient, states. One a thread, for what does not lie in memory as float32.
#[repr(C, align(64))]
pub struct Lanes {
    pub p: [f32; BLOCK],
    pub g: [f32; BLOCK],
    pub s: [[f32; BLOCK]; 3],
}

impl Lanes {
    pub fn new() -> Box<Self> {
        Box::new(Self { p: [0.0; BLOCK], g: [0.0; BLOCK], s: [[0.0; BLOCK]; 3] })
    }
}

#[inline(always)]
unsafe fn widen_block<T: Element>(x: *const T, count: usize, out: &mut [f32; BLOCK]) {
    let mut padded = [T::default(); BLOCK];
    let whole = if count == BLOCK {
        x.cast::<[T; BLOCK]>()
    } else {
        // SAFETY: `count` of 256 elements; an array of plain bits may be written bytewise.
        unsafe {
            std::ptr::copy_nonoverlapping(x.cast::<u8>(), padded.as_mut_ptr().cast::<u8>(), count * size_of::<T>())
        };
        &raw const padded
    };
    for (i, out) in out.iter_mut().enumerate() {
        // SAFETY: there are 256 elements, the caller's or the padded copy of them.
        *out = unsafe { whole.cast::<T>().add(i).read_unaligned() }.widen();
    }
}

multiversion! {
    unsafe fn run_widen[T: Element][T](x: *const T, count: usize, out: &mut [f32; BLOCK]) => widen_block
}

/// Reads `count` elements; the rest of the block becomes 0.
///
/// # Safety
/// `x` holds `count` elements, at most 256.
pub unsafe fn load(dtype: Dtype, x: u64, start: usize, count: usize, out: &mut [f32; BLOCK]) {
    // SAFETY: the caller's promise; `T` is the dtype's type.
    unsafe { for_dtype!(dtype, T => run_widen((x as *const T).add(start), count, out)) }
}

#[inline(always)]
unsafe fn narrow_block<T: Element>(values: &[f32; BLOCK], out: *mut T, count: usize) {
    // SAFETY: the caller has room for `count` elements; `F32` is the bits of a float32.
    unsafe {
        for_runs(
            values.as_ptr().cast::<F32>(),
            count,
            |i, values| out.add(i).cast::<[T; LANES]>().write_unaligned(values.map(T::narrow)),
            |i, values, length| {
                for (k, value) in values.iter().enumerate().take(length) {
                    out.add(i + k).write_unaligned(T::narrow(*value));
                }
            },
        );
    }
}

multiversion! {
    unsafe fn run_narrow[T: Element][T](values: &[f32; BLOCK], out: *mut T, count: usize) => narrow_block
}

/// Rounds and writes the first `count` values.
///
/// # Safety
/// `out` has room for `start + count` elements; `count` is at most 256.
pub unsafe fn store(dtype: Dtype, values: &[f32; BLOCK], out: u64, start: usize, count: usize) {
    // SAFETY: the caller's promise; `T` is the dtype's type.
    unsafe { for_dtype!(dtype, T => run_narrow(values, (out as *mut T).add(start), count)) }
}

/// Adds sixteen random bits below a bfloat16's last: the chance of either neighbour is how near it is.
#[inline(always)]
fn narrow_stochastic(value: f32, random: u32) -> Bf16 {
    let up = (value.to_bits().wrapping_add(random) >> 16) as u16;
    if value.is_finite() { Bf16(up) } else { Bf16::narrow(value) }
}

#[inline(always)]
unsafe fn stochastic_block(values: &[f32; BLOCK], out: *mut Bf16, count: usize, place: Place) {
    let random = halves(place);
    let mut rounded = [Bf16::default(); BLOCK];
    for i in 0..BLOCK {
        rounded[i] = narrow_stochastic(values[i], random[i]);
    }
    // SAFETY: the caller has room for `count` elements, at most 256.
    unsafe {
        std::ptr::copy_nonoverlapping(rounded.as_ptr().cast::<u8>(), out.cast::<u8>(), count * size_of::<Bf16>())
    };
}

multiversion! {
    /// Rounds stochastically to bfloat16 and writes the first `count` values.
    ///
    /// # Safety
    /// `out` has room for `count` elements, at most 256.
    pub unsafe fn store_stochastic[][](values: &[f32; BLOCK], out: *mut Bf16, count: usize, place: Place) => stochastic_block
}

/// Decodes `count` elements of an 8-bit state; the rest of the block becomes 0.
///
/// # Safety
/// The state has `start + count` elements; `start` is a multiple of 256 and `count` at most 256.
pub unsafe fn decode(state: &State, start: usize, count: usize, out: &mut [f32; BLOCK]) {
    let (codes, absmax) = at_block(state, start);
    let values = if state.signed { &dequantize::DYNAMIC } else { &dequantize::DYNAMIC_UNSIGNED };
    // SAFETY: the caller's promise.
    unsafe { dequantize::run_8bit(codes, values, absmax, out.as_mut_ptr().cast::<F32>(), count, BLOCK) };
    out[count..].fill(0.0);
}

/// Encodes the first `count` values.
///
/// # Safety
/// As of [`decode`].
pub unsafe fn encode(state: &State, start: usize, count: usize, values: &[f32; BLOCK]) {
    let (codes, absmax) = at_block(state, start);
    let code = if state.signed { &quantize::DYNAMIC } else { &quantize::DYNAMIC_UNSIGNED };
    // SAFETY: the caller's promise.
    unsafe { quantize::run_8bit(values.as_ptr().cast::<F32>(), count, BLOCK, code, codes, absmax) };
}

/// Codes and scale of the block that begins at `start`.
fn at_block(state: &State, start: usize) -> (*mut u8, *mut f32) {
    let codes = (state.address as *mut u8).wrapping_add(start);
    (codes, (state.absmax as *mut f32).wrapping_add(start / BLOCK))
}
