//! From integer sums to the result: scales, outlier columns, bias, one rounding.

use super::tiles::{Block, ROWS};
use crate::cpu::element::{Element, F32};
use crate::cpu::path::multiversion;
use crate::int8::{Codes, INVERSE_127, INVERSE_16129, Output, Rows, Weight};

/// Outlier columns whose weights are gathered at a time.
const GATHERED: usize = 64;

/// What a product is finished with. `T` is the type of the tokens, the bias and the result.
pub struct Finish<T> {
    n: usize,
    k: usize,
    weight: *const i8,
    scales: *const F32,
    row_scales: *const F32,
    bias: *const T,
    out: *mut T,
    /// Columns with outliers.
    columns: Vec<usize>,
    /// `[token][column]`: what the codes leave over.
    left_over: Vec<f32>,
}

// SAFETY: the pointers are to memory that the caller lends for the length of the call; blocks are different parts of the result.
unsafe impl<T> Sync for Finish<T> {}

/// A thread's memory.
#[derive(Default)]
pub struct Scratch {
    /// `[column][row]`: codes of outlier columns of the weight.
    codes: Vec<[i8; ROWS]>,
    /// The same, scaled.
    weights: Vec<[f32; ROWS]>,
    /// `[token][row]`: their products.
    products: Vec<[f32; ROWS]>,
}

impl<T: Element> Finish<T> {
    /// # Safety
    /// The addresses hold what the fields say.
    pub unsafe fn new(rows: Rows, codes: Codes, weight: Weight, output: Output) -> Self {
        let k = weight.k;
        let mut columns = Vec::new();
        if codes.mask != 0 {
            for word in 0..k.div_ceil(32) {
                // SAFETY: the mask has a bit for every column.
                let mut bits = unsafe { (codes.mask as *const u32).add(word).read_unaligned() };
                while bits != 0 {
                    columns.push(word * 32 + bits.trailing_zeros() as usize);
                    bits &= bits - 1;
                }
            }
            columns.retain(|&column| column < k);
        }
        let row_scales = codes.scales as *const F32;
        let mut left_over = Vec::with_capacity(rows.m * columns.len());
        for row in 0..if columns.is_empty() { 0 } else { rows.m } {
            // SAFETY: the rows have these elements.
            unsafe {
                let step = row_scales.add(row).read_unaligned().widen() * INVERSE_127;
                left_over.extend(columns.iter().map(|&column| {
                    let code = (codes.codes as *const i8).add(row * k + column).read();
                    (rows.x as *const T).add(row * k + column).read_unaligned().widen() - f32::from(code) * step
                }));
            }
        }
        Self {
            n: weight.n,
            k,
            weight: weight.codes as *const i8,
            scales: weight.scales as *const F32,
            row_scales,
            bias: output.bias as *const T,
            out: output.out as *mut T,
            columns,
            left_over,
        }
    }

    /// Writes a block.
    pub fn run(&self, scratch: &mut Scratch, block: Block, sums: &[i32]) {
        // SAFETY: the block lies within the result.
        unsafe { finish(self, scratch, block, sums) }
    }

    /// A float32 for each row of a block, 0 past the last one.
    ///
    /// # Safety
    /// `from` is null or holds `n` elements.
    #[inline(always)]
    unsafe fn of_rows<E: Element>(&self, from: *const E, block: Block) -> [f32; ROWS] {
        let mut values = [0.0; ROWS];
        if !from.is_null() {
            for (i, value) in values[..block.rows].iter_mut().enumerate() {
                // SAFETY: the block's rows are below `n`.
                *value = unsafe { from.add(block.first_row + i).read_unaligned() }.widen();
            }
        }
        values
    }

    /// Products of the outlier columns, one after the other.
    #[inline(always)]
    unsafe fn add_outliers(&self, scratch: &mut Scratch, block: Block, scales: &[f32; ROWS]) {
        let Scratch { codes, weights, products } = scratch;
        products.clear();
        products.resize(block.tokens, [0.0; ROWS]);
        for start in (0..self.columns.len()).step_by(GATHERED) {
            let columns = &self.columns[start..self.columns.len().min(start + GATHERED)];
            codes.resize(columns.len(), [0; ROWS]);
            // Row by row: elements of a column lie a row apart, often a power of two, on the same few lines of the cache.
            for row in 0..block.rows {
                let weight = self.weight.wrapping_add((block.first_row + row) * self.k);
                for (codes, &column) in codes.iter_mut().zip(columns) {
                    // SAFETY: the block's rows have this column.
                    codes[row] = unsafe { weight.add(column).read() };
                }
            }
            weights.clear();
            weights.extend(codes.iter().map(|codes| {
                let mut weights = [0.0; ROWS];
                for i in 0..ROWS {
                    weights[i] = f32::from(codes[i]) * scales[i] * INVERSE_127;
                }
                weights
            }));
            // Four tokens at a time, whose sums need not wait for each other.
            for (group, products) in products.chunks_mut(FOUR).enumerate() {
                let first = (block.first_token + group * FOUR) * self.columns.len() + start;
                // SAFETY: the tokens of the group have these columns.
                unsafe {
                    let x = self.left_over.as_ptr().add(first);
                    match products.as_chunks_mut::<FOUR>() {
                        ([four], []) => add_products(four, x, self.columns.len(), weights),
                        (_, some) => some.iter_mut().enumerate().for_each(|(token, one)| {
                            let x = x.add(token * self.columns.len());
                            add_products(std::array::from_mut(one), x, self.columns.len(), weights);
                        }),
                    }
                }
            }
        }
    }
}

/// Tokens at a time.
const FOUR: usize = 4;

/// Rows at a time: a vector of the widest.
const LANES: usize = 16;

/// Adds products of some tokens, `stride` apart, with columns of weights, column by column.
///
/// # Safety
/// `x` holds an element for each token and column.
#[inline(always)]
unsafe fn add_products<const P: usize>(
    products: &mut [[f32; ROWS]; P],
    x: *const f32,
    stride: usize,
    weights: &[[f32; ROWS]],
) {
    for first in (0..ROWS).step_by(LANES) {
        let mut sums = [[0.0f32; LANES]; P];
        for (column, weights) in weights.iter().enumerate() {
            let mut lanes = [0.0f32; LANES];
            lanes.copy_from_slice(&weights[first..first + LANES]);
            for (token, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                let x = unsafe { x.add(token * stride + column).read() };
                for i in 0..LANES {
                    sums[i] += x * lanes[i];
                }
            }
        }
        for (sums, products) in sums.iter().zip(products.iter_mut()) {
            for i in 0..LANES {
                products[first + i] += sums[i];
            }
        }
    }
}

#[inline(always)]
unsafe fn finish_body<T: Element>(finish: &Finish<T>, scratch: &mut Scratch, block: Block, sums: &[i32]) {
    // SAFETY: the block lies within the result; the caller promised the memory.
    unsafe {
        let (scales, bias) = (finish.of_rows(finish.scales, block), finish.of_rows(finish.bias, block));
        if !finish.columns.is_empty() {
            finish.add_outliers(scratch, block, &scales);
        }
        for (token, sums) in sums.chunks_exact(ROWS).take(block.tokens).enumerate() {
            let row_scale = finish.row_scales.add(block.first_token + token).read_unaligned().widen();
            let mut rounded = [T::default(); ROWS];
            let scaled = |i: usize| sums[i] as f32 * row_scale * scales[i] * INVERSE_16129;
            if finish.columns.is_empty() {
                for i in 0..ROWS {
                    rounded[i] = T::narrow(scaled(i) + bias[i]);
                }
            } else {
                let products = &scratch.products[token];
                for i in 0..ROWS {
                    rounded[i] = T::narrow(scaled(i) + products[i] + bias[i]);
                }
            }
            let at = (block.first_token + token) * finish.n + block.first_row;
            let bytes = block.rows * size_of::<T>();
            std::ptr::copy_nonoverlapping(rounded.as_ptr().cast::<u8>(), finish.out.add(at).cast::<u8>(), bytes);
        }
    }
}

multiversion! {
    unsafe fn finish[T: Element][T](
        finish: &Finish<T>, scratch: &mut Scratch, block: Block, sums: &[i32],
    ) => finish_body
}
