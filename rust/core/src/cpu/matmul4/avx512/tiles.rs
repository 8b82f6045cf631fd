//! Many tokens: decoding to tiles, and products of tiles with panels of tokens.

use std::arch::asm;
use std::arch::x86_64::*;

use super::bf16;
use crate::cpu::dequantize::Tensor4;
use crate::cpu::element::{Bf16, F32};
use crate::cpu::matmul4::pack::{CHUNK, PANEL};
use crate::cpu::matmul4::tiles::{COLUMNS, Kernel, STRIDE, TOKENS};

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
            let scales = weight.scales.sixteen(first, count);
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
