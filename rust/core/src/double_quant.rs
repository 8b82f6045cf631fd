//! Double quantization: 4-bit codes whose block maxima are 8-bit codes themselves.
//!
//! `offset = float32(sum(absmax) / count)`; `absmax - offset` is quantized in blocks of 256 with the signed dynamic map.
//! The float64 sum has one shape on every device: groups of 1024, that is four nested blocks; lane `l` of 32 adds elements
//! `8 l .. 8 l + 8` of each of them in turn, the lanes meet in a butterfly; group sums are summed the same way until one is left.

use crate::blockwise::{Blocks, check_addresses};
use crate::{Error, QuantType, Result, Target, cpu, cuda};

/// Maxima in a nested block.
pub const NESTED_BLOCKSIZE: usize = 256;
/// Values in a group of the sum.
pub const GROUP: usize = 1024;
/// The kernel keeps the sums of groups of groups in shared memory, 1024 of them.
const MAX_COUNT: usize = GROUP * GROUP * 1024;
/// Bytes before the maxima: the counter on which the grid meets, and the partial sums, to a multiple of 16.
pub(crate) fn maxima_offset(count: usize) -> usize {
    COUNTER_BYTES + (count.div_ceil(GROUP) * 8).next_multiple_of(16)
}

/// Bytes before the partial sums.
pub(crate) const COUNTER_BYTES: usize = 16;

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

/// Bytes of workspace that [`quantize_4bit_nested`] needs: a counter, partial sums, and the maxima before they are quantized.
pub fn workspace_size(blocks: Blocks) -> usize {
    let count = blocks.count();
    maxima_offset(count) + count * 4
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

/// The sum of `values` in the shape that all devices share.
pub(crate) fn sum(values: &[f32]) -> f64 {
    let mut level: Vec<f64> = values.chunks(GROUP).map(group_sum).collect();
    while level.len() > 1 {
        level = level.chunks(GROUP).map(group_sum).collect();
    }
    level.first().copied().unwrap_or(0.0)
}

fn group_sum<T: Copy + Into<f64>>(group: &[T]) -> f64 {
    const RUN: usize = NESTED_BLOCKSIZE / 32;
    let mut lanes = [0.0f64; 32];
    for block in group.chunks(NESTED_BLOCKSIZE) {
        if block.len() == NESTED_BLOCKSIZE {
            // All lanes side by side: none waits for its own last sum.
            for i in 0..RUN {
                for (lane, run) in lanes.iter_mut().zip(block.chunks_exact(RUN)) {
                    *lane += run[i].into();
                }
            }
        } else {
            for (lane, run) in lanes.iter_mut().zip(block.chunks(RUN)) {
                for &value in run {
                    *lane += value.into();
                }
            }
        }
    }
    let mut distance = 16;
    while distance > 0 {
        for lane in 0..distance {
            lanes[lane] += lanes[lane + distance];
        }
        distance /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_is_close_to_the_plain_one_and_exact_on_integers() {
        let values: Vec<f32> = (0..100_000).map(|i| (i % 1000) as f32).collect();
        assert_eq!(sum(&values), values.iter().map(|&v| f64::from(v)).sum::<f64>());
        assert_eq!(sum(&[]), 0.0);
        assert_eq!(sum(&[1.5]), 1.5);
    }
}
