//! Few tokens: each row of the weight is read once and multiplied with all of them.

use super::Product;
use super::pack::{self, CHUNK, Lift, NATURAL};
#[cfg(target_arch = "x86_64")]
use super::{Path, avx512};
use crate::cpu::buffer::Buffer;
use crate::cpu::dequantize::{Tensor4, run_of_elements};
#[cfg(target_arch = "x86_64")]
use crate::cpu::element::Bf16;
use crate::cpu::element::{Element, F32, load};
use crate::cpu::pool;
use crate::{Dtype, Result};

/// The most tokens that a kernel takes at a time: more are done in groups.
pub const MOST_TOKENS: usize = 8;

/// The most rows that a kernel is given at a time.
pub const MOST_ROWS: usize = 16;

/// What a kernel reads: the weight, and tokens `x` packed in the kernel's order.
pub struct Operands<'a, W> {
    pub weight: &'a Tensor4<'a>,
    pub k: usize,
    pub x: *const W,
    pub m: usize,
}

// SAFETY: `x` points to memory of ours that nobody writes while threads read it.
unsafe impl<W> Sync for Operands<'_, W> {}

/// Products of some rows of the weight with all tokens, to `sums[row][token]`.
type Kernel<W> = unsafe fn(&Operands<W>, first: usize, sums: &mut [[f32; MOST_TOKENS]], scratch: &mut Vec<f32>);

/// # Safety
/// The product's addresses hold what it says, and the processor runs its path.
pub unsafe fn multiply<T: Element>(product: &Product<T>, dtype: Dtype, threads: usize) -> Result<()> {
    // SAFETY: the caller's promise, handed on: each path gets a kernel that it runs, and tokens in the kernel's order.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if product.path.is_avx512() && product.k.is_multiple_of(product.weight.blocksize) {
            if product.path == Path::Avx512Bf16 && dtype == Dtype::Bf16 {
                return run::<T, Bf16, 4>(product, avx512::few_bf16, threads);
            }
            return run::<T, F32, 8>(product, avx512::few_f32, threads);
        }
        let _ = dtype;
        let kernel = match product.path {
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Bf16 | Path::Avx512 => x86::avx512,
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => x86::avx2,
            _ => rows_of_dots::<{ cfg!(target_arch = "aarch64") }>,
        };
        run::<T, F32, NATURAL>(product, kernel, threads)
    }
}

/// Runs a kernel over all rows of the weight. Tokens are packed by chunks: all tokens of a group have their first chunk, then all
/// their second one, and so on, in the order of `NIBBLES`.
unsafe fn run<T: Element, W: Element, const NIBBLES: usize>(
    product: &Product<T>,
    kernel: Kernel<W>,
    threads: usize,
) -> Result<()> {
    let Product { ref weight, n, k, m, .. } = *product;
    let stride = k.next_multiple_of(CHUNK);
    let mut packed: Buffer<W> = Buffer::new(m * stride);
    let mut lifts = Vec::with_capacity(m);
    // As even a split as there is: nine tokens are five and four, not eight and one.
    let count = m.div_ceil(MOST_TOKENS);
    let mut groups = Vec::with_capacity(count);
    for group in 0..count {
        let (first, end) = (m * group / count, m * (group + 1) / count);
        let x = packed.as_mut_ptr().wrapping_add(first * stride);
        for token in first..end {
            // SAFETY: the token has a row of `k` elements, its group room for all of its chunks.
            unsafe {
                let row = product.x.add(token * k);
                let lift = Lift::of(row, k);
                pack::by_chunks::<T, W, NIBBLES>(row, k, lift, x.add((token - first) * CHUNK), (end - first) * CHUNK);
                lifts.push(lift);
            }
        }
        groups.push((first, Operands { weight, k, x, m: end - first }));
    }
    pool::run_with(n, k * count / 2, threads, Vec::new, |scratch, start, end| {
        let mut sums = [[0.0; MOST_TOKENS]; MOST_ROWS];
        for row in (start..end).step_by(MOST_ROWS) {
            let sums = &mut sums[..MOST_ROWS.min(end - row)];
            for (first, operands) in &groups {
                // SAFETY: the rows are below `n`, the tokens below `m`, and so are the elements of the result that they give.
                unsafe {
                    kernel(operands, row, sums, scratch);
                    for (row, sums) in (row..).zip(&*sums) {
                        let bias = product.bias(row);
                        for (token, sum) in (*first..).zip(&sums[..operands.m]) {
                            let y = T::narrow(sum * lifts[token].back + bias);
                            product.out.add(token * n + row).write_unaligned(y);
                        }
                    }
                }
            }
        }
    })
}

/// Elements decoded at a time: they stay in the first cache.
const RUN: usize = 512;

/// Running sums of a dot product, added up at its end: two groups of sixteen lanes.
type Lanes = [[f32; 16]; 2];

/// Decodes a row to float32, run by run, and multiplies it with every token. Takes any `K` and any block size.
#[inline(always)]
unsafe fn rows_of_dots<const FMA: bool>(
    operands: &Operands<F32>,
    first: usize,
    sums: &mut [[f32; MOST_TOKENS]],
    _: &mut Vec<f32>,
) {
    let Operands { weight, k, x, m, .. } = *operands;
    let mut decoded = [F32::default(); RUN];
    for (row, sums) in (first..).zip(sums) {
        let mut lanes = [Lanes::default(); MOST_TOKENS];
        for start in (0..k).step_by(RUN) {
            let count = RUN.min(k - start);
            // SAFETY: the run lies within the row, the row within the weight; each token has `k` elements.
            unsafe {
                run_of_elements(weight, row * k + start, row * k + start + count, decoded.as_mut_ptr());
                for at in (0..count).step_by(CHUNK) {
                    for (token, lanes) in lanes[..m].iter_mut().enumerate() {
                        let x = x.add(((start + at) / CHUNK * m + token) * CHUNK);
                        *lanes = dot::<FMA>(decoded.as_ptr().add(at), x, CHUNK.min(count - at), *lanes);
                    }
                }
            }
        }
        for (sum, lanes) in sums.iter_mut().zip(lanes) {
            *sum = sum_of(lanes);
        }
    }
}

/// Adds the products of `count` pairs to running sums.
///
/// # Safety
/// Both hold `count` elements.
#[inline(always)]
unsafe fn dot<const FMA: bool>(a: *const F32, b: *const F32, count: usize, mut lanes: Lanes) -> Lanes {
    let whole = count / 32 * 32;
    for i in (0..whole).step_by(32) {
        for (group, lanes) in lanes.iter_mut().enumerate() {
            // SAFETY: `i + 32 <= count`.
            let (a, b): ([f32; 16], [f32; 16]) = unsafe { (load(a.add(i + 16 * group)), load(b.add(i + 16 * group))) };
            for j in 0..16 {
                lanes[j] = multiply_add::<FMA>(a[j], b[j], lanes[j]);
            }
        }
    }
    for i in whole..count {
        let lane = &mut lanes[i % 32 / 16][i % 16];
        // SAFETY: `i < count`.
        *lane = multiply_add::<FMA>(unsafe { *a.add(i) }.widen(), unsafe { *b.add(i) }.widen(), *lane);
    }
    lanes
}

/// `a * b + c`, rounded once where the processor does that in one instruction.
#[inline(always)]
pub fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// The sum, halving the lanes.
#[inline(always)]
fn sum_of([mut lanes, others]: Lanes) -> f32 {
    for i in 0..16 {
        lanes[i] += others[i];
    }
    let mut half = 8;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{F32, MOST_TOKENS, Operands, rows_of_dots};

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub unsafe fn avx512(
        operands: &Operands<F32>,
        first: usize,
        sums: &mut [[f32; MOST_TOKENS]],
        scratch: &mut Vec<f32>,
    ) {
        // SAFETY: the caller's promise, handed on.
        unsafe { rows_of_dots::<true>(operands, first, sums, scratch) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(
        operands: &Operands<F32>,
        first: usize,
        sums: &mut [[f32; MOST_TOKENS]],
        scratch: &mut Vec<f32>,
    ) {
        // SAFETY: the caller's promise, handed on.
        unsafe { rows_of_dots::<true>(operands, first, sums, scratch) }
    }
}
