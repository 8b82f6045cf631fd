//! Dequantization, block by block: `out = code * absmax`, one float32 product rounded once.
//!
//! A 4-bit block has sixteen possible results, so they are computed once a block and looked up.

use std::sync::LazyLock;

#[cfg(target_arch = "x86_64")]
use super::avx512::{self, Wide};
#[cfg(not(target_arch = "x86_64"))]
use super::element::Element as Wide;
use super::element::{Element, for_dtype};
#[cfg(target_arch = "x86_64")]
use super::path::Path;
use super::path::multiversion;
use super::table_lookup::{Lookup, expand};
use super::{code_values, pages, pool};
use crate::blockwise::{Absmax, Blocks};
use crate::codebook::dynamic_map;
use crate::{QuantType, Result};

/// The code that stands for an absent one.
static DYNAMIC: LazyLock<[f32; 256]> = LazyLock::new(|| dynamic_map(true));

/// The scale of a block.
pub(super) enum Scales {
    Plain(*const f32),
    Nested { codes: *const u8, code: Box<[f32; 256]>, absmax: *const f32, log2_blocksize: u32, offset: f32 },
}

// SAFETY: the pointers are to memory that the caller lends for reading, from any thread, until the call is over.
unsafe impl Sync for Scales {}

impl Scales {
    /// # Safety
    /// The addresses hold what [`Absmax`] says, until the call that they were lent for is over.
    pub unsafe fn new(absmax: Absmax) -> Self {
        match absmax {
            Absmax::Plain(absmax) => Self::Plain(absmax as *const f32),
            Absmax::Nested { codes, code, absmax, blocksize, offset } => Self::Nested {
                codes: codes as *const u8,
                // SAFETY: the caller promises 256 float32 at `code` and one at `offset`.
                code: Box::new(unsafe { code_values(code) }.unwrap_or(*DYNAMIC)),
                absmax: absmax as *const f32,
                log2_blocksize: blocksize.ilog2(),
                // SAFETY: as above.
                offset: unsafe { (offset as *const f32).read_unaligned() },
            },
        }
    }

    #[inline(always)]
    unsafe fn get(&self, block: usize) -> f32 {
        // SAFETY: the caller asks for blocks of the tensor only, and the arrays have one entry for each.
        unsafe {
            match self {
                Self::Plain(absmax) => absmax.add(block).read_unaligned(),
                Self::Nested { codes, code, absmax, log2_blocksize, offset } => {
                    let value = code[usize::from(*codes.add(block))];
                    value * absmax.add(block >> log2_blocksize).read_unaligned() + offset
                }
            }
        }
    }
}

/// A 4-bit tensor, to be read from any place.
#[derive(Clone, Copy)]
pub(super) struct Codes4<'a> {
    /// Two codes a byte, the first in the high nibble.
    pub codes: *const u8,
    /// What they stand for.
    pub values: &'a [f32; 16],
    /// One a block.
    pub scales: &'a Scales,
    /// Elements of a block, a power of two: its logarithm, because a division takes longer than all else about a small block.
    pub log2_blocksize: u32,
}

// SAFETY: the pointer is to memory that the caller lends for reading, from any thread, until the call is over.
unsafe impl Sync for Codes4<'_> {}

impl Codes4<'_> {
    /// Writes elements `start..end`.
    ///
    /// # Safety
    /// They lie within the tensor; `out` has room for them.
    #[inline(always)]
    pub unsafe fn decode<T: Lookup>(&self, start: usize, end: usize, mut out: *mut T) {
        let mut i = start;
        while i < end {
            let block = i >> self.log2_blocksize;
            let stop = end.min((block + 1) << self.log2_blocksize);
            // SAFETY: the block lies within the tensor, whose codes, scales and room for results the caller promised.
            unsafe {
                let (scale, codes, count) = (self.scales.get(block), self.codes.add(i / 2), stop - i);
                i = stop;
                #[cfg(target_arch = "x86_64")]
                if Path::chosen() == Path::Avx512
                    && (stop - count).is_multiple_of(2)
                    && count.is_multiple_of(32)
                    && avx512::dequantize_block(codes, self.values, scale, out, count)
                {
                    out = out.add(count);
                    continue;
                }
                let results = self.values.map(|value| T::narrow(value * scale));
                // A run that starts within a byte: its first code alone.
                let odd = (stop - count) % 2;
                if odd == 1 {
                    out.write_unaligned(results[usize::from(*codes & 15)]);
                }
                expand(codes.add(odd), &results, out.add(odd), count - odd);
                out = out.add(count);
            }
        }
    }
}

/// Blocks `first..last` of a tensor of `n` elements.
struct Part4<'a, T> {
    codes: Codes4<'a>,
    out: *mut T,
    first: usize,
    last: usize,
    n: usize,
}

#[inline(always)]
unsafe fn blocks_4bit<T: Lookup>(part: &Part4<T>) {
    let log2 = part.codes.log2_blocksize;
    let (start, end) = (part.first << log2, part.n.min(part.last << log2));
    // SAFETY: the blocks lie within the tensor, by the caller's promise.
    unsafe { part.codes.decode(start, end, part.out.add(start)) };
}

multiversion! {
    unsafe fn run_4bit[T: Lookup][T](part: &Part4<T>) => blocks_4bit
}

/// # Safety
/// As [`crate::blockwise::dequantize_4bit`].
pub(crate) unsafe fn dequantize_4bit(
    blocks: Blocks,
    codes: u64,
    quant_type: QuantType,
    absmax: Absmax,
    out: u64,
    threads: usize,
) -> Result<()> {
    unsafe fn typed<T: Lookup>(blocks: Blocks, codes: Codes4, out: u64, threads: usize) -> Result<()> {
        let n = blocks.n;
        pages::advise_huge(out, n * size_of::<T>());
        pool::run(blocks.count(), blocks.blocksize * size_of::<T>(), threads, |first, last| {
            let part = Part4 { codes, out: out as *mut T, first, last, n };
            // SAFETY: the caller's promise; parts do not overlap.
            unsafe { run_4bit(&part) };
        })
    }
    // SAFETY: the caller's promise; `T` is the dtype's type.
    unsafe {
        let scales = Scales::new(absmax);
        let values = quant_type.values();
        let codes =
            Codes4 { codes: codes as *const u8, values, scales: &scales, log2_blocksize: blocks.blocksize.ilog2() };
        for_dtype!(blocks.dtype, T => typed::<T>(blocks, codes, out, threads))
    }
}

/// Elements decoded at a time: enough that vector code does not wait for the look-ups before it.
const RUN: usize = 256;

#[inline(always)]
unsafe fn blocks_8bit<T: Wide>(
    codes: *const u8,
    values: &[f32; 256],
    absmax: *const f32,
    out: *mut T,
    n: usize,
    blocksize: usize,
) {
    #[cfg(target_arch = "x86_64")]
    let table = (Path::chosen() == Path::Avx512 && values.iter().all(|value| value.is_finite()))
        // SAFETY: this path is chosen only where the processor has AVX-512.
        .then(|| unsafe { avx512::Table256::new(values) });
    for (block, start) in (0..n).step_by(blocksize).enumerate() {
        let end = n.min(start + blocksize);
        // SAFETY: the block lies within the caller's `n` codes and elements, its scale within the blocks.
        unsafe {
            let scale = absmax.add(block).read_unaligned();
            #[cfg(target_arch = "x86_64")]
            if let Some(table) = &table
                && end - start == blocksize
                && avx512::dequantize_8bit(codes.add(start), table, scale, out.add(start), blocksize)
            {
                continue;
            }
            for first in (start..end).step_by(RUN) {
                decode_8bit(codes.add(first), values, scale, out.add(first), RUN.min(end - first));
            }
        }
    }
}

#[inline(always)]
unsafe fn decode_8bit<T: Element>(codes: *const u8, values: &[f32; 256], scale: f32, out: *mut T, count: usize) {
    let mut found = [0.0f32; RUN];
    for (i, value) in found[..count].iter_mut().enumerate() {
        // SAFETY: `codes` holds `count` codes; the write is to a local. It is volatile so that the look-ups stay scalar loads: vector
        // gathers take longer.
        unsafe { std::ptr::write_volatile(value, values[usize::from(*codes.add(i))]) };
    }
    // SAFETY: `out` has room for `count` elements, at any address.
    unsafe {
        if count == RUN {
            out.cast::<[T; RUN]>().write_unaligned(found.map(|value| T::narrow(value * scale)));
        } else {
            for (i, value) in found[..count].iter().enumerate() {
                out.add(i).write_unaligned(T::narrow(value * scale));
            }
        }
    }
}

multiversion! {
    unsafe fn run_8bit[T: Wide][T](
        codes: *const u8, values: &[f32; 256], absmax: *const f32, out: *mut T, n: usize, blocksize: usize,
    ) => blocks_8bit
}

/// # Safety
/// As [`crate::blockwise::dequantize_8bit`].
pub(crate) unsafe fn dequantize_8bit(
    blocks: Blocks,
    codes: u64,
    values: Option<&[f32; 256]>,
    absmax: u64,
    out: u64,
    threads: usize,
) -> Result<()> {
    unsafe fn typed<T: Wide>(
        blocks: Blocks,
        codes: u64,
        values: &[f32; 256],
        absmax: u64,
        out: u64,
        threads: usize,
    ) -> Result<()> {
        let Blocks { n, blocksize, .. } = blocks;
        pages::advise_huge(out, n * size_of::<T>());
        pool::run(blocks.count(), blocksize * size_of::<T>(), threads, |first, last| {
            let (start, end) = (first * blocksize, (last * blocksize).min(n));
            let codes = (codes as *const u8).wrapping_add(start);
            let absmax = (absmax as *const f32).wrapping_add(first);
            let out = (out as *mut T).wrapping_add(start);
            // SAFETY: the caller's promise; parts are runs of whole blocks and do not overlap.
            unsafe { run_8bit(codes, values, absmax, out, end - start, blocksize) };
        })
    }
    let values = values.unwrap_or(&DYNAMIC);
    // SAFETY: the caller's promise; `T` is the dtype's type.
    unsafe { for_dtype!(blocks.dtype, T => typed::<T>(blocks, codes, values, absmax, out, threads)) }
}
