//! Quantization, block by block.

use std::sync::LazyLock;

#[cfg(target_arch = "x86_64")]
use super::avx512::{self, Wide};
#[cfg(target_arch = "x86_64")]
use super::decades::Decades;
#[cfg(not(target_arch = "x86_64"))]
use super::element::Element as Wide;
use super::element::{Element, LANES, for_dtype, for_runs, load};
#[cfg(target_arch = "x86_64")]
use super::path::Path;
use super::path::multiversion;
#[cfg(target_arch = "x86_64")]
use super::{avx512_code256, avx512_planes};
use super::{pages, pool};
use crate::blockwise::Blocks;
#[cfg(target_arch = "x86_64")]
use crate::codebook::LinearBuckets;
use crate::codebook::{BucketTable, Ranks, dynamic_map};
use crate::double_quant::{MAXIMA_OFFSET, NESTED_BLOCKSIZE, Nested};
use crate::exact_sum::exact_sum;
use crate::{Dtype, QuantType, Result};

/// NaN reads as 0, infinities as the largest finite values.
#[inline(always)]
fn finite(x: f32) -> f32 {
    let x = if x.is_nan() { 0.0 } else { x };
    x.clamp(-f32::MAX, f32::MAX)
}

/// Bits of the largest magnitude of a block.
#[inline(always)]
unsafe fn block_absmax<T: Element>(x: *const T, count: usize) -> f32 {
    let mut largest = [0u32; LANES];
    // Magnitudes are ordered as their bits are.
    let mut take = |values: [f32; LANES]| {
        for (m, value) in largest.iter_mut().zip(values) {
            *m = (*m).max(finite(value).to_bits() & 0x7fff_ffff);
        }
    };
    // SAFETY: the caller holds `count` elements at `x`.
    unsafe {
        let mut rest = None;
        for_runs(x, count, |_, values| take(values), |_, values, _| rest = Some(values));
        if let Some(values) = rest {
            take(values);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            largest[i] = largest[i].max(largest[i + width]);
        }
        width /= 2;
    }
    f32::from_bits(largest[0])
}

/// `x / absmax` of `N` elements: times the reciprocal, unless that overflows.
#[inline(always)]
fn quotients<const N: usize>(values: [f32; N], absmax: f32) -> [f32; N] {
    let inverse = if absmax > 0.0 { 1.0 / absmax } else { 0.0 };
    if inverse.is_finite() { values.map(|x| finite(x) * inverse) } else { values.map(|x| finite(x) / absmax) }
}

/// Steps from rank to rank of a 4-bit code: `code = first + sum of the steps whose threshold lies below t`.
struct Steps {
    thresholds: [f32; 15],
    steps: [u32; 15],
    first: u32,
    #[cfg(target_arch = "x86_64")]
    buckets: Option<LinearBuckets>,
}

impl Steps {
    fn new(quant_type: QuantType) -> Self {
        let ranks = Ranks::with_signed_zeros(quant_type.values());
        let mut table = Self {
            thresholds: [0.0; 15],
            steps: [0; 15],
            first: u32::from(ranks.codes[0]),
            #[cfg(target_arch = "x86_64")]
            buckets: LinearBuckets::new(&ranks).filter(|_| Path::chosen().is_avx512()),
        };
        table.thresholds.copy_from_slice(&ranks.thresholds);
        for (step, pair) in table.steps.iter_mut().zip(ranks.codes.windows(2)) {
            *step = u32::from(pair[1]).wrapping_sub(u32::from(pair[0]));
        }
        table
    }

    /// Packed codes, the first of each pair in the high nibble.
    #[inline(always)]
    fn pack(&self, t: [f32; LANES]) -> [u8; LANES / 2] {
        let mut codes = [self.first; LANES];
        for (&threshold, &step) in self.thresholds.iter().zip(&self.steps) {
            for (code, t) in codes.iter_mut().zip(t) {
                *code = code.wrapping_add(if t > threshold { step } else { 0 });
            }
        }
        std::array::from_fn(|i| (codes[2 * i] << 4 | codes[2 * i + 1]) as u8)
    }
}

#[inline(always)]
unsafe fn blocks_4bit<T: Wide>(
    x: *const T,
    n: usize,
    blocksize: usize,
    table: &Steps,
    codes: *mut u8,
    absmax: *mut f32,
) {
    for (block, start) in (0..n).step_by(blocksize).enumerate() {
        let count = blocksize.min(n - start);
        // SAFETY: the block lies within the caller's `n` elements, its bytes within `(n + 1) / 2`, its scale within the blocks.
        unsafe {
            let (x, codes) = (x.add(start), codes.add(start / 2));
            #[cfg(target_arch = "x86_64")]
            if let Some(buckets) = &table.buckets
                && count == blocksize
                && let Some(scale) = avx512::quantize_block(x, count, buckets, codes)
            {
                absmax.add(block).write_unaligned(scale);
                continue;
            }
            let scale = block_absmax(x, count);
            absmax.add(block).write_unaligned(scale);
            for_runs(
                x,
                count,
                |i, values| {
                    codes.add(i / 2).cast::<[u8; LANES / 2]>().write_unaligned(table.pack(quotients(values, scale)))
                },
                |i, values, length| {
                    let bytes = table.pack(quotients(values, scale));
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), codes.add(i / 2), length.div_ceil(2));
                },
            );
        }
    }
}

multiversion! {
    unsafe fn run_4bit[T: Wide][T](x: *const T, n: usize, blocksize: usize, table: &Steps, codes: *mut u8, absmax: *mut f32)
        => blocks_4bit
}

/// The signed dynamic map.
pub(super) static DYNAMIC: LazyLock<Code256> = LazyLock::new(|| Code256::new(&dynamic_map(true)));
/// The unsigned dynamic map.
pub(super) static DYNAMIC_UNSIGNED: LazyLock<Code256> = LazyLock::new(|| Code256::new(&dynamic_map(false)));

/// How the rank of `t` in a 256-entry code is found.
enum Finder {
    Table(BucketTable),
    Search(Box<[f32; 256]>),
}

/// A 256-entry code, ready to encode.
pub(super) struct Code256 {
    finder: Finder,
    code_of_rank: [u8; 256],
    sorted: bool,
    #[cfg(target_arch = "x86_64")]
    decades: Option<Decades>,
    /// The thresholds of the decades.
    #[cfg(target_arch = "x86_64")]
    planes: Option<Box<avx512_planes::Planes>>,
}

impl Code256 {
    fn new(values: &[f32; 256]) -> Self {
        let ranks = Ranks::new(values);
        // The unsigned dynamic map has steps twice as fine as the signed one.
        let table = BucketTable::new(&ranks, 8, 6).or_else(|| BucketTable::new(&ranks, 8, 7));
        let finder = match table {
            Some(table) => Finder::Table(table),
            None => {
                let mut thresholds = Box::new([f32::INFINITY; 256]);
                thresholds[..255].copy_from_slice(&ranks.thresholds);
                Finder::Search(thresholds)
            }
        };
        #[cfg(target_arch = "x86_64")]
        let decades = Path::chosen().is_avx512().then(|| Decades::new(values, &ranks)).flatten();
        let mut code_of_rank = [0; 256];
        code_of_rank.copy_from_slice(&ranks.codes);
        Self {
            finder,
            code_of_rank,
            sorted: ranks.codes.is_sorted(),
            #[cfg(target_arch = "x86_64")]
            planes: decades.as_ref().and_then(|decades| avx512_planes::Planes::new(&decades.thresholds)),
            #[cfg(target_arch = "x86_64")]
            decades,
        }
    }

    /// Quantizes a block of ordinary numbers with AVX-512, where that is the path in use.
    ///
    /// # Safety
    /// `x` holds `count` elements, `codes` has room for `count` bytes.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn whole_block<T: Wide>(&self, x: *const T, count: usize, codes: *mut u8) -> Option<f32> {
        let decades = self.decades.as_ref().filter(|_| count.is_multiple_of(16))?;
        // SAFETY: decades are made only where the processor has AVX-512, planes where it has VBMI; the rest is the caller's promise.
        unsafe {
            match &self.planes {
                Some(planes) if count.is_multiple_of(64) => {
                    avx512_planes::quantize_8bit(x, count, decades, planes, codes)
                }
                _ => avx512_code256::quantize_8bit(x, count, decades, codes),
            }
        }
    }

    #[inline(always)]
    fn codes<const N: usize>(&self, t: [f32; N]) -> [u8; N] {
        let ranks = match &self.finder {
            Finder::Table(table) => table.ranks(t),
            Finder::Search(thresholds) => {
                // One step for all elements at a time: their look-ups do not wait for each other.
                let mut ranks = [0u32; N];
                for step in [128, 64, 32, 16, 8, 4, 2, 1] {
                    for (rank, t) in ranks.iter_mut().zip(t) {
                        *rank += if t > thresholds[(*rank + step - 1) as usize & 255] { step } else { 0 };
                    }
                }
                ranks
            }
        };
        if self.sorted {
            ranks.map(|rank| rank as u8)
        } else {
            ranks.map(|rank| self.code_of_rank[rank as usize & 255])
        }
    }
}

/// The larger run of the 8-bit loop: its look-ups then lie far enough from the vector code that waits for them.
const LONG_RUN: usize = 256;

#[inline(always)]
unsafe fn blocks_8bit<T: Wide>(
    x: *const T,
    n: usize,
    blocksize: usize,
    table: &Code256,
    codes: *mut u8,
    absmax: *mut f32,
) {
    for (block, start) in (0..n).step_by(blocksize).enumerate() {
        let count = blocksize.min(n - start);
        // SAFETY: the block lies within the caller's `n` elements and bytes, its scale within the blocks.
        unsafe {
            let (x, codes) = (x.add(start), codes.add(start));
            #[cfg(target_arch = "x86_64")]
            if let Some(scale) = table.whole_block(x, count, codes) {
                absmax.add(block).write_unaligned(scale);
                continue;
            }
            let scale = block_absmax(x, count);
            absmax.add(block).write_unaligned(scale);
            if count.is_multiple_of(LONG_RUN) {
                encode_8bit::<T, LONG_RUN>(x, count, scale, table, codes);
            } else {
                encode_8bit::<T, LANES>(x, count, scale, table, codes);
            }
        }
    }
}

#[inline(always)]
unsafe fn encode_8bit<T: Element, const N: usize>(
    x: *const T,
    count: usize,
    scale: f32,
    table: &Code256,
    codes: *mut u8,
) {
    let whole = count / N * N;
    // SAFETY: the caller holds `count` elements at `x` and room for as many bytes at `codes`.
    unsafe {
        // No closure: one as long as this may be left out of line, where it is compiled for every processor.
        for i in (0..whole).step_by(N) {
            let values: [f32; N] = load(x.add(i));
            codes.add(i).cast::<[u8; N]>().write_unaligned(table.codes(quotients(values, scale)));
        }
        let rest = |i: usize, values: [f32; N], length: usize| {
            let bytes = table.codes(quotients(values, scale));
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), codes.add(whole + i), length);
        };
        for_runs::<T, N>(x.add(whole), count - whole, |_, _| (), rest);
    }
}

multiversion! {
    /// Quantizes `n` elements: a block's maximum to `absmax`, then its codes.
    ///
    /// # Safety
    /// `x` holds `n` elements, `codes` has room for `n` bytes and `absmax` for one float32 a block.
    pub(super) unsafe fn run_8bit[T: Wide][T](x: *const T, n: usize, blocksize: usize, table: &Code256, codes: *mut u8, absmax: *mut f32)
        => blocks_8bit
}

/// Splits blocks over threads: `work(x, n, codes, absmax)` gets a run of whole blocks.
unsafe fn over_blocks<T: Wide>(
    blocks: Blocks,
    x: u64,
    codes: u64,
    codes_per_byte: usize,
    absmax: u64,
    threads: usize,
    work: impl Fn(*const T, usize, *mut u8, *mut f32) + Sync,
) -> Result<()> {
    let Blocks { n, blocksize, .. } = blocks;
    pages::advise_huge(codes, n.div_ceil(codes_per_byte));
    pool::run(blocks.count(), blocksize * (size_of::<T>() + 1), threads, |first, last| {
        let (start, end) = (first * blocksize, (last * blocksize).min(n));
        let x = (x as *const T).wrapping_add(start);
        let codes = (codes as *mut u8).wrapping_add(start / codes_per_byte);
        work(x, end - start, codes, (absmax as *mut f32).wrapping_add(first));
    })
}

/// # Safety
/// As [`crate::blockwise::quantize_4bit`].
pub(crate) unsafe fn quantize_4bit(
    blocks: Blocks,
    x: u64,
    quant_type: QuantType,
    codes: u64,
    absmax: u64,
    threads: usize,
) -> Result<()> {
    let table = Steps::new(quant_type);
    // SAFETY: the caller's promise; `T` is the dtype's type, parts are runs of whole blocks and do not overlap.
    unsafe {
        for_dtype!(blocks.dtype, T => over_blocks::<T>(blocks, x, codes, 2, absmax, threads, |x, n, codes, absmax| {
            run_4bit(x, n, blocks.blocksize, &table, codes, absmax);
        }))
    }
}

/// # Safety
/// As [`crate::blockwise::quantize_8bit`].
pub(crate) unsafe fn quantize_8bit(
    blocks: Blocks,
    x: u64,
    values: Option<&[f32; 256]>,
    codes: u64,
    absmax: u64,
    threads: usize,
) -> Result<()> {
    let own = values.map(Code256::new);
    let table = own.as_ref().unwrap_or(&DYNAMIC);
    // SAFETY: the caller's promise; `T` is the dtype's type, parts are runs of whole blocks and do not overlap.
    unsafe {
        for_dtype!(blocks.dtype, T => over_blocks::<T>(blocks, x, codes, 1, absmax, threads, |x, n, codes, absmax| {
            run_8bit(x, n, blocks.blocksize, table, codes, absmax);
        }))
    }
}

/// # Safety
/// As [`crate::double_quant::quantize_4bit_nested`].
pub(crate) unsafe fn quantize_4bit_nested(
    blocks: Blocks,
    x: u64,
    quant_type: QuantType,
    codes: u64,
    nested: Nested,
    workspace: u64,
    threads: usize,
) -> Result<()> {
    let count = blocks.count();
    let maxima = workspace + MAXIMA_OFFSET as u64;
    // SAFETY: the workspace has room for the sums and one float32 a block, in this order and aligned.
    let absmax = unsafe {
        quantize_4bit(blocks, x, quant_type, codes, maxima, threads)?;
        std::slice::from_raw_parts_mut(maxima as *mut f32, count)
    };
    let offset = (exact_sum(absmax) / count as f64) as f32;
    for value in absmax.iter_mut() {
        *value -= offset;
    }
    let inner = Blocks::new(count, NESTED_BLOCKSIZE, Dtype::F32)?;
    // SAFETY: `absmax` holds `count` float32, the results have the sizes that the caller promised.
    unsafe {
        (nested.offset as *mut f32).write_unaligned(offset);
        quantize_8bit(inner, maxima, None, nested.absmax_codes, nested.nested_absmax, threads)
    }
}
