//! Kernels with AVX-512, and with its dot products of bfloat16.
//!
//! For few tokens: 128 codes are loaded as words, shifts bring each nibble of a word to its low bits, and a permutation of the
//! sixteen code values by them gives weights. The sum over `k` does not care for order, so the tokens are packed in the
//! order that the shifts give ([`super::pack::by_nibbles`]) and the codes are used as they lie. Weights are unscaled; sums over a block are
//! scaled in float32.

// One index addresses several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::asm;
use std::arch::x86_64::*;

use super::few::{MOST_ROWS, MOST_TOKENS, Operands};
use super::pack::{CHUNK, PANEL};
use super::tiles::{COLUMNS, Kernel, STRIDE, TOKENS};
use crate::cpu::dequantize::{Scales, Tensor4};
use crate::cpu::element::{Bf16, F32};

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
            unsafe { _mm_maskz_loadu_ps(present.scales, row.scales.add(chunk * CHUNK >> self.log2_blocksize)) };
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

#[inline(always)]
fn bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of which any are allowed.
    unsafe { std::mem::transmute(bits) }
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

/// The part of a row that lies in a tile, by quarters of a chunk: a block has at least as many elements.
#[repr(align(64))]
struct Piece {
    scales: [f32; COLUMNS / QUARTER],
    codes: *const u8,
}

/// Elements of a quarter of a chunk.
const QUARTER: usize = CHUNK / 4;

impl Piece {
    /// `depth` elements from `start` on. Quarters past them have scale 0.
    ///
    /// # Safety
    /// The weight has these elements, and they begin with a block's quarter.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn new(weight: &Tensor4, start: usize, depth: usize) -> Self {
        const { assert!(COLUMNS / QUARTER == 16, "scales fill one register") };
        let log2_blocksize = weight.blocksize.trailing_zeros();
        let first = start >> log2_blocksize;
        let count = ((start + depth - 1) >> log2_blocksize) - first + 1;
        // SAFETY: only scales of the caller's elements are read; the result is as large as a register.
        unsafe {
            let scales = match weight.scales {
                Scales::Plain(absmax) => _mm512_maskz_loadu_ps(((1u32 << count) - 1) as __mmask16, absmax.add(first)),
                nested => {
                    let mut scales = [0.0; COLUMNS / QUARTER];
                    for (i, scale) in scales[..count].iter_mut().enumerate() {
                        *scale = nested.get(first + i);
                    }
                    _mm512_loadu_ps(scales.as_ptr())
                }
            };
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let elements = _mm512_add_epi32(
                _mm512_slli_epi32::<{ QUARTER.trailing_zeros() }>(lanes),
                _mm512_set1_epi32((start % weight.blocksize) as i32),
            );
            let blocks = _mm512_srlv_epi32(elements, _mm512_set1_epi32(log2_blocksize as i32));
            let present = _mm512_cmplt_epi32_mask(blocks, _mm512_set1_epi32(count as i32));
            let mut piece = Self { scales: [0.0; COLUMNS / QUARTER], codes: weight.codes.wrapping_add(start / 2) };
            _mm512_store_ps(piece.scales.as_mut_ptr(), _mm512_maskz_permutexvar_ps(present, blocks, scales));
            piece
        }
    }

    /// The double words of the chunk from element `first` on, zeros from `depth` on.
    ///
    /// # Safety
    /// There is such a chunk.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn codes(&self, first: usize, depth: usize) -> __m512i {
        let present = ((1u32 << ((depth - first).min(CHUNK) / 8)) - 1) as __mmask16;
        // SAFETY: only codes of the piece are read.
        unsafe { _mm512_maskz_loadu_epi32(present, self.codes.add(first / 2).cast()) }
    }

    /// Two blocks' values times their scales, rounded to bfloat16.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn results(&self, values: __m512, quarter: usize) -> __m512i {
        let [low, high] = [0, 1].map(|i| _mm512_set1_ps(self.scales[quarter + i]));
        let pair = _mm512_cvtne2ps_pbh(_mm512_mul_ps(values, high), _mm512_mul_ps(values, low));
        // SAFETY: both are 512 bits of which any are allowed.
        unsafe { std::mem::transmute(pair) }
    }
}

/// Columns of a row of whole blocks for a tile, by chunks, in the order of four nibbles a word: `value * scale`, rounded to bfloat16.
///
/// # Safety
/// The processor has AVX-512 and its bfloat16; the weight has these elements; `out` has room for them in whole chunks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub unsafe fn decode_bf16(weight: &Tensor4, start: usize, depth: usize, out: *mut Bf16) {
    // SAFETY: sixteen values; the elements and the room are the caller's promise.
    unsafe {
        let piece = Piece::new(weight, start, depth);
        let values = _mm512_loadu_ps(weight.values.as_ptr());
        // Each quarter has a table of its own: bits 4 and 5 of an index choose it.
        let nibble = _mm512_set1_epi16(15);
        let words = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        let quarter = _mm512_slli_epi16::<4>(_mm512_or_si512(words, _mm512_slli_epi32::<16>(words)));
        for first in (0..depth).step_by(CHUNK) {
            let front = piece.results(values, first / QUARTER);
            let back = piece.results(values, first / QUARTER + 2);
            let codes = piece.codes(first, depth);
            let shifted =
                [codes, _mm512_srli_epi16::<4>(codes), _mm512_srli_epi16::<8>(codes), _mm512_srli_epi16::<12>(codes)];
            let out = out.add(first).cast::<__m512i>();
            for i in 0..4 {
                // (shifted & nibble) | quarter
                let index = _mm512_ternarylogic_epi32::<0xf8>(quarter, shifted[i], nibble);
                _mm512_store_si512(out.add(i), _mm512_permutex2var_epi16(front, index, back));
            }
        }
    }
}

/// Columns of a row of whole blocks for a tile, by chunks, in the order of eight nibbles a word: `value * scale`.
///
/// # Safety
/// The processor has AVX-512; the weight has these elements; `out` has room for them in whole chunks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn decode_f32(weight: &Tensor4, start: usize, depth: usize, out: *mut F32) {
    // SAFETY: sixteen values; the elements and the room are the caller's promise.
    unsafe {
        let piece = Piece::new(weight, start, depth);
        let values = _mm512_loadu_ps(weight.values.as_ptr());
        let quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        for first in (0..depth).step_by(CHUNK) {
            let scales = _mm512_castps128_ps512(_mm_loadu_ps(piece.scales.as_ptr().add(first / QUARTER)));
            let scales = _mm512_permutexvar_ps(quarters, scales);
            let mut codes = piece.codes(first, depth);
            for i in 0..8 {
                // The permutation reads four bits of an index.
                let weights = _mm512_mul_ps(_mm512_permutexvar_ps(codes, values), scales);
                _mm512_store_ps(out.add(first + 16 * i).cast(), weights);
                codes = _mm512_srli_epi32::<4>(codes);
            }
        }
    }
}

/// `R` rows of a tile with `V` panels: each step multiplies one double word of each row, broadcast, with the sixteen of each panel.
///
/// `$dot` adds the products of two vectors of double words, one float32 or two bfloat16 each.
macro_rules! tiles {
    ($table:ident, $name:ident, $element:ty, $features:literal, $per_word:literal, $dot:expr) => {
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize, const V: usize>(
            tile: *const $element,
            panels: *const $element,
            stride: usize,
            depth: usize,
            sums: *mut f32,
        ) {
            let mut totals = [[_mm512_setzero_ps(); V]; R];
            // SAFETY: the caller's tile has R rows of `depth` columns, each of its V panels as many, its sums room for all.
            unsafe {
                for word in 0..depth / $per_word {
                    let x: [__m512; V] = std::array::from_fn(|v| {
                        _mm512_loadu_ps(panels.add(v * stride).cast::<f32>().add(word * PANEL))
                    });
                    for row in 0..R {
                        totals[row] = $dot(totals[row], tile.add(row * STRIDE).cast::<i32>().add(word), x);
                    }
                }
                for row in 0..R {
                    for v in 0..V {
                        let to = sums.add(row * TOKENS + v * PANEL);
                        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), totals[row][v]));
                    }
                }
            }
        }

        /// Kernels for one to four panels, with as many rows as the registers hold.
        pub const $table: [Kernel<$element>; 4] = [
            Kernel { rows: 24, run: $name::<24, 1> },
            Kernel { rows: 12, run: $name::<12, 2> },
            Kernel { rows: 8, run: $name::<8, 3> },
            Kernel { rows: 6, run: $name::<6, 4> },
        ];
    };
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn dot_f32<const V: usize>(mut totals: [__m512; V], word: *const i32, x: [__m512; V]) -> [__m512; V] {
    // SAFETY: the caller's word of a tile.
    let w = _mm512_castsi512_ps(_mm512_set1_epi32(unsafe { word.read_unaligned() }));
    for v in 0..V {
        totals[v] = _mm512_fmadd_ps(w, x[v], totals[v]);
    }
    totals
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn dot_bf16<const V: usize>(mut totals: [__m512; V], word: *const i32, x: [__m512; V]) -> [__m512; V] {
    if V == 1 {
        // One product for each broadcast: only with the broadcast as its operand, which the compiler does not find, is it not held
        // up by the instructions.
        // SAFETY: one AVX-512 BF16 instruction that reads the caller's word of a tile.
        unsafe {
            asm!("vdpbf16ps {0}, {1}, dword ptr [{2}]{{1to16}}", inout(zmm_reg) totals[0], in(zmm_reg) x[0], in(reg) word,
                options(pure, readonly, nostack, preserves_flags));
        }
        return totals;
    }
    // SAFETY: the caller's word of a tile.
    let w = bf16(_mm512_set1_epi32(unsafe { word.read_unaligned() }));
    for v in 0..V {
        totals[v] = _mm512_dpbf16_ps(totals[v], w, bf16(_mm512_castps_si512(x[v])));
    }
    totals
}

tiles!(TILES_F32, tile_f32, F32, "avx512f,avx512bw,avx512dq,avx512vl", 1, dot_f32);
tiles!(TILES_BF16, tile_bf16, Bf16, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16", 2, dot_bf16);
