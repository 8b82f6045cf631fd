//! Sums of products of int8, exact in int32.

use super::tiles::ROWS;
use crate::cpu::path::multiversion;

/// Rows of the weight that a kernel takes.
pub const GROUP: usize = 4;

/// The most tokens that a kernel takes.
pub const MOST_TOKENS: usize = 6;

/// Adds the products of some tokens, rows of `a` that are `stride` apart, with rows `b`, over `depth` columns:
/// `sums[token * ROWS + row] += ...`, modulo 2^32.
pub type Kernel = unsafe fn(a: *const i8, stride: usize, b: [*const i8; GROUP], depth: usize, sums: *mut i32);

/// The kernels of a processor.
pub struct Kernels {
    /// `by_tokens[t]` takes `t + 1` tokens.
    pub by_tokens: [Kernel; MOST_TOKENS],
    /// What kernels add to each element of `b`: a token's sums begin at minus so much times the sum of its elements.
    pub offset: i32,
}

impl Kernels {
    /// Those of this processor.
    pub fn chosen() -> &'static Self {
        &PORTABLE
    }
}

static PORTABLE: Kernels = Kernels {
    by_tokens: [portable::<1>, portable::<2>, portable::<3>, portable::<4>, portable::<5>, portable::<6>],
    offset: 0,
};

#[inline(always)]
unsafe fn portable_body(
    tokens: usize,
    a: *const i8,
    stride: usize,
    b: [*const i8; GROUP],
    depth: usize,
    sums: *mut i32,
) {
    for token in 0..tokens {
        for (row, b) in b.into_iter().enumerate() {
            // SAFETY: the caller's rows hold `depth` elements, its sums all of these.
            unsafe {
                let a = std::slice::from_raw_parts(a.add(token * stride), depth);
                let b = std::slice::from_raw_parts(b, depth);
                let sum: i32 = a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum();
                let to = sums.add(token * ROWS + row);
                *to = (*to).wrapping_add(sum);
            }
        }
    }
}

multiversion! {
    unsafe fn rows_of_dots[][](
        tokens: usize, a: *const i8, stride: usize, b: [*const i8; GROUP], depth: usize, sums: *mut i32,
    ) => portable_body
}

unsafe fn portable<const M: usize>(a: *const i8, stride: usize, b: [*const i8; GROUP], depth: usize, sums: *mut i32) {
    // SAFETY: the caller's promise, handed on.
    unsafe { rows_of_dots(M, a, stride, b, depth, sums) }
}
