//! Tokens in the order in which the kernels read them, once a call.

use crate::cpu::element::{Element, load};

/// A power of two that brings the products of a row of tokens away from the ends of float32's range, and its inverse.
///
/// The dot products of bfloat16 flush subnormal numbers to zero, and sums of unscaled codes could overflow where scaled ones
/// do not. Powers of two change no other bit of the result.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lift {
    /// What the row is multiplied by.
    pub by: f32,
    /// What the result is multiplied by.
    pub back: f32,
}

impl Lift {
    const NONE: Self = Self { by: 1.0, back: 1.0 };

    /// The lift of a row, by its largest finite magnitude.
    ///
    /// # Safety
    /// `row` holds `k` elements.
    pub unsafe fn of<T: Element>(row: *const T, k: usize) -> Self {
        let finite = |x: f32| {
            let magnitude = x.to_bits() & 0x7fff_ffff;
            if magnitude < 0x7f80_0000 { magnitude } else { 0 }
        };
        let mut lanes = [0u32; 16];
        let whole = k / 16 * 16;
        for i in (0..whole).step_by(16) {
            // SAFETY: `i + 16 <= k`.
            for (lane, x) in lanes.iter_mut().zip(unsafe { load::<T, 16>(row.add(i)) }) {
                *lane = finite(x).max(*lane);
            }
        }
        for i in whole..k {
            // SAFETY: `i < k`.
            lanes[0] = lanes[0].max(finite(unsafe { row.add(i).read_unaligned() }.widen()));
        }
        let largest = f32::from_bits(lanes.into_iter().fold(0, u32::max));
        let (up, down) = (f32::from_bits((127 + 60) << 23), f32::from_bits((127 - 60) << 23));
        if largest >= f32::from_bits((127 + 100) << 23) {
            Self { by: down, back: up }
        } else if largest != 0.0 && largest < f32::from_bits((127 - 90) << 23) {
            Self { by: up, back: down }
        } else {
            Self::NONE
        }
    }
}

/// Columns that are packed together.
pub const CHUNK: usize = 128;

/// The order of a chunk's columns as they lie in memory.
pub const NATURAL: usize = 1;

/// A chunk of a row times its lift, filled with zeros past its end.
///
/// With `NIBBLES` nibbles to a word of codes the columns come in the order in which shifts take nibbles from words: first elements of
/// the words, then second ones, and so on; in each pair of them the odd column comes first, since it has the low nibble.
#[inline(always)]
unsafe fn chunk<T: Element, W: Element, const NIBBLES: usize>(
    row: *const T,
    k: usize,
    first: usize,
    lift: Lift,
) -> [W; CHUNK] {
    let mut x = [0.0; CHUNK];
    if k - first >= CHUNK {
        // SAFETY: the chunk lies within the row.
        x = unsafe { load(row.add(first)) };
    } else {
        for (i, x) in x[..k - first].iter_mut().enumerate() {
            // SAFETY: `first + i < k`.
            *x = unsafe { row.add(first + i).read_unaligned() }.widen();
        }
    }
    let words = CHUNK / NIBBLES;
    std::array::from_fn(|i| {
        let column = if NIBBLES == NATURAL { i } else { i % words * NIBBLES + ((i / words) ^ 1) };
        W::narrow(x[column] * lift.by)
    })
}

/// A row, chunk by chunk, `stride` elements apart.
///
/// # Safety
/// `row` holds `k` elements, `out` has room for the chunks.
pub unsafe fn by_chunks<T: Element, W: Element, const NIBBLES: usize>(
    row: *const T,
    k: usize,
    lift: Lift,
    out: *mut W,
    stride: usize,
) {
    for first in (0..k).step_by(CHUNK) {
        // SAFETY: the caller's promise.
        unsafe {
            let to = out.add(first / CHUNK * stride).cast::<[W; CHUNK]>();
            to.write(chunk::<T, W, NIBBLES>(row, k, first, lift));
        }
    }
}

/// Tokens of a panel.
pub const PANEL: usize = 16;

/// Up to sixteen rows side by side: `out[k / P][token][k % P]`, `P` consecutive columns of a row together. Filled with zeros to
/// sixteen tokens and to whole chunks.
///
/// # Safety
/// `rows` holds a row of `k` elements for every lift, `out` has room for sixteen of `k` rounded up to whole chunks.
pub unsafe fn side_by_side<T: Element, W: Element, const P: usize, const NIBBLES: usize>(
    rows: *const T,
    lifts: &[Lift],
    k: usize,
    out: *mut W,
) {
    for first in (0..k).step_by(CHUNK) {
        for token in 0..PANEL {
            let x = match lifts.get(token) {
                // SAFETY: the token has a row.
                Some(&lift) => unsafe { chunk::<T, W, NIBBLES>(rows.add(token * k), k, first, lift) },
                None => [W::default(); CHUNK],
            };
            for i in (0..CHUNK).step_by(P) {
                // SAFETY: the index is below sixteen times the padded length.
                unsafe {
                    let to = out.add((first + i) * PANEL + token * P).cast::<[W; P]>();
                    to.write_unaligned(std::array::from_fn(|j| x[i + j]));
                }
            }
        }
    }
}
