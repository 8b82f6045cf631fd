//! Blockwise quantization: argument checks and the choice between CPU and CUDA.
//!
//! `absmax[b] = max |x[i]|` over the block, `codes[i]` = nearest code to `x[i] / absmax[b]` (see [`crate::codebook`]), and back
//! `out[i] = code[codes[i]] * absmax[b]`, one float32 product rounded once.

use crate::{Dtype, Error, QuantType, Result, Target, cpu, cuda};

/// Addresses and sizes shared by all blockwise operations.
#[derive(Debug, Clone, Copy)]
pub struct Blocks {
    /// Elements of the unquantized tensor.
    pub n: usize,
    /// Elements of a block: a power of two from 32 to 4096.
    pub blocksize: usize,
    /// Type of the unquantized tensor.
    pub dtype: Dtype,
}

impl Blocks {
    /// Checks the block size.
    ///
    /// # Errors
    /// [`Error::Argument`] names `blocksize` or `n`.
    pub fn new(n: usize, blocksize: usize, dtype: Dtype) -> Result<Self> {
        check_blocksize("blocksize", blocksize)?;
        if n > isize::MAX as usize / 8 {
            return Err(Error::argument("n", n, "a tensor that fits the address space"));
        }
        Ok(Self { n, blocksize, dtype })
    }

    /// Number of blocks, the last of which may be short.
    pub fn count(&self) -> usize {
        self.n.div_ceil(self.blocksize)
    }

    pub(crate) fn log2_blocksize(&self) -> i32 {
        self.blocksize.trailing_zeros() as i32
    }
}

fn check_blocksize(argument: &'static str, blocksize: usize) -> Result<()> {
    if (32..=4096).contains(&blocksize) && blocksize.is_power_of_two() {
        return Ok(());
    }
    Err(Error::argument(argument, blocksize, "a power of two from 32 to 4096"))
}

/// Null addresses are accepted only for tensors without elements.
pub(crate) fn check_addresses(n: usize, addresses: &[(&'static str, u64)]) -> Result<()> {
    match addresses.iter().find(|(_, address)| *address == 0 && n > 0) {
        Some((argument, _)) => Err(Error::argument(argument, "a null address", "the address of a tensor")),
        None => Ok(()),
    }
}

/// Where the block scales of a 4-bit tensor are: plain, or themselves quantized to 8 bits.
#[derive(Debug, Clone, Copy)]
pub enum Absmax {
    /// Address of one float32 a block.
    Plain(u64),
    /// `nested_code[codes[b]] * nested_absmax[b / nested_blocksize] + offset`.
    Nested {
        /// Address of one byte a block.
        codes: u64,
        /// Address of 256 float32, or 0 for the signed dynamic map.
        code: u64,
        /// Address of one float32 a nested block.
        absmax: u64,
        /// Blocks in a nested block: a power of two from 32 to 4096.
        blocksize: usize,
        /// Address of one float32.
        offset: u64,
    },
}

impl Absmax {
    /// Address of what there is one of a block: the scales, or their codes.
    pub(crate) fn first_address(self) -> u64 {
        match self {
            Self::Plain(absmax) => absmax,
            Self::Nested { codes, .. } => codes,
        }
    }
}

/// The scales of `n` elements have addresses, and nested ones a block size.
pub(crate) fn check_absmax(n: usize, absmax: Absmax) -> Result<()> {
    match absmax {
        Absmax::Plain(absmax) => check_addresses(n, &[("absmax", absmax)]),
        Absmax::Nested { codes, absmax, blocksize, offset, .. } => {
            check_addresses(n, &[("absmax", codes), ("nested_absmax", absmax), ("offset", offset)])?;
            check_blocksize("nested_blocksize", blocksize)
        }
    }
}

/// Quantizes to 8-bit codes. `code` is the address of 256 float32, or 0 for the signed dynamic map.
///
/// # Safety
/// `x` holds `n` elements, `codes` has room for `n` bytes and `absmax` for `count()` float32, all on the target's device, none
/// of them moved or written by anybody else until the work is done.
///
/// # Errors
/// A null address, a driver failure.
pub unsafe fn quantize_8bit(blocks: Blocks, x: u64, code: u64, codes: u64, absmax: u64, target: Target) -> Result<()> {
    check_addresses(blocks.n, &[("A", x), ("out", codes), ("absmax", absmax)])?;
    if blocks.n == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => {
                let values = cpu::code_values(code);
                cpu::quantize::quantize_8bit(blocks, x, values.as_ref(), codes, absmax, threads)
            }
            Target::Cuda { device, stream } => {
                cuda::blockwise::quantize_8bit(blocks, x, code, codes, absmax, device, stream)
            }
        }
    }
}

/// Quantizes to packed 4-bit codes, the first of each pair in the high nibble.
///
/// # Safety
/// As [`quantize_8bit`], with room for `(n + 1) / 2` bytes at `codes`.
///
/// # Errors
/// A null address, a driver failure.
pub unsafe fn quantize_4bit(
    blocks: Blocks,
    x: u64,
    quant_type: QuantType,
    codes: u64,
    absmax: u64,
    target: Target,
) -> Result<()> {
    check_addresses(blocks.n, &[("A", x), ("out", codes), ("absmax", absmax)])?;
    if blocks.n == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => cpu::quantize::quantize_4bit(blocks, x, quant_type, codes, absmax, threads),
            Target::Cuda { device, stream } => {
                cuda::blockwise::quantize_4bit(blocks, x, quant_type, codes, absmax, 0, device, stream)
            }
        }
    }
}

/// Expands 8-bit codes. `code` is the address of 256 float32, or 0 for the signed dynamic map.
///
/// # Safety
/// `codes` holds `n` bytes, `absmax` `count()` float32, `out` has room for `n` elements, all on the target's device.
///
/// # Errors
/// A null address, a driver failure.
pub unsafe fn dequantize_8bit(
    blocks: Blocks,
    codes: u64,
    code: u64,
    absmax: u64,
    out: u64,
    target: Target,
) -> Result<()> {
    check_addresses(blocks.n, &[("A", codes), ("absmax", absmax), ("out", out)])?;
    if blocks.n == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => {
                let values = cpu::code_values(code);
                cpu::dequantize::dequantize_8bit(blocks, codes, values.as_ref(), absmax, out, threads)
            }
            Target::Cuda { device, stream } => {
                cuda::blockwise::dequantize_8bit(blocks, codes, code, absmax, out, device, stream)
            }
        }
    }
}

/// Expands packed 4-bit codes.
///
/// # Safety
/// `codes` holds `(n + 1) / 2` bytes, `absmax` one scale a block, `out` has room for `n` elements, all on the target's device.
///
/// # Errors
/// A null address, a nested block size that is no power of two, a driver failure.
pub unsafe fn dequantize_4bit(
    blocks: Blocks,
    codes: u64,
    quant_type: QuantType,
    absmax: Absmax,
    out: u64,
    target: Target,
) -> Result<()> {
    check_addresses(blocks.n, &[("A", codes), ("out", out)])?;
    check_absmax(blocks.n, absmax)?;
    if blocks.n == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => {
                cpu::dequantize::dequantize_4bit(blocks, codes, quant_type, absmax, out, threads)
            }
            Target::Cuda { device, stream } => {
                cuda::blockwise::dequantize_4bit(blocks, codes, quant_type, absmax, out, device, stream)
            }
        }
    }
}
