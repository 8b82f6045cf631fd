//! Many tokens: a tile of the weight is decoded once, stays in the cache, and is multiplied with all of them.
//!
//! A tile is [`ROWS`] rows by [`COLUMNS`] columns. Tokens lie side by side in panels of sixteen ([`super::pack::side_by_side`]), so
//! that one element of the weight times one vector of a panel gives products for sixteen tokens: a kernel keeps the sums of some rows
//! with some panels in registers while it goes through the columns. Sums of a tile are added to those of the tiles before.

use super::Product;
use super::few::multiply_add;
use super::pack::{self, CHUNK, Lift, NATURAL, PANEL};
#[cfg(target_arch = "x86_64")]
use super::{Path, avx512};
use crate::cpu::buffer::Buffer;
use crate::cpu::dequantize::{Tensor4, run_of_elements};
#[cfg(target_arch = "x86_64")]
use crate::cpu::element::Bf16;
use crate::cpu::element::{Element, F32};
use crate::cpu::path::multiversion;
use crate::cpu::pool;
use crate::cpu::table_lookup::Lookup;
use crate::{Dtype, Result};

/// Rows of a tile: a multiple of every kernel's.
pub const ROWS: usize = 48;

/// Columns of a tile, so that it stays in the second cache with its panels.
pub const COLUMNS: usize = 512;

/// From row to row of a tile: a power of two would put the rows on the same lines of the cache.
pub const STRIDE: usize = COLUMNS + 32;

/// Rows between the one that is decoded and the one whose codes are asked for.
const AHEAD: usize = 12;

/// Tokens that are done with before the weight is decoded again for the next ones.
pub const TOKENS: usize = 256;

/// Multiplies `kernel.rows` rows of a tile with neighbouring panels, over `depth` columns: `sums[row][token] += ...`.
///
/// `panels` are `stride` elements apart, rows of `sums` [`TOKENS`].
pub type Run<W> = unsafe fn(tile: *const W, panels: *const W, stride: usize, depth: usize, sums: *mut f32);

/// A kernel and how many rows it takes.
#[derive(Clone, Copy)]
pub struct Kernel<W> {
    pub rows: usize,
    pub run: Run<W>,
}

/// Decodes `depth` columns of a row of the weight, from `start` of the flattened weight on.
pub type Decode<W> = unsafe fn(weight: &Tensor4, start: usize, depth: usize, out: *mut W);

/// What a path multiplies tiles with.
struct Plan<'a, W> {
    decode: Decode<W>,
    /// `kernels[v]` takes `v + 1` panels.
    kernels: &'a [Kernel<W>],
    /// Columns added up one after the other: a sum's error grows with its length. So does that of the sum of chains, so short
    /// chains are added up by tiles first.
    chain: usize,
}

/// Keeps the error of float32 sums below that of ordinary products.
const CHAIN: usize = 32;

/// # Safety
/// The product's addresses hold what it says, and the processor runs its path.
pub unsafe fn multiply<T: Lookup>(product: &Product<T>, dtype: Dtype, threads: usize) -> Result<()> {
    // SAFETY: the caller's promise, handed on: each path gets the kernels that it runs.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if product.path.is_avx512() {
            let whole_blocks = product.k.is_multiple_of(product.weight.blocksize);
            let (bf16, f32) = (&avx512::TILES_BF16, &avx512::TILES_F32);
            return match (product.path == Path::Avx512Bf16 && dtype == Dtype::Bf16, whole_blocks) {
                (true, true) => {
                    let plan = Plan { decode: avx512::decode_bf16, kernels: bf16, chain: COLUMNS };
                    run::<T, Bf16, 2, 4>(product, &plan, threads)
                }
                (true, false) => {
                    run::<T, Bf16, 2, NATURAL>(product, &Plan { decode, kernels: bf16, chain: COLUMNS }, threads)
                }
                (false, true) => {
                    let plan = Plan { decode: avx512::decode_f32, kernels: f32, chain: CHAIN };
                    run::<T, F32, 1, 8>(product, &plan, threads)
                }
                (false, false) => {
                    run::<T, F32, 1, NATURAL>(product, &Plan { decode, kernels: f32, chain: CHAIN }, threads)
                }
            };
        }
        let _ = dtype;
        let kernel = match product.path {
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => Kernel { rows: 6, run: avx2 },
            _ => PORTABLE,
        };
        run::<T, F32, 1, NATURAL>(product, &Plan { decode, kernels: &[kernel], chain: CHAIN }, threads)
    }
}

/// `P` consecutive columns are multiplied together; columns of a chunk are in the order of `NIBBLES`, as `plan.decode` writes them.
unsafe fn run<T: Lookup, W: Lookup, const P: usize, const NIBBLES: usize>(
    product: &Product<T>,
    plan: &Plan<W>,
    threads: usize,
) -> Result<()> {
    let Product { n, k, m, .. } = *product;
    let stride = k.next_multiple_of(CHUNK) * PANEL;
    let mut packed = Buffer::new(m.min(TOKENS).div_ceil(PANEL) * stride);
    for first in (0..m).step_by(TOKENS) {
        let tokens = TOKENS.min(m - first);
        // SAFETY: the tokens exist.
        let lift = |token: usize| unsafe { Lift::of(product.x.add((first + token) * k), k) };
        let lifts: Vec<Lift> = (0..tokens).map(lift).collect();
        let panels = packed.as_mut_ptr() as usize;
        pool::run(tokens.div_ceil(PANEL), PANEL * k * 16, threads, |start, end| {
            for panel in start..end {
                let (token, out) = (panel * PANEL, (panels as *mut W).wrapping_add(panel * stride));
                let lifts = &lifts[token..tokens.min(token + PANEL)];
                // SAFETY: the tokens exist, and `packed` has a panel for every sixteen; each is written by one thread.
                unsafe {
                    pack::side_by_side::<T, W, P, NIBBLES>(product.x.add((first + token) * k), lifts, k, out);
                }
            }
        })?;
        let part = Part { product, packed: &packed, stride, plan, first, lifts: &lifts };
        let scratch = || (Buffer::new(ROWS * STRIDE), [Buffer::new(ROWS * TOKENS), Buffer::new(ROWS * TOKENS)]);
        pool::run_with(n.div_ceil(ROWS), ROWS * k * tokens / 4, threads, scratch, |(tile, sums), start, end| {
            // Whole chunks where columns are out of order, else whole steps of the kernel.
            let step = if NIBBLES == NATURAL { P } else { CHUNK };
            // SAFETY: the caller's promise; parts are different rows.
            unsafe { part.run(start, end, step, tile, sums) };
        })?;
    }
    Ok(())
}

/// The product of the weight with some of the tokens.
struct Part<'a, T, W> {
    product: &'a Product<'a, T>,
    packed: &'a Buffer<W>,
    stride: usize,
    plan: &'a Plan<'a, W>,
    first: usize,
    lifts: &'a [Lift],
}

impl<T: Lookup, W: Lookup> Part<'_, T, W> {
    /// Tiles of the rows `start * ROWS..end * ROWS`, whose columns are filled up to a multiple of `step`.
    unsafe fn run(&self, start: usize, end: usize, step: usize, tile: &mut Buffer<W>, sums: &mut [Buffer<f32>; 2]) {
        let [sums, of_tile] = sums;
        let Product { ref weight, n, k, .. } = *self.product;
        let panels = self.lifts.len().div_ceil(PANEL);
        for first in (start * ROWS..n.min(end * ROWS)).step_by(ROWS) {
            let rows = ROWS.min(n - first);
            sums.as_mut_slice().fill(0.0);
            for column in (0..k).step_by(COLUMNS) {
                let depth = COLUMNS.min(k - column);
                // SAFETY: the columns lie within the rows, the rows within the weight; the tile has room for them and for what is filled up.
                unsafe {
                    for row in 0..rows {
                        // Rows are too short here for the processor to see what comes next.
                        let (ahead, from) = match row + AHEAD {
                            ahead if ahead < rows => (ahead, column),
                            ahead => (ahead - rows, column + COLUMNS),
                        };
                        weight.prefetch((first + ahead) * k + from, depth);
                        let to = tile.as_mut_ptr().add(row * STRIDE);
                        (self.plan.decode)(weight, (first + row) * k + column, depth, to);
                    }
                    let depth = depth.next_multiple_of(step);
                    if self.plan.chain == COLUMNS {
                        self.multiply(tile, rows, column, depth, panels, sums);
                    } else {
                        self.multiply(tile, rows, column, depth, panels, of_tile);
                        move_into(of_tile.as_mut_slice(), sums.as_mut_slice(), panels * PANEL);
                    }
                }
            }
            // SAFETY: the rows are rows of the result.
            unsafe { finish(self.product, self.first, self.lifts, first, rows, sums.as_slice()) };
        }
    }

    /// A tile with all panels.
    unsafe fn multiply(
        &self,
        tile: &Buffer<W>,
        rows: usize,
        column: usize,
        depth: usize,
        panels: usize,
        sums: &mut Buffer<f32>,
    ) {
        let mut panel = 0;
        while panel < panels {
            // As even a split as there is: five panels are three and two, not four and one.
            let groups = (panels - panel).div_ceil(self.plan.kernels.len());
            let width = (panels - panel).div_ceil(groups);
            let kernel = self.plan.kernels[width - 1];
            // SAFETY: the panels and the columns exist; kernels' rows divide ROWS, so the last rows of a tile, which may be old ones,
            // are there too, and so is room for their sums.
            unsafe {
                let x = self.packed.as_ptr().add(panel * self.stride + column * PANEL);
                for row in (0..rows).step_by(kernel.rows) {
                    let to = sums.as_mut_ptr().add(row * TOKENS + panel * PANEL);
                    for start in (0..depth).step_by(self.plan.chain) {
                        let (tile, x) = (tile.as_ptr().add(row * STRIDE + start), x.add(start * PANEL));
                        (kernel.run)(tile, x, self.stride, self.plan.chain.min(depth - start), to);
                    }
                }
            }
            panel += width;
        }
    }
}

/// Columns in their natural order, and a zero for kernels that take two at a time.
#[inline(always)]
unsafe fn decode_body<T: Lookup>(weight: &Tensor4, start: usize, depth: usize, out: *mut T) {
    // SAFETY: the caller's promise, handed on; rows of a tile have room for more than the columns.
    unsafe {
        run_of_elements(weight, start, start + depth, out);
        out.add(depth).write(T::default());
    }
}

multiversion! {
    unsafe fn decode[T: Lookup][T](weight: &Tensor4, start: usize, depth: usize, out: *mut T) => decode_body
}

/// Adds the sums of a tile to those of the tiles before, and begins again at zero.
#[inline(always)]
unsafe fn move_into_body(of_tile: &mut [f32], sums: &mut [f32], tokens: usize) {
    for (of_tile, sums) in of_tile.chunks_exact_mut(TOKENS).zip(sums.chunks_exact_mut(TOKENS)) {
        for (of_tile, sum) in of_tile[..tokens].iter_mut().zip(&mut sums[..tokens]) {
            *sum += *of_tile;
            *of_tile = 0.0;
        }
    }
}

multiversion! {
    unsafe fn move_into[][](of_tile: &mut [f32], sums: &mut [f32], tokens: usize) => move_into_body
}

/// Adds the bias, rounds, and writes the rows' part of the result.
#[inline(always)]
unsafe fn finish_body<T: Element>(
    product: &Product<T>,
    first_token: usize,
    lifts: &[Lift],
    first_row: usize,
    rows: usize,
    sums: &[f32],
) {
    let mut rounded = [[T::default(); PANEL]; ROWS];
    for (panel, lifts) in lifts.chunks(PANEL).enumerate() {
        let mut back = [1.0; PANEL];
        back.iter_mut().zip(lifts).for_each(|(back, lift)| *back = lift.back);
        for (row, rounded) in rounded[..rows].iter_mut().enumerate() {
            // SAFETY: the row is one of the weight's.
            let bias = unsafe { product.bias(first_row + row) };
            let sums = &sums[row * TOKENS + panel * PANEL..][..PANEL];
            for i in 0..PANEL {
                rounded[i] = T::narrow(sums[i] * back[i] + bias);
            }
        }
        for token in 0..lifts.len() {
            let at = (first_token + panel * PANEL + token) * product.n + first_row;
            for (row, rounded) in rounded[..rows].iter().enumerate() {
                // SAFETY: the token and the row are those of an element of the result.
                unsafe { product.out.add(at + row).write_unaligned(rounded[token]) };
            }
        }
    }
}

multiversion! {
    unsafe fn finish[T: Element][T](
        product: &Product<T>, first_token: usize, lifts: &[Lift], first_row: usize, rows: usize, sums: &[f32],
    ) => finish_body
}

/// `R` rows with one panel.
#[inline(always)]
unsafe fn kernel<const R: usize, const FMA: bool>(tile: *const F32, panel: *const F32, depth: usize, sums: *mut f32) {
    let mut total = [[0.0f32; PANEL]; R];
    for column in 0..depth {
        // SAFETY: the caller's tile has R rows of `depth` columns, its panel as many columns.
        unsafe {
            let x = panel.add(column * PANEL).cast::<[f32; PANEL]>().read_unaligned();
            for (row, total) in total.iter_mut().enumerate() {
                let w = tile.add(row * STRIDE + column).read().widen();
                for i in 0..PANEL {
                    total[i] = multiply_add::<FMA>(x[i], w, total[i]);
                }
            }
        }
    }
    for (row, total) in total.iter().enumerate() {
        for (i, total) in total.iter().enumerate() {
            // SAFETY: the caller's sums have R rows of a panel.
            unsafe { *sums.add(row * TOKENS + i) += total };
        }
    }
}

/// As many rows as the registers hold: 64-bit Arm has 32 of four lanes, SSE2 half of them.
const PORTABLE: Kernel<F32> = if cfg!(target_arch = "aarch64") {
    Kernel { rows: 6, run: portable::<6, true> }
} else {
    Kernel { rows: 2, run: portable::<2, false> }
};

unsafe fn portable<const R: usize, const FMA: bool>(
    tile: *const F32,
    panels: *const F32,
    _: usize,
    depth: usize,
    sums: *mut f32,
) {
    // SAFETY: the caller's promise, handed on.
    unsafe { kernel::<R, FMA>(tile, panels, depth, sums) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(tile: *const F32, panels: *const F32, _: usize, depth: usize, sums: *mut f32) {
    // SAFETY: the caller's promise, handed on.
    unsafe { kernel::<6, true>(tile, panels, depth, sums) }
}
