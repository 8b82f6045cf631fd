//! The loop over blocks of the result.
//!
//! A block is up to [`ROWS`] rows of the weight times up to [`TOKENS`] tokens. [`DEPTH`] columns at a time, so that the weight's part stays in
//! the second cache while the tokens go by, groups of rows and of tokens are multiplied in registers. Nothing is packed: both
//! matrices lie along the columns, and so do the vectors.

use super::kernels::{GROUP, Kernels, MOST_TOKENS};
use crate::Result;
use crate::cpu::buffer::Buffer;
use crate::cpu::path::multiversion;
use crate::cpu::pool;

/// The most rows of a block, a multiple of a kernel's, and from token to token of its sums.
pub const ROWS: usize = 64;

/// Tokens of a block.
pub const TOKENS: usize = 256;

/// Columns at a time.
const DEPTH: usize = 2048;

/// `a` of `m` x `k` and `b` of `n` x `k`.
pub struct Factors {
    pub a: *const i8,
    pub m: usize,
    pub b: *const i8,
    pub n: usize,
    pub k: usize,
}

// SAFETY: the pointers are to memory that the caller lends for the length of the call and that nobody writes.
unsafe impl Sync for Factors {}

/// A block of the result.
#[derive(Debug, Clone, Copy)]
pub struct Block {
    pub first_token: usize,
    pub tokens: usize,
    pub first_row: usize,
    pub rows: usize,
}

/// Calls `finish` with each block and its sums, `sums[token * ROWS + row]`; `S` is a thread's own memory.
///
/// # Safety
/// The addresses hold what the fields say.
pub unsafe fn multiply<S: Default>(
    factors: &Factors,
    threads: usize,
    finish: impl Fn(&mut S, Block, &[i32]) + Sync,
) -> Result<()> {
    let Factors { a, m, n, k, .. } = *factors;
    let kernels = Kernels::chosen();
    // Many threads share few rows by smaller blocks.
    let most_rows = if n / ROWS >= threads.saturating_mul(4) { ROWS } else { ROWS / 4 };
    let starts: Vec<i32> = (0..m)
        // SAFETY: the tokens have these elements.
        .map(|token| unsafe { if kernels.offset == 0 { 0 } else { -kernels.offset * sum_of(a.add(token * k), k) } })
        .collect();
    let scratch = || (Buffer::new(m.min(TOKENS) * ROWS), S::default());
    // A row is read once; sums of many tokens take longer than that.
    let bytes = most_rows * (k + m * k / 4 + 64);
    pool::run_with(n.div_ceil(most_rows), bytes, threads, scratch, |(sums, own), first, last| {
        for first_row in (first * most_rows..n.min(last * most_rows)).step_by(most_rows) {
            let rows = most_rows.min(n - first_row);
            for first_token in (0..m).step_by(TOKENS) {
                let tokens = TOKENS.min(m - first_token);
                let block = Block { first_token, tokens, first_row, rows };
                let sums = &mut sums.as_mut_slice()[..tokens * ROWS];
                for (sums, &start) in sums.chunks_exact_mut(ROWS).zip(&starts[first_token..]) {
                    sums.fill(start);
                }
                // SAFETY: the block lies within the matrices.
                unsafe { add_products(factors, kernels, block, sums) };
                finish(own, block, sums);
            }
        }
    })
}

#[inline(always)]
unsafe fn sum_body(x: *const i8, count: usize, sum: &mut i32) {
    // SAFETY: the caller's row holds `count` elements.
    *sum = unsafe { std::slice::from_raw_parts(x, count) }.iter().map(|&x| i32::from(x)).sum();
}

multiversion! {
    unsafe fn run_sum[][](x: *const i8, count: usize, sum: &mut i32) => sum_body
}

/// # Safety
/// `x` holds `count` elements.
unsafe fn sum_of(x: *const i8, count: usize) -> i32 {
    let mut sum = 0;
    // SAFETY: the caller's promise, handed on.
    unsafe { run_sum(x, count, &mut sum) };
    sum
}

/// # Safety
/// The block lies within the matrices; `sums` has room for its tokens.
unsafe fn add_products(factors: &Factors, kernels: &Kernels, block: Block, sums: &mut [i32]) {
    let Factors { a, b, k, .. } = *factors;
    let groups = block.tokens.div_ceil(MOST_TOKENS);
    // One group goes through whole rows, as they lie in memory.
    let most = if groups == 1 { k } else { DEPTH };
    for column in (0..k).step_by(most.max(1)) {
        let depth = most.min(k - column);
        for group in 0..groups {
            // As even a split as there is: seven tokens are four and three, not six and one.
            let (first, end) = (block.tokens * group / groups, block.tokens * (group + 1) / groups);
            let kernel = kernels.by_tokens[end - first - 1];
            for row in (0..block.rows).step_by(GROUP) {
                // SAFETY: rows past the last one are the last one again; their sums, for which there is room, are nobody's.
                unsafe {
                    let b: [*const i8; GROUP] =
                        std::array::from_fn(|i| b.add((block.first_row + (row + i).min(block.rows - 1)) * k + column));
                    let to = sums.as_mut_ptr().add(first * ROWS + row);
                    kernel(a.add((block.first_token + first) * k + column), k, b, depth, to);
                }
            }
        }
    }
}
