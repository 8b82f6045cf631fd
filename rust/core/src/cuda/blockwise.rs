//! Launches of quantize.cu, dequantize.cu and double_quant.cu.

use super::device::device as device_of;
use super::kernel::Kernel;
use super::launch::{Grid, Launch, arguments};
use crate::blockwise::{Absmax, Blocks};
use crate::double_quant::{MAX_SUMS, MAXIMA_OFFSET, NESTED_BLOCKSIZE, Nested};
use crate::{QuantType, Result};

/// Blocks of quantize.cu. A large tensor has one of 32 warps for each multiprocessor; of a smaller one, whose warps get one tile each
/// (4 vectors of 16 bytes a lane), more multiprocessors get blocks of fewer warps.
fn quantize_grid(blocks: Blocks, multiprocessors: u32) -> Grid {
    let tiles = blocks.n.div_ceil(32 * 4 * (16 / blocks.dtype.size())) as u64;
    // No more than there is room for sums.
    let of_warps = |warps: u32| tiles.div_ceil(warps.into()).min(MAX_SUMS as u64);
    let small = |warps: u32| Grid::Small { blocks: of_warps(warps), threads: warps * 32 };
    match tiles.div_ceil(multiprocessors.into()) {
        ..=8 => small(8),
        9..=32 => small(16),
        _ => Grid::Resident(of_warps(32)),
    }
}

/// Rows of 256 vectors that a block of dequantize.cu takes, and how many blocks that makes: four rows, or one while that leaves
/// fewer blocks than a large GPU has places.
fn dequantize_grid(blocks: Blocks) -> (i32, Grid) {
    let row = 256 * (16 / blocks.dtype.size());
    let rows = if blocks.n < 1024 * row { 1 } else { 4 };
    (rows as i32, Grid::OverlappingPieces(blocks.n.div_ceil(rows * row) as u64))
}

fn describe(blocks: Blocks) -> String {
    format!("{} elements of {}, block size {}", blocks.n, blocks.dtype.suffix(), blocks.blocksize)
}

/// # Safety
/// As [`crate::blockwise::quantize_8bit`].
pub unsafe fn quantize_8bit(
    blocks: Blocks,
    x: u64,
    code: u64,
    codes: u64,
    absmax: u64,
    device: usize,
    stream: u64,
) -> Result<()> {
    let kernel = Kernel::Quantize8(blocks.dtype);
    // SAFETY: the caller's promise; the 4-bit type is not looked at, there are no sums.
    unsafe { quantize(kernel, blocks, x, code, codes, absmax, QuantType::Nf4, 0, device, stream) }
}

/// # Safety
/// As [`crate::blockwise::quantize_4bit`]; `sums` is 0 or the address of [`MAXIMA_OFFSET`] bytes, aligned to 8.
pub unsafe fn quantize_4bit(
    blocks: Blocks,
    x: u64,
    quant_type: QuantType,
    codes: u64,
    absmax: u64,
    sums: u64,
    device: usize,
    stream: u64,
) -> Result<()> {
    let kernel = Kernel::Quantize4(blocks.dtype);
    // SAFETY: the caller's promise.
    unsafe { quantize(kernel, blocks, x, 0, codes, absmax, quant_type, sums, device, stream) }
}

unsafe fn quantize(
    kernel: Kernel,
    blocks: Blocks,
    x: u64,
    code: u64,
    codes: u64,
    absmax: u64,
    quant_type: QuantType,
    sums: u64,
    device: usize,
    stream: u64,
) -> Result<()> {
    let (n, log2_blocksize, quant_type) = (blocks.n as i64, blocks.log2_blocksize(), quant_type as i32);
    let grid = quantize_grid(blocks, device_of(device)?.multiprocessors);
    let launch = Launch { device, stream, kernel, grid, describe: &|| describe(blocks) };
    // SAFETY: the parameters of quantize.cu's kernels, in order; memory by the caller's promise.
    unsafe { launch.run(arguments![x, code, codes, absmax, n, log2_blocksize, quant_type, sums]) }
}

/// # Safety
/// As [`crate::double_quant::quantize_4bit_nested`].
pub unsafe fn quantize_4bit_nested(
    blocks: Blocks,
    x: u64,
    quant_type: QuantType,
    codes: u64,
    nested: Nested,
    workspace: u64,
    device: usize,
    stream: u64,
) -> Result<()> {
    let (sums, absmax) = (workspace, workspace + MAXIMA_OFFSET as u64);
    // SAFETY: the workspace has room for the sums and the maxima, in this order; the rest is the caller's promise.
    unsafe { quantize_4bit(blocks, x, quant_type, codes, absmax, sums, device, stream)? };

    let count = blocks.count();
    let launch = Launch {
        device,
        stream,
        kernel: Kernel::QuantizeAbsmax,
        // Of the 16 warps of a block half are idle where there are few nested blocks: more multiprocessors are busy.
        grid: Grid::Overlapping(count.div_ceil(8 * NESTED_BLOCKSIZE) as u64),
        describe: &|| describe(blocks),
    };
    let Nested { absmax_codes, nested_absmax, offset } = nested;
    let count = count as i64;
    // SAFETY: the parameters of quantize_absmax, in order; memory as above.
    unsafe { launch.run(arguments![absmax, count, sums, offset, absmax_codes, nested_absmax]) }
}

/// # Safety
/// As [`crate::blockwise::dequantize_8bit`].
pub unsafe fn dequantize_8bit(
    blocks: Blocks,
    codes: u64,
    code: u64,
    absmax: u64,
    out: u64,
    device: usize,
    stream: u64,
) -> Result<()> {
    let (n, log2_blocksize) = (blocks.n as i64, blocks.log2_blocksize());
    let kernel = Kernel::Dequantize8(blocks.dtype);
    let (rows, grid) = dequantize_grid(blocks);
    let launch = Launch { device, stream, kernel, grid, describe: &|| describe(blocks) };
    // SAFETY: the parameters of dequantize.cu's 8-bit kernels, in order; memory by the caller's promise.
    unsafe { launch.run(arguments![codes, code, absmax, out, n, log2_blocksize, rows]) }
}

/// # Safety
/// As [`crate::blockwise::dequantize_4bit`].
pub unsafe fn dequantize_4bit(
    blocks: Blocks,
    codes: u64,
    quant_type: QuantType,
    absmax: Absmax,
    out: u64,
    device: usize,
    stream: u64,
) -> Result<()> {
    let (n, log2_blocksize, quant_type) = (blocks.n as i64, blocks.log2_blocksize(), quant_type as i32);
    let (rows, grid) = dequantize_grid(blocks);
    let describe = || describe(blocks);
    match absmax {
        Absmax::Plain(absmax) => {
            let kernel = Kernel::Dequantize4(blocks.dtype);
            let launch = Launch { device, stream, kernel, grid, describe: &describe };
            // SAFETY: the parameters of dequantize_4bit_*, in order; memory by the caller's promise.
            unsafe { launch.run(arguments![codes, absmax, out, n, log2_blocksize, quant_type, rows]) }
        }
        Absmax::Nested { codes: absmax_codes, code, absmax, blocksize, offset } => {
            let log2_nested = blocksize.trailing_zeros() as i32;
            let kernel = Kernel::Dequantize4Nested(blocks.dtype);
            let launch = Launch { device, stream, kernel, grid, describe: &describe };
            // SAFETY: the parameters of dequantize_4bit_nested_*, in order; memory by the caller's promise.
            unsafe {
                launch.run(arguments![
                    codes,
                    absmax_codes,
                    code,
                    absmax,
                    log2_nested,
                    offset,
                    out,
                    n,
                    log2_blocksize,
                    quant_type,
                    rows
                ])
            }
        }
    }
}
