//! Few tokens: each row of the weight is read once and multiplied with all of them.

#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::pack::{self, Buffer, CHUNK, Lift};
use super::{Path, Product};
use crate::cpu::dequantize::{Tensor4, run_of_elements};
use crate::cpu::element::{Bf16, Element, F32};
use crate::cpu::pool;
use crate::{Dtype, Result};

/// The most tokens that this method takes.
pub const MOST_TOKENS: usize = 8;

/// The most rows that a kernel is given at a time.
pub const MOST_ROWS: usize = 16;

/// What a kernel reads: tokens `x`, already in its order, `stride` elements apart.
pub struct Operands<'a, W> {
    pub weight: &'a Tensor4<'a>,
    pub k: usize,
    pub x: *const W,
    pub stride: usize,
    pub m: usize,
}

// SAFETY: `x` points to memory of ours that nobody writes while threads read it.
unsafe impl<W> Sync for Operands<'_, W> {}

/// Products of some rows of the weight with all tokens, to `sums[row][token]`.
type Kernel<W> = unsafe fn(&Operands<W>, first: usize, sums: &mut [[f32; MOST_TOKENS]], scratch: &mut Vec<f32>);

/// # Safety
/// The product's addresses hold what it says, and the processor runs its path.
pub unsafe fn multiply<T: Element>(product: &Product<T>, dtype: Dtype, threads: usize) -> Result<()> {
    let Product { k, x, m, path, .. } = *product;
    // SAFETY: the tokens are `m` rows of `k` elements.
    let lifts: Vec<Lift> = (0..m).map(|token| unsafe { Lift::of(x.add(token * k), k) }).collect();
    #[cfg(target_arch = "x86_64")]
    if path.is_avx512() && k.is_multiple_of(product.weight.blocksize) {
        let stride = k.next_multiple_of(CHUNK);
        // SAFETY: the rows are the product's, the room is what the packing asks for, and the processor has what the kernels need.
        return unsafe {
            if path == Path::Avx512Bf16 && dtype == Dtype::Bf16 {
                let packed = packed(product, stride, |row, token, out: *mut Bf16| {
                    pack::by_chunks::<T, Bf16, 4>(row, k, lifts[token], out.add(token * CHUNK), m * CHUNK);
                });
                run(product, &packed, stride, &lifts, avx512::few_bf16, threads)
            } else {
                let packed = packed(product, stride, |row, token, out: *mut F32| {
                    pack::by_chunks::<T, F32, 8>(row, k, lifts[token], out.add(token * CHUNK), m * CHUNK);
                });
                run(product, &packed, stride, &lifts, avx512::few_f32, threads)
            }
        };
    }
    let _ = dtype;
    // SAFETY: as above.
    unsafe {
        let packed = packed(product, k, |row, token, out: *mut F32| {
            for i in 0..k {
                out.add(token * k + i).write(F32::narrow(row.add(i).read_unaligned().widen() * lifts[token].by));
            }
        });
        let kernel = match path {
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Bf16 | Path::Avx512 => x86::avx512,
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => x86::avx2,
            _ => rows_of_dots::<{ cfg!(target_arch = "aarch64") }>,
        };
        run(product, &packed, k, &lifts, kernel, threads)
    }
}

/// All tokens through `pack(row, token, out)`, `stride` elements apart.
unsafe fn packed<T: Element, W: Element>(
    product: &Product<T>,
    stride: usize,
    pack: impl Fn(*const T, usize, *mut W),
) -> Buffer<W> {
    let mut packed: Buffer<W> = Buffer::new(product.m * stride);
    for token in 0..product.m {
        // SAFETY: both have a row for every token.
        unsafe { pack(product.x.add(token * product.k), token, packed.as_mut_ptr()) };
    }
    packed
}

/// Runs a kernel over all rows of the weight.
unsafe fn run<T: Element, W: Element>(
    product: &Product<T>,
    packed: &Buffer<W>,
    stride: usize,
    lifts: &[Lift],
    kernel: Kernel<W>,
    threads: usize,
) -> Result<()> {
    let Product { ref weight, n, k, m, .. } = *product;
    let operands = Operands { weight, k, x: packed.as_ptr(), stride, m };
    pool::run_with(n, k / 2, threads, Vec::new, |scratch, first, last| {
        let mut sums = [[0.0; MOST_TOKENS]; MOST_ROWS];
        for row in (first..last).step_by(MOST_ROWS) {
            let count = MOST_ROWS.min(last - row);
            // SAFETY: the rows are below `n`, and so are the elements of the result that they give.
            unsafe {
                kernel(&operands, row, &mut sums[..count], scratch);
                for (row, sums) in (row..).zip(&sums[..count]) {
                    let bias = product.bias(row);
                    for (token, (sum, lift)) in sums.iter().zip(lifts).enumerate() {
                        product.out.add(token * n + row).write_unaligned(T::narrow(sum * lift.back + bias));
                    }
                }
            }
        }
    })
}

/// Elements decoded at a time: they stay in the first cache.
const RUN: usize = 512;

/// Running sums of a dot product, added up at its end.
const LANES: usize = 32;

/// Decodes a row to float32, run by run, and multiplies it with every token. Takes any `K` and any block size.
#[inline(always)]
unsafe fn rows_of_dots<const FMA: bool>(
    operands: &Operands<F32>,
    first: usize,
    sums: &mut [[f32; MOST_TOKENS]],
    _: &mut Vec<f32>,
) {
    let Operands { weight, k, x, stride, m } = *operands;
    let mut decoded = [F32::default(); RUN];
    for (row, sums) in (first..).zip(sums) {
        let mut lanes = [[0.0f32; LANES]; MOST_TOKENS];
        for start in (0..k).step_by(RUN) {
            let count = RUN.min(k - start);
            // SAFETY: the run lies within the row, the row within the weight; each token has `k` elements.
            unsafe {
                run_of_elements(weight, row * k + start, row * k + start + count, decoded.as_mut_ptr());
                for (token, lanes) in lanes[..m].iter_mut().enumerate() {
                    let x = std::slice::from_raw_parts(x.add(token * stride + start), count);
                    dot::<FMA>(&decoded[..count], x, lanes);
                }
            }
        }
        for (sum, lanes) in sums.iter_mut().zip(lanes) {
            *sum = sum_of(lanes);
        }
    }
}

#[inline(always)]
fn dot<const FMA: bool>(a: &[F32], b: &[F32], lanes: &mut [f32; LANES]) {
    let mut sums = *lanes;
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a.remainder(), b.remainder());
    for (a, b) in a.zip(b) {
        for i in 0..LANES {
            sums[i] = multiply_add::<FMA>(a[i].widen(), b[i].widen(), sums[i]);
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum = multiply_add::<FMA>(a.widen(), b.widen(), *sum);
    }
    *lanes = sums;
}

/// `a * b + c`, rounded once where the processor does that in one instruction.
#[inline(always)]
pub fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// The sum, halving the lanes.
#[inline(always)]
fn sum_of(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
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
