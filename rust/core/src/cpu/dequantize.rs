//! Dequantization, block by block: `out = code * absmax`, one float32 product rounded once.
//!
//! A 4-bit block has sixteen possible results, so they are computed once a block and looked up.

use std::sync::LazyLock;

use super::element::{Bf16, F16, F32};
use super::path::multiversion;
use super::table_lookup::{Lookup, expand};
use super::{code_values, pages, pool};
use crate::blockwise::{Absmax, Blocks};
use crate::codebook::dynamic_map;
use crate::{Dtype, QuantType, Result};

/// Results larger than this are written past the caches: they would only push out what is still needed there.
const STREAM_BYTES: usize = 8 << 20;

/// The code that stands for an absent one.
static DYNAMIC: LazyLock<[f32; 256]> = LazyLock::new(|| dynamic_map(true));

/// The scale of a block.
enum Scales {
    Plain(*const f32),
    Nested { codes: *const u8, code: Box<[f32; 256]>, absmax: *const f32, blocksize: usize, offset: f32 },
}

// SAFETY: the pointers are to memory that the caller lends for reading, from any thread, until the call is over.
unsafe impl Sync for Scales {}

impl Scales {
    unsafe fn new(absmax: Absmax) -> Self {
        match absmax {
            Absmax::Plain(absmax) => Self::Plain(absmax as *const f32),
            Absmax::Nested { codes, code, absmax, blocksize, offset } => Self::Nested {
                codes: codes as *const u8,
                // SAFETY: the caller promises 256 float32 at `code` and one at `offset`.
                code: Box::new(unsafe { code_values(code) }.unwrap_or(*DYNAMIC)),
                absmax: absmax as *const f32,
                blocksize,
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
                Self::Nested { codes, code, absmax, blocksize, offset } => {
                    let value = code[usize::from(*codes.add(block))];
                    value * absmax.add(block / blocksize).read_unaligned() + offset
                }
            }
        }
    }
}

/// Blocks `first..last` of a 4-bit tensor of `n` elements.
struct Part4<'a, T> {
    codes: *const u8,
    values: &'a [f32; 16],
    scales: &'a Scales,
    out: *mut T,
    first: usize,
    last: usize,
    blocks: Blocks,
}

#[inline(always)]
unsafe fn blocks_4bit<T: Lookup>(part: &Part4<T>, stream: bool) {
    let Blocks { n, blocksize, .. } = part.blocks;
    for block in part.first..part.last {
        let start = block * blocksize;
        // SAFETY: the block lies within the tensor, whose codes, scales and room for results the caller promised.
        unsafe {
            let scale = part.scales.get(block);
            let results = part.values.map(|value| T::narrow(value * scale));
            expand(part.codes.add(start / 2), &results, part.out.add(start), blocksize.min(n - start), stream);
        }
    }
}

multiversion! {
    unsafe fn run_4bit[T: Lookup][T](part: &Part4<T>, stream: bool) => blocks_4bit
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
    unsafe fn typed<T: Lookup>(
        blocks: Blocks,
        codes: u64,
        values: &[f32; 16],
        scales: &Scales,
        out: u64,
        threads: usize,
    ) -> Result<()> {
        let bytes = blocks.n * size_of::<T>();
        pages::advise_huge(out, bytes);
        pool::run(blocks.count(), blocks.blocksize * size_of::<T>(), threads, |first, last| {
            let part = Part4 { codes: codes as *const u8, values, scales, out: out as *mut T, first, last, blocks };
            // SAFETY: the caller's promise; parts do not overlap.
            unsafe { run_4bit(&part, bytes > STREAM_BYTES) };
        })
    }
    // SAFETY: the caller's promise; `T` is the dtype's type.
    unsafe {
        let scales = Scales::new(absmax);
        let values = quant_type.values();
        match blocks.dtype {
            Dtype::F32 => typed::<F32>(blocks, codes, values, &scales, out, threads),
            Dtype::F16 => typed::<F16>(blocks, codes, values, &scales, out, threads),
            Dtype::Bf16 => typed::<Bf16>(blocks, codes, values, &scales, out, threads),
        }
    }
}

/// Elements decoded at a time: 64 bytes of the narrowest type.
const RUN: usize = 32;

#[inline(always)]
unsafe fn blocks_8bit<T: Lookup>(
    codes: *const u8,
    values: &[f32; 256],
    absmax: *const f32,
    out: *mut T,
    n: usize,
    blocksize: usize,
    stream: bool,
) {
    for (block, start) in (0..n).step_by(blocksize).enumerate() {
        let count = blocksize.min(n - start);
        // SAFETY: the block lies within the caller's `n` codes and elements, its scale within the blocks.
        unsafe {
            let scale = absmax.add(block).read_unaligned();
            let mut done = 0;
            while done < count {
                let here = (count - done).min(RUN);
                let mut raw = [0u8; RUN];
                std::ptr::copy_nonoverlapping(codes.add(start + done), raw.as_mut_ptr(), here);
                let results = raw.map(|code| values[usize::from(code)] * scale).map(T::narrow);
                T::store(&results, out.add(start + done), here, stream);
                done += RUN;
            }
        }
    }
}

multiversion! {
    unsafe fn run_8bit[T: Lookup][T](
        codes: *const u8, values: &[f32; 256], absmax: *const f32, out: *mut T, n: usize, blocksize: usize, stream: bool,
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
    unsafe fn typed<T: Lookup>(
        blocks: Blocks,
        codes: u64,
        values: &[f32; 256],
        absmax: u64,
        out: u64,
        threads: usize,
    ) -> Result<()> {
        let Blocks { n, blocksize, .. } = blocks;
        let bytes = n * size_of::<T>();
        pages::advise_huge(out, bytes);
        pool::run(blocks.count(), blocksize * size_of::<T>(), threads, |first, last| {
            let (start, end) = (first * blocksize, (last * blocksize).min(n));
            let codes = (codes as *const u8).wrapping_add(start);
            let absmax = (absmax as *const f32).wrapping_add(first);
            let out = (out as *mut T).wrapping_add(start);
            // SAFETY: the caller's promise; parts are runs of whole blocks and do not overlap.
            unsafe { run_8bit(codes, values, absmax, out, end - start, blocksize, bytes > STREAM_BYTES) };
        })
    }
    let values = values.unwrap_or(&DYNAMIC);
    // SAFETY: the caller's promise; `T` is the dtype's type.
    unsafe {
        match blocks.dtype {
            Dtype::F32 => typed::<F32>(blocks, codes, values, absmax, out, threads),
            Dtype::F16 => typed::<F16>(blocks, codes, values, absmax, out, threads),
            Dtype::Bf16 => typed::<Bf16>(blocks, codes, values, absmax, out, threads),
        }
    }
}
