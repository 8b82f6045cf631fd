//! Parts of a 4-bit weight, dequantized: a rectangle of it, or rows by their indices.
//!
//! The values are those of [`crate::blockwise::dequantize_4bit`], to the bit. Panels let an ordinary product read a weight of which
//! no full-size copy is ever made; rows by index are an embedding.

use crate::blockwise::{check_absmax, check_addresses};
use crate::matmul4::Weight;
use crate::{Dtype, Error, Result, Target, cpu, cuda};

/// Which rows.
#[derive(Debug, Clone, Copy)]
pub enum Rows {
    /// Consecutive ones, from this one on.
    From(usize),
    /// Those that integers name.
    Indices {
        /// Address of one index a row.
        address: u64,
        /// Whether they are int64, not int32.
        wide: bool,
    },
}

/// A part of a weight.
#[derive(Debug, Clone, Copy)]
pub struct Panel {
    /// Which rows.
    pub rows: Rows,
    /// How many.
    pub count: usize,
    /// The first column of each.
    pub first_column: usize,
    /// How many columns.
    pub columns: usize,
}

/// Raises unless `count` rows or columns from `first` on are some of `size`.
pub(crate) fn check_part(argument: &'static str, first: usize, count: usize, size: usize) -> Result<()> {
    if first.checked_add(count).is_some_and(|end| end <= size) {
        return Ok(());
    }
    Err(Error::argument(argument, format!("{count} from {first} on"), format!("a part of {size}")))
}

/// Writes `count` by `columns` values. An index that names no row is an error on the CPU, before anything is written; on CUDA,
/// where nobody waits to see it, it gives a row of NaN.
///
/// # Safety
/// The addresses hold what the fields say, `out` has room for the values, all on the target's device, and nobody else moves or writes
/// them until the work is done.
///
/// # Errors
/// A null address, a part that is not within the weight, an index that names no row (CPU), a driver failure.
pub unsafe fn dequantize(weight: Weight, panel: Panel, dtype: Dtype, out: u64, target: Target) -> Result<()> {
    let elements = weight.blocks(dtype)?.n;
    check_part("columns", panel.first_column, panel.columns, weight.k)?;
    if let Rows::From(first) = panel.rows {
        check_part("rows", first, panel.count, weight.n)?;
    }
    let values = panel.count.checked_mul(panel.columns).filter(|&values| values <= isize::MAX as usize / 8);
    let values =
        values.ok_or_else(|| Error::argument("indices", panel.count, "a result that fits the address space"))?;
    check_addresses(elements, &[("B", weight.codes)])?;
    check_absmax(elements, weight.absmax)?;
    check_addresses(values, &[("out", out)])?;
    if let Rows::Indices { address, .. } = panel.rows {
        check_addresses(panel.count, &[("indices", address)])?;
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => cpu::panel::dequantize(weight, panel, dtype, out, threads),
            Target::Cuda { .. } if values == 0 => Ok(()),
            Target::Cuda { device, stream } => cuda::panel::dequantize(weight, panel, dtype, out, device, stream),
        }
    }
}
