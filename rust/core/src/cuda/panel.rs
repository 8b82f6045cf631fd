//! Launches of panel.cu.

use super::kernel::Kernel;
use super::launch::{Grid, Launch, arguments};
use crate::blockwise::Absmax;
use crate::matmul4::Weight;
use crate::panel::{Panel, Rows};
use crate::{Dtype, Result};

/// Vectors of 16 bytes that a block takes at a time: 256 threads, four each.
const TILE: usize = 1024;

/// # Safety
/// As [`crate::panel::dequantize`].
pub unsafe fn dequantize(
    weight: Weight,
    panel: Panel,
    dtype: Dtype,
    out: u64,
    device: usize,
    stream: u64,
) -> Result<()> {
    let (indices, wide, first_row) = match panel.rows {
        Rows::From(first) => (0, 0, first as i64),
        Rows::Indices { address, wide } => (address, i32::from(wide), 0),
    };
    let (n, k, first_column) = (weight.n as i64, weight.k as i64, panel.first_column as i64);
    let (rows, columns) = (panel.count as i64, panel.columns as i64);
    let (log2_blocksize, quant_type) = (weight.blocksize.trailing_zeros() as i32, weight.quant_type as i32);
    let grid = Grid::Pieces((panel.count * panel.columns).div_ceil(TILE * (16 / dtype.size())) as u64);
    let describe = || {
        let (suffix, blocksize) = (dtype.suffix(), weight.blocksize);
        format!("{rows} x {columns} of a weight of {n} x {k}, {suffix}, block size {blocksize}")
    };
    let codes = weight.codes;
    match weight.absmax {
        Absmax::Plain(absmax) => {
            let launch = Launch { device, stream, kernel: Kernel::Panel(dtype), grid, describe: &describe };
            // SAFETY: the parameters of dequantize_4bit_panel_*, in order; memory by the caller's promise.
            unsafe {
                launch.run(arguments![
                    codes,
                    absmax,
                    indices,
                    wide,
                    first_row,
                    n,
                    k,
                    first_column,
                    rows,
                    columns,
                    out,
                    log2_blocksize,
                    quant_type
                ])
            }
        }
        Absmax::Nested { codes: absmax_codes, code, absmax, blocksize, offset } => {
            let log2_nested = blocksize.trailing_zeros() as i32;
            let launch = Launch { device, stream, kernel: Kernel::PanelNested(dtype), grid, describe: &describe };
            // SAFETY: the parameters of dequantize_4bit_panel_nested_*, in order; memory by the caller's promise.
            unsafe {
                launch.run(arguments![
                    codes,
                    absmax_codes,
                    code,
                    absmax,
                    log2_nested,
                    offset,
                    indices,
                    wide,
                    first_row,
                    n,
                    k,
                    first_column,
                    rows,
                    columns,
                    out,
                    log2_blocksize,
                    quant_type
                ])
            }
        }
    }
}
