//! Few tokens: rows of codes are decoded in registers.
//!
//! 128 codes are loaded as words, shifts bring each nibble of a word to its low bits, and a permutation of the sixteen code values
//! by them gives weights. The sum over `k` does not care for order, so the tokens are packed in the order that the shifts give
//! (`crate::cpu::matmul4::pack`) and the codes are used as they lie. Weights are unscaled; sums over a chunk are scaled in float32.

use std::arch::x86_64::*;

use super::bf16;
use crate::cpu::dequantize::Tensor4;
use crate::cpu::element::{Bf16, F32};
use crate::cpu::matmul4::few::{MOST_ROWS, MOST_TOKENS, Operands};
use crate::cpu::matmul4::pack::CHUNK;

/// Bytes of tokens that leave room in the first cache for codes.
const SLAB_BYTES: usize = 16 << 10;

/// Codes, and the block maxima, of rows that hold whole blocks.
#[derive(Clone, Copy)]
struct Row {
    codes: *const u8,
    scales: *const f32,
}

/// Some rows of the weight.
struct Rows<'a> {
    weight: &'a Tensor4<'a>,
    k: usize,
    first: usize,
    scales: *const f32,
}

impl<'a> Rows<'a> {
    /// `count` rows from `first` on; the room in `scratch` is used until they are done with.
    ///
    /// # Safety
    /// The weight has these rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    unsafe fn new(weight: &'a Tensor4<'a>, k: usize, first: usize, count: usize, scratch: &mut Vec<f32>) -> Self {
        let blocks = k / weight.blocksize;
        // SAFETY: the caller's rows have these blocks.
        let scales = unsafe { weight.scales.run(first * blocks, count * blocks, scratch) };
        Self { weight, k, first, scales }
    }

    /// The row `first + i`.
    fn row(&self, i: usize) -> Row {
        Row {
            codes: self.weight.codes.wrapping_add((self.first + i) * self.k / 2),
            scales: self.scales.wrapping_add(i * (self.k / self.weight.blocksize)),
        }
    }
}

/// Which of a chunk's 16 double words of codes exist, and which of the 4 scales that it may have.
#[derive(Clone, Copy)]
struct Present {
    codes: __mmask16,
    scales: __mmask8,
}

/// How rows are cut into chunks, of which the last may be short, and where a chunk's lanes find their scales.
struct Chunks {
    count: usize,
    whole: usize,
    in_whole: Present,
    in_last: Present,
    log2_blocksize: u32,
    lanes: __m512i,
}

/// Consecutive chunks of which the same is present.
#[derive(Clone, Copy)]
struct Run {
    first: usize,
    end: usize,
    present: Present,
}

impl Chunks {
    /// All chunks, up to `longest` at a time.
    fn runs(&self, longest: usize) -> impl Iterator<Item = Run> {
        let (whole, present) = (self.whole, self.in_whole);
        let wholes =
            (0..whole).step_by(longest).map(move |first| Run { first, end: whole.min(first + longest), present });
        let last = Run { first: whole, end: self.count, present: self.in_last };
        wholes.chain((whole < self.count).then_some(last))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn new(k: usize, blocksize: usize) -> Self {
        let log2_blocksize = blocksize.trailing_zeros();
        let present = |elements: usize| Present {
            codes: ((1u32 << (elements / 8)) - 1) as __mmask16,
            scales: (1u8 << elements.div_ceil(blocksize)) - 1,
        };
        // Double word i of a chunk holds elements 8 i to 8 i + 7.
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        Self {
            count: k.div_ceil(CHUNK),
            whole: k / CHUNK,
            in_whole: present(CHUNK),
            in_last: present(k % CHUNK),
            log2_blocksize,
            lanes: _mm512_srlv_epi32(lanes, _mm512_set1_epi32(log2_blocksize as i32 - 3)),
        }
    }

    /// One scale for each double word of a chunk's codes.
    ///
    /// # Safety
    /// The row has the scales that are present.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn scales(&self, row: Row, chunk: usize, present: Present) -> __m512 {
        // SAFETY: only the scales that are present are read.
        let scales =
            unsafe { _mm_maskz_loadu_ps(present.scales, row.scales.add((chunk * CHUNK) >> self.log2_blocksize)) };
        _mm512_permutexvar_ps(self.lanes, _mm512_castps128_ps512(scales))
    }
}

/// The double words of a chunk's codes.
///
/// # Safety
/// The row has the codes that are present.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn codes(row: Row, chunk: usize, present: Present) -> __m512i {
    // SAFETY: only the codes that are present are read.
    unsafe { _mm512_maskz_loadu_epi32(present.codes, row.codes.add(chunk * CHUNK / 2).cast()) }
}

/// Asks for a chunk of a row that comes after this one: slabs are too short for the processor to see it.
#[inline(always)]
fn prefetch(row: Row, chunk: usize, ahead: usize) {
    // SAFETY: a prefetch reads nothing that could fault.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(row.codes.wrapping_add(ahead + chunk * CHUNK / 2).cast()) };
}

/// Adds the products of `R` rows with `M` tokens, over some chunks, to `totals`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn rows_bf16<const R: usize, const M: usize>(
    operands: &Operands<Bf16>,
    chunks: &Chunks,
    run: Run,
    rows: [Row; R],
    totals: &mut [[__m512; M]],
) {
    let Operands { weight, x, .. } = *operands;
    // SAFETY: sixteen values; the tokens are padded to whole chunks; rows are the caller's promise.
    unsafe {
        // The permutation reads five bits of an index; the table stands there twice, so the next nibble's bit does not matter.
        let table = _mm512_cvtneps_pbh(_mm512_loadu_ps(weight.values.as_ptr()));
        let table = _mm512_broadcast_i64x4(std::mem::transmute::<__m256bh, __m256i>(table));
        let mut sums: [[__m512; M]; R] = std::array::from_fn(|row| totals[row]);
        for chunk in run.first..run.end {
            rows.iter().for_each(|&row| prefetch(row, chunk, operands.k / 2 * R));
            let weights = rows.map(|row| {
                let codes = codes(row, chunk, run.present);
                [
                    _mm512_permutexvar_epi16(codes, table),
                    _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(codes), table),
                    _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(codes), table),
                    _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(codes), table),
                ]
            });
            let scales = rows.map(|row| chunks.scales(row, chunk, run.present));
            for token in 0..M {
                let x = x.add((chunk * M + token) * CHUNK);
                let mut sum = [_mm512_setzero_ps(); R];
                for i in 0..4 {
                    let x = _mm512_loadu_si512(x.add(32 * i).cast());
                    for row in 0..R {
                        sum[row] = _mm512_dpbf16_ps(sum[row], bf16(weights[row][i]), bf16(x));
                    }
                }
                for row in 0..R {
                    sums[row][token] = _mm512_fmadd_ps(sum[row], scales[row], sums[row][token]);
                }
            }
        }
        totals[..R].copy_from_slice(&sums);
    }
}

/// Adds the products of `R` rows with `M` tokens, over some chunks, to `totals`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn rows_f32<const R: usize, const M: usize>(
    operands: &Operands<F32>,
    chunks: &Chunks,
    run: Run,
    rows: [Row; R],
    totals: &mut [[__m512; M]],
) {
    let Operands { weight, x, .. } = *operands;
    // SAFETY: sixteen values; the tokens are padded to whole chunks; rows are the caller's promise.
    unsafe {
        let table = _mm512_loadu_ps(weight.values.as_ptr());
        let mut sums: [[__m512; M]; R] = std::array::from_fn(|row| totals[row]);
        for chunk in run.first..run.end {
            rows.iter().for_each(|&row| prefetch(row, chunk, operands.k / 2 * R));
            let weights = rows.map(|row| {
                let codes = codes(row, chunk, run.present);
                // The permutation reads four bits of an index.
                [
                    _mm512_permutexvar_ps(codes, table),
                    _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), table),
                    _mm512_permutexvar_ps(_mm512_srli_epi32::<8>(codes), table),
                    _mm512_permutexvar_ps(_mm512_srli_epi32::<12>(codes), table),
                    _mm512_permutexvar_ps(_mm512_srli_epi32::<16>(codes), table),
                    _mm512_permutexvar_ps(_mm512_srli_epi32::<20>(codes), table),
                    _mm512_permutexvar_ps(_mm512_srli_epi32::<24>(codes), table),
                    _mm512_permutexvar_ps(_mm512_srli_epi32::<28>(codes), table),
                ]
            });
            let scales = rows.map(|row| chunks.scales(row, chunk, run.present));
            for token in 0..M {
                let x = x.add((chunk * M + token) * CHUNK);
                let mut sum = [_mm512_setzero_ps(); R];
                for i in 0..8 {
                    let x = _mm512_loadu_ps(x.add(16 * i).cast());
                    for row in 0..R {
                        sum[row] = _mm512_fmadd_ps(weights[row][i], x, sum[row]);
                    }
                }
                for row in 0..R {
                    sums[row][token] = _mm512_fmadd_ps(sum[row], scales[row], sums[row][token]);
                }
            }
        }
        totals[..R].copy_from_slice(&sums);
    }
}

/// Defines a kernel of [`super::few`] from one of the above, for every number of tokens.
macro_rules! few {
    ($(#[$attribute:meta])* $name:ident, $element:ty, $rows:ident, $features:literal, $pair_from:literal) => {
        $(#[$attribute])*
        #[target_feature(enable = $features)]
        pub unsafe fn $name(operands: &Operands<$element>, first: usize, sums: &mut [[f32; MOST_TOKENS]], scratch: &mut Vec<f32>) {
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn tokens<const M: usize>(
                operands: &Operands<$element>,
                first: usize,
                sums: &mut [[f32; MOST_TOKENS]],
                scratch: &mut Vec<f32>,
            ) {
                // SAFETY: the caller's promise, handed on.
                unsafe {
                    let rows = Rows::new(operands.weight, operands.k, first, sums.len(), scratch);
                    let chunks = Chunks::new(operands.k, operands.weight.blocksize);
                    let mut totals = [[_mm512_setzero_ps(); M]; MOST_ROWS];
                    // The tokens' part of a slab stays in the first cache while the rows take turns.
                    let slab = SLAB_BYTES / (M * CHUNK * size_of::<$element>());
                    for run in chunks.runs(slab) {
                        let mut done = 0;
                        while M >= $pair_from && done + 2 <= sums.len() {
                            let pair = [rows.row(done), rows.row(done + 1)];
                            $rows::<2, M>(operands, &chunks, run, pair, &mut totals[done..]);
                            done += 2;
                        }
                        while done < sums.len() {
                            $rows::<1, M>(operands, &chunks, run, [rows.row(done)], &mut totals[done..]);
                            done += 1;
                        }
                    }
                    for (sums, totals) in sums.iter_mut().zip(totals) {
                        for (sum, total) in sums.iter_mut().zip(totals) {
                            *sum = _mm512_reduce_add_ps(total);
                        }
                    }
                }
            }
            // SAFETY: the caller's promise, handed on.
            unsafe {
                match operands.m {
                    0 => {}
                    1 => tokens::<1>(operands, first, sums, scratch),
                    2 => tokens::<2>(operands, first, sums, scratch),
                    3 => tokens::<3>(operands, first, sums, scratch),
                    4 => tokens::<4>(operands, first, sums, scratch),
                    5 => tokens::<5>(operands, first, sums, scratch),
                    6 => tokens::<6>(operands, first, sums, scratch),
                    7 => tokens::<7>(operands, first, sums, scratch),
                    _ => tokens::<8>(operands, first, sums, scratch),
                }
            }
        }
    };
}
few!(
    /// bfloat16 tokens, packed by four nibbles.
    ///
    /// # Safety
    /// The processor has AVX-512 and its bfloat16; the rows from `first` on lie within the weight and hold whole blocks.
    few_bf16, Bf16, rows_bf16, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16", 1
);
few!(
    /// float32 tokens, packed by eight nibbles.
    ///
    /// # Safety
    /// The processor has AVX-512; the rows from `first` on lie within the weight and hold whole blocks.
    few_f32, F32, rows_f32, "avx512f,avx512bw,avx512dq,avx512vl", 1
);
