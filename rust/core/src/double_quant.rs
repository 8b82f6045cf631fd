//! Double quantization: 4-bit codes whose block maxima are 8-bit codes themselves.
//!
//! `offset = float32(sum(absmax) / count)`, where the sum is exact and rounded once to float64, so that it does not depend on the
//! order that a device adds in; `absmax - offset` is quantized in blocks of 256 with the signed dynamic map.

use crate::blockwise::{Blocks, check_addresses};
use crate::{Error, QuantType, Result, Target, cpu, cuda};

/// Maxima in a nested block.
pub const NESTED_BLOCKSIZE: usize = 256;
/// As many values as an exact sum has room for.
const MAX_COUNT: usize = 1 << 30;
/// Blocks of a launch that sums the maxima; exact_sum.cuh has the same.
pub(crate) const MAX_SUMS: usize = 1024;
/// Bytes before the maxima: block_sums.cuh's `Sums`, a number padded to 16, and of each sum a float64 and ten words.
pub(crate) const MAXIMA_OFFSET: usize = 16 + MAX_SUMS * (8 + 10 * 4);

/// Addresses of the results.
#[derive(Debug, Clone, Copy)]
pub struct Nested {
    /// One byte a block.
    pub absmax_codes: u64,
    /// One float32 a nested block.
    pub nested_absmax: u64,
    /// One float32.
    pub offset: u64,
}

/// Bytes of workspace that [`quantize_4bit_nested`] needs: sums of the maxima, and the maxima before they are quantized.
pub fn workspace_size(blocks: Blocks) -> usize {
    MAXIMA_OFFSET + blocks.count() * 4
}

/// Quantizes to packed 4-bit codes and their block maxima to 8-bit ones, in two launches.
///
/// # Safety
/// As [`crate::blockwise::quantize_4bit`]; `nested` has room for `count()` bytes, `ceil(count() / 256)` float32 and one float32;
/// `workspace` for [`workspace_size`] bytes, aligned to 16.
///
/// # Errors
/// A null address, more than 2^30 blocks, a driver failure.
pub unsafe fn quantize_4bit_nested(
    blocks: Blocks,
    x: u64,
    quant_type: QuantType,
    codes: u64,
    nested: Nested,
    workspace: u64,
    target: Target,
) -> Result<()> {
    check_addresses(1, &[("offset", nested.offset), ("workspace", workspace)])?;
    check_addresses(
        blocks.n,
        &[("A", x), ("out", codes), ("absmax", nested.absmax_codes), ("nested_absmax", nested.nested_absmax)],
    )?;
    if blocks.count() > MAX_COUNT {
        return Err(Error::argument(
            "A",
            format!("{} blocks", blocks.count()),
            "at most 2^30 blocks with double quantization",
        ));
    }
    if blocks.n == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => {
                cpu::quantize::quantize_4bit_nested(blocks, x, quant_type, codes, nested, workspace, threads)
            }
            Target::Cuda { device, stream } => {
                cuda::blockwise::quantize_4bit_nested(blocks, x, quant_type, codes, nested, workspace, device, stream)
            }
        }
    }
}
