//! Dequantization, block by block: `out = code * absmax`, one float32 product rounded once.
//!
//! A 4-bit block has sixteen possible results, so they are computed once a block and looked up.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
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
#[cfg(target_arch = "x86_64")]
use super::{avx512_code256, avx512_planes};
use super::{code_values, pages, pool};
use crate::blockwise::{Absmax, Blocks};
use crate::codebook::dynamic_map;
use crate::{QuantType, Result};

/// The signed dynamic map, which stands for an absent code.
pub(super) static DYNAMIC: LazyLock<Values> = LazyLock::new(|| Values::new(dynamic_map(true)));
/// The unsigned dynamic map.
pub(super) static DYNAMIC_UNSIGNED: LazyLock<Values> = LazyLock::new(|| Values::new(dynamic_map(false)));

/// A 256-entry code, ready to decode.
pub(super) struct Values {
    values: [f32; 256],
    #[cfg(target_arch = "x86_64")]
    in_registers: bool,
    #[cfg(target_arch = "x86_64")]
    planes: Option<Box<avx512_planes::Planes>>,
}

impl Values {
    fn new(values: [f32; 256]) -> Self {
        #[cfg(target_arch = "x86_64")]
        let in_registers = Path::chosen().is_avx512() && values.iter().all(|value| value.is_finite());
        Self {
            values,
            #[cfg(target_arch = "x86_64")]
            planes: in_registers.then(|| avx512_planes::Planes::new(&values)).flatten(),
            #[cfg(target_arch = "x86_64")]
            in_registers,
        }
    }
}

/// The scale of a block.
pub(super) enum Scales {
    Plain(*const f32),
    Nested { codes: *const u8, code: Box<[f32; 256]>, absmax: *const f32, log2_blocksize: u32, offset: f32 },
}

// SAFETY: the pointers are to memory that the caller lends for reading, from any thread, until the call is over.
unsafe impl Sync for Scales {}

impl Scales {
    /// # Safety
    /// The addresses hold the maxima of a tensor's blocks, for as long as the value lives.
    pub(super) unsafe fn new(absmax: Absmax) -> Self {
        match absmax {
            Absmax::Plain(absmax) => Self::Plain(absmax as *const f32),
            Absmax::Nested { codes, code, absmax, blocksize, offset } => Self::Nested {
                codes: codes as *const u8,
                // SAFETY: the caller promises 256 float32 at `code` and one at `offset`.
                code: Box::new(unsafe { code_values(code) }.unwrap_or(DYNAMIC.values)),
                absmax: absmax as *const f32,
                log2_blocksize: blocksize.trailing_zeros(),
                // SAFETY: as above.
                offset: unsafe { (offset as *const f32).read_unaligned() },
            },
        }
    }

    /// # Safety
    /// `block` is a block of the tensor.
    #[inline(always)]
    pub(super) unsafe fn get(&self, block: usize) -> f32 {
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

#[cfg(target_arch = "x86_64")]
impl Scales {
    /// The scales of `count` blocks side by side: where they are, or decoded to `scratch`.
    ///
    /// # Safety
    /// The processor has AVX-512; the blocks from `first` on are blocks of the tensor.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    pub(super) unsafe fn run(&self, first: usize, count: usize, scratch: &mut Vec<f32>) -> *const f32 {
        if let Self::Plain(absmax) = self {
            return absmax.wrapping_add(first);
        }
        scratch.resize(count.next_multiple_of(16), 0.0);
        for (i, scales) in scratch.chunks_exact_mut(16).enumerate() {
            // SAFETY: the caller's promise; sixteen floats have room for sixteen.
            unsafe { _mm512_storeu_ps(scales.as_mut_ptr(), self.sixteen(first + 16 * i, (count - 16 * i).min(16))) };
        }
        scratch.as_ptr()
    }

    /// The scales of up to sixteen blocks.
    ///
    /// # Safety
    /// As of [`Self::run`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    pub(super) unsafe fn sixteen(&self, first: usize, count: usize) -> __m512 {
        let present = ((1u32 << count) - 1) as __mmask16;
        // SAFETY: only what belongs to the caller's blocks is read.
        unsafe {
            match self {
                Self::Plain(absmax) => _mm512_maskz_loadu_ps(present, absmax.add(first)),
                Self::Nested { codes, code, absmax, log2_blocksize, offset } => {
                    let codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(present, codes.add(first).cast()));
                    let values = avx512_code256::Table256::new(code).look_up(codes);
                    // A nested block has at least 32 blocks, so sixteen of them lie in two at most.
                    let (nested, last) = (first >> log2_blocksize, (first + count - 1) >> log2_blocksize);
                    let boundary = (last << log2_blocksize).saturating_sub(first);
                    let in_last = if last > nested { u32::MAX << boundary } else { 0 };
                    let absmax = _mm512_mask_blend_ps(
                        in_last as __mmask16,
                        _mm512_set1_ps(absmax.add(nested).read_unaligned()),
                        _mm512_set1_ps(absmax.add(last).read_unaligned()),
                    );
                    _mm512_add_ps(_mm512_mul_ps(values, absmax), _mm512_set1_ps(*offset))
                }
            }
        }
    }
}

/// Asks for a line of the cache. Only a hint, for any address.
#[inline(always)]
fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64; a prefetch reads nothing that could fault.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// A 4-bit tensor.
pub(super) struct Tensor4<'a> {
    pub codes: *const u8,
    pub values: &'a [f32; 16],
    pub scales: &'a Scales,
    pub blocksize: usize,
}

// SAFETY: the pointer is to memory that the caller lends for reading, from any thread, until the call is over.
unsafe impl Sync for Tensor4<'_> {}

impl Tensor4<'_> {
    /// Asks for the codes and the scales of `count` elements, wherever they are: they will be read soon.
    #[inline(always)]
    pub(super) fn prefetch(&self, start: usize, count: usize) {
        for offset in (0..count / 2).step_by(64) {
            prefetch(self.codes.wrapping_add(start / 2 + offset));
        }
        let block = start >> self.blocksize.trailing_zeros();
        match self.scales {
            Scales::Plain(absmax) => prefetch(absmax.wrapping_add(block).cast()),
            Scales::Nested { codes, .. } => prefetch(codes.wrapping_add(block)),
        }
    }
}

/// Elements `start..end`, which need not be whole blocks nor whole bytes, to `out`.
///
/// # Safety
/// The tensor has `end` elements and the scales of their blocks; `out` has room for `end - start`.
#[inline(always)]
pub(super) unsafe fn run_of_elements<T: Lookup>(tensor: &Tensor4, start: usize, end: usize, out: *mut T) {
    let log2_blocksize = tensor.blocksize.trailing_zeros();
    let mut at = start;
    while at < end {
        let block = at >> log2_blocksize;
        let stop = end.min((block + 1) << log2_blocksize);
        // SAFETY: the elements up to `stop` lie within the caller's tensor and in one block.
        unsafe {
            let (scale, out) = (tensor.scales.get(block), out.add(at - start));
            let codes = tensor.codes.add(at / 2);
            #[cfg(target_arch = "x86_64")]
            if at.is_multiple_of(2)
                && (stop - at).is_multiple_of(32)
                && Path::chosen().is_avx512()
                && avx512::dequantize_block(codes, tensor.values, scale, out, stop - at)
            {
                at = stop;
                continue;
            }
            let results = tensor.values.map(|value| T::narrow(value * scale));
            if at.is_multiple_of(2) {
                expand(codes, &results, out, stop - at);
            } else {
                out.write_unaligned(results[usize::from(*codes & 15)]);
                expand(codes.add(1), &results, out.add(1), stop - at - 1);
            }
        }
        at = stop;
    }
}

multiversion! {
    unsafe fn run_4bit[T: Lookup][T](tensor: &Tensor4, start: usize, end: usize, out: *mut T) => run_of_elements
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
        pages::advise_huge(out, blocks.n * size_of::<T>());
        let Blocks { n, blocksize, .. } = blocks;
        let tensor = Tensor4 { codes: codes as *const u8, values, scales, blocksize };
        pool::run(blocks.count(), blocksize * size_of::<T>(), threads, |first, last| {
            let (start, end) = (first * blocksize, (last * blocksize).min(n));
            // SAFETY: the caller's promise; parts are runs of whole blocks and do not overlap.
            unsafe { run_4bit(&tensor, start, end, (out as *mut T).wrapping_add(start)) };
        })
    }
    // SAFETY: the caller's promise; `T` is the dtype's type.
    unsafe {
        let scales = Scales::new(absmax);
        let values = quant_type.values();
        for_dtype!(blocks.dtype, T => typed::<T>(blocks, codes, values, &scales, out, threads))
    }
}

/// Elements decoded at a time: enough that vector code does not wait for the look-ups before it.
const RUN: usize = 256;

#[inline(always)]
unsafe fn blocks_8bit<T: Wide>(
    codes: *const u8,
    values: &Values,
    absmax: *const f32,
    out: *mut T,
    n: usize,
    blocksize: usize,
) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: only where the processor has AVX-512.
    let table = (values.in_registers && (values.planes.is_none() || blocksize < 64))
        .then(|| unsafe { avx512_code256::Table256::new(&values.values) });
    for (block, start) in (0..n).step_by(blocksize).enumerate() {
        let end = n.min(start + blocksize);
        // SAFETY: the block lies within the caller's `n` codes and elements, its scale within the blocks.
        unsafe {
            let scale = absmax.add(block).read_unaligned();
            #[cfg(target_arch = "x86_64")]
            if end - start == blocksize {
                let (codes, out) = (codes.add(start), out.add(start));
                let done = match (&values.planes, &table) {
                    (Some(planes), _) if blocksize.is_multiple_of(64) => {
                        avx512_planes::dequantize_8bit(codes, planes, scale, out, blocksize)
                    }
                    (_, Some(table)) => avx512_code256::dequantize_8bit(codes, table, scale, out, blocksize),
                    _ => false,
                };
                if done {
                    continue;
                }
            }
            for first in (start..end).step_by(RUN) {
                decode_8bit(codes.add(first), &values.values, scale, out.add(first), RUN.min(end - first));
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
    /// Expands `n` codes, whose blocks have their scales at `absmax`.
    ///
    /// # Safety
    /// `codes` holds `n` bytes, `absmax` one float32 a block, `out` has room for `n` elements.
    pub(super) unsafe fn run_8bit[T: Wide][T](
        codes: *const u8, values: &Values, absmax: *const f32, out: *mut T, n: usize, blocksize: usize,
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
        values: &Values,
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
    let own = values.map(|values| Values::new(*values));
    let values = own.as_ref().unwrap_or(&DYNAMIC);
    // SAFETY: the caller's promise; `T` is the dtype's type.
    unsafe { for_dtype!(blocks.dtype, T => typed::<T>(blocks, codes, values, absmax, out, threads)) }
}
