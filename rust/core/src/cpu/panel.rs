//! Parts of a 4-bit weight: rows of a panel are runs of the flattened weight.

use super::dequantize::{Scales, Tensor4, run_of_elements};
use super::element::for_dtype;
use super::path::multiversion;
use super::pool;
use super::table_lookup::Lookup;
use crate::matmul4::Weight;
use crate::panel::{Panel, Rows};
use crate::{Dtype, Error, Result};

/// Rows `first..last` of a panel.
struct Part<'a, T> {
    tensor: &'a Tensor4<'a>,
    weight: Weight,
    panel: Panel,
    out: *mut T,
    first: usize,
    last: usize,
}

/// The index at a place.
///
/// # Safety
/// `address` holds more than `place` indices.
#[inline(always)]
unsafe fn index(address: u64, wide: bool, place: usize) -> i64 {
    // SAFETY: the caller's promise; read_unaligned asks no more of the address.
    unsafe {
        if wide {
            (address as *const i64).add(place).read_unaligned()
        } else {
            i64::from((address as *const i32).add(place).read_unaligned())
        }
    }
}

#[inline(always)]
unsafe fn rows_4bit<T: Lookup>(part: &Part<T>) {
    let Panel { rows, first_column, columns, .. } = part.panel;
    for row in part.first..part.last {
        // SAFETY: the rows of a run lie within the weight, and indices have been checked; the caller promised the memory.
        unsafe {
            let of_weight = match rows {
                Rows::From(first) => first + row,
                Rows::Indices { address, wide } => index(address, wide, row) as usize,
            };
            let start = of_weight * part.weight.k + first_column;
            run_of_elements(part.tensor, start, start + columns, part.out.add(row * columns));
        }
    }
}

multiversion! {
    unsafe fn run_rows[T: Lookup][T](part: &Part<T>) => rows_4bit
}

/// # Safety
/// As [`crate::panel::dequantize`].
pub(crate) unsafe fn dequantize(weight: Weight, panel: Panel, dtype: Dtype, out: u64, threads: usize) -> Result<()> {
    unsafe fn typed<T: Lookup>(tensor: &Tensor4, weight: Weight, panel: Panel, out: u64, threads: usize) -> Result<()> {
        pool::run(panel.count, panel.columns * size_of::<T>(), threads, |first, last| {
            let part = Part { tensor, weight, panel, out: out as *mut T, first, last };
            // SAFETY: the caller's promise; parts do not overlap.
            unsafe { run_rows(&part) };
        })
    }
    if let Rows::Indices { address, wide } = panel.rows {
        for place in 0..panel.count {
            // SAFETY: the caller promises `count` indices.
            let row = unsafe { index(address, wide, place) };
            if usize::try_from(row).map_or(true, |row| row >= weight.n) {
                return Err(Error::Index { row, place, rows: weight.n });
            }
        }
    }
    if panel.count * panel.columns == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise; `T` is the dtype's type.
    unsafe {
        let scales = Scales::new(weight.absmax);
        let values = weight.quant_type.values();
        let tensor = Tensor4 { codes: weight.codes as *const u8, values, scales: &scales, blocksize: weight.blocksize };
        for_dtype!(dtype, T => typed::<T>(&tensor, weight, panel, out, threads))
    }
}
