//! Tokens in the order in which the kernels read them, once a call.

use std::marker::PhantomData;

use crate::cpu::element::{Element, load};

/// A line of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Zeros that begin on a line of the cache, so that no vector lies across two. `W` is plain bits.
pub struct Buffer<W> {
    lines: Vec<Line>,
    len: usize,
    of: PhantomData<W>,
}

impl<W: Copy + Default> Buffer<W> {
    pub fn new(len: usize) -> Self {
        Self { lines: vec![Line([0; 64]); (len * size_of::<W>()).div_ceil(64)], len, of: PhantomData }
    }
    pub fn as_ptr(&self) -> *const W {
        self.lines.as_ptr().cast()
    }
    pub fn as_mut_ptr(&mut self) -> *mut W {
        self.lines.as_mut_ptr().cast()
    }
    pub fn as_slice(&self) -> &[W] {
        // SAFETY: `new` made room for `len` elements and filled it.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }
    pub fn as_mut_slice(&mut self) -> &mut [W] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.len) }
    }
}

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

/// Elements of a row that are packed as one chunk by [`by_nibbles`].
pub const CHUNK: usize = 128;

/// A row in the order in which shifts take nibbles from words of codes: with `P` nibbles a word, `CHUNK / P` first elements of the
/// words, then the second ones, and so on; in each pair of them the odd element comes first, since it has the low nibble.
/// Filled with zeros to whole chunks, which are `stride` elements apart.
///
/// # Safety
/// `row` holds `k` elements, `out` has room for the chunks.
pub unsafe fn by_nibbles<T: Element, W: Element, const P: usize>(
    row: *const T,
    k: usize,
    lift: Lift,
    out: *mut W,
    stride: usize,
) {
    let whole = k / CHUNK * CHUNK;
    let one = |chunk: [f32; CHUNK], out: *mut W| {
        let words = CHUNK / P;
        for nibble in 0..P {
            for word in 0..words {
                let x = chunk[P * word + (nibble ^ 1)];
                // SAFETY: the index is below CHUNK.
                unsafe { out.add(nibble * words + word).write(W::narrow(x * lift.by)) };
            }
        }
    };
    for i in (0..whole).step_by(CHUNK) {
        // SAFETY: `i + CHUNK <= k`.
        unsafe { one(load(row.add(i)), out.add(i / CHUNK * stride)) };
    }
    if whole < k {
        let mut rest = [0.0; CHUNK];
        for (i, x) in rest[..k - whole].iter_mut().enumerate() {
            // SAFETY: `whole + i < k`.
            *x = unsafe { row.add(whole + i).read_unaligned() }.widen();
        }
        // SAFETY: `out` has room for a whole last chunk.
        unsafe { one(rest, out.add(whole / CHUNK * stride)) };
    }
}

/// Tokens of a panel.
pub const PANEL: usize = 16;

/// Up to sixteen rows side by side: `out[k / P][token][k % P]`, `P` consecutive elements of a row together. Filled with zeros
/// to sixteen tokens and to a multiple of `P` columns.
///
/// # Safety
/// `rows` holds `tokens` rows of `k` elements, `out` has room for sixteen of `k` rounded up to a multiple of `P`.
pub unsafe fn side_by_side<T: Element, W: Element, const P: usize>(
    rows: *const T,
    tokens: usize,
    k: usize,
    lifts: &[Lift],
    out: *mut W,
) {
    /// Columns at a time, so that a piece of `out` stays in the cache while the tokens take turns.
    const COLUMNS: usize = 64;
    let padded = k.next_multiple_of(P);
    for first in (0..padded).step_by(COLUMNS) {
        for token in 0..PANEL {
            for i in first..padded.min(first + COLUMNS) {
                let x = if token < tokens && i < k {
                    // SAFETY: the token and the column exist.
                    unsafe { rows.add(token * k + i).read_unaligned() }.widen() * lifts[token].by
                } else {
                    0.0
                };
                // SAFETY: the index is below sixteen times the padded length.
                unsafe { out.add((i / P * PANEL + token) * P + i % P).write(W::narrow(x)) };
            }
        }
    }
}
