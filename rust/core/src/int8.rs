//! LLM.int8(): products of int8 rows with an int8 weight, columns with outliers in full precision.
//!
//! A row of activations is quantized by its largest magnitude: `codes = rint(x * (127 / scale))`. With a threshold, elements of at least
//! that magnitude are outliers: they count for no scale, have code 0, and mark their column for all rows. The product is
//!
//! `out[i][j] = acc * row[i] * col[j] / 127^2 + sum over outlier columns c of r[i][c] * (W[j][c] * col[j] / 127) + bias[j]`,
//!
//! `acc` the exact integer sum over all columns and `r[i][c] = x[i][c] - codes[i][c] * (row[i] / 127)` what the codes leave over.
//! float32 arithmetic from left to right, rounded once to the output dtype.

use crate::blockwise::check_addresses;
use crate::panel::check_part;
use crate::{Dtype, Error, Result, Target, cpu, cuda};

/// The reciprocal of the largest code, as float32.
pub const INVERSE_127: f32 = 1.0 / 127.0;

/// The reciprocal of its square.
pub const INVERSE_16129: f32 = 1.0 / 16129.0;

/// With more columns a sum of products of int8 may leave int32.
pub const MOST_COLUMNS: usize = (1 << 17) - 1;

/// An int8 weight of `n` rows (output features) and `k` columns (input features): `codes * scale / 127`.
#[derive(Debug, Clone, Copy)]
pub struct Weight {
    /// Address of `n * k` int8.
    pub codes: u64,
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// Address of `n` float32: the largest magnitude of each row.
    pub scales: u64,
}

/// Activations.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    /// Address of `m * k` elements.
    pub x: u64,
    /// Rows (tokens).
    pub m: usize,
    /// Type of the activations, the bias and the result.
    pub dtype: Dtype,
}

/// Quantized rows.
#[derive(Debug, Clone, Copy)]
pub struct Codes {
    /// Address of `m * k` int8.
    pub codes: u64,
    /// Address of `m` float32: the scales.
    pub scales: u64,
    /// Address of `ceil(k / 32)` uint32, or 0: bit `c % 32` of word `c / 32` says whether column `c` holds an outlier.
    pub mask: u64,
}

/// Where a result goes.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// Address of `n` elements, or 0.
    pub bias: u64,
    /// Address of `m * n` elements.
    pub out: u64,
}

/// A rectangle of a weight.
#[derive(Debug, Clone, Copy)]
pub struct Rectangle {
    /// The first row.
    pub first_row: usize,
    /// How many rows.
    pub rows: usize,
    /// The first column.
    pub first_column: usize,
    /// How many columns.
    pub columns: usize,
}

/// Elements of a matrix, or an error that names the argument.
fn elements(argument: &'static str, rows: usize, columns: usize) -> Result<usize> {
    rows.checked_mul(columns)
        .filter(|&elements| elements <= isize::MAX as usize / 8)
        .ok_or_else(|| Error::argument(argument, format!("{rows} x {columns}"), "a matrix that fits the address space"))
}

fn check_threshold(threshold: f32) -> Result<()> {
    if threshold >= 0.0 {
        return Ok(());
    }
    Err(Error::argument("threshold", threshold, "0 (no outliers) or a positive number"))
}

fn check_columns(k: usize) -> Result<()> {
    if k <= MOST_COLUMNS {
        return Ok(());
    }
    Err(Error::argument("k", k, format!("at most {MOST_COLUMNS} columns, whose products' sum fits int32")))
}

/// Checks what products have in common, and returns how many elements the result has.
fn check_product(m: usize, weight: Weight, output: Output) -> Result<usize> {
    check_columns(weight.k)?;
    let results = elements("out", m, weight.n)?;
    if results > 0 {
        check_addresses(elements("weight", weight.n, weight.k)?, &[("weight", weight.codes)])?;
        check_addresses(weight.n, &[("col_scale", weight.scales)])?;
    }
    check_addresses(results, &[("out", output.out)])?;
    Ok(results)
}

/// Quantizes rows of `k` elements. A `threshold` of 0 means that there are no outliers. Bits of the mask are set, none is cleared.
///
/// A NaN makes its row's scale NaN and the codes 0. Without a threshold an infinity makes its row's scale infinite, its own code
/// +-127 and the others 0.
///
/// # Safety
/// The addresses hold what the fields say, on the target's device, and nobody else moves or writes them until the work is done.
///
/// # Errors
/// A null address, a threshold that is negative or NaN, a driver failure.
pub unsafe fn quantize_rows(rows: Rows, k: usize, threshold: f32, to: Codes, target: Target) -> Result<()> {
    check_threshold(threshold)?;
    let count = elements("x", rows.m, k)?;
    check_addresses(count, &[("x", rows.x), ("codes", to.codes)])?;
    check_addresses(rows.m, &[("row_scale", to.scales)])?;
    if rows.m == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => cpu::int8::quantize_rows(rows, k, threshold, to, threads),
            Target::Cuda { device, stream } => cuda::int8::quantize_rows(rows, k, threshold, to, device, stream),
        }
    }
}

/// Multiplies quantized rows with a weight. `rows.x` is read for outlier columns only: 0 will do where there is no mask.
///
/// # Safety
/// As [`quantize_rows`].
///
/// # Errors
/// A null address, too many columns, a driver failure.
pub unsafe fn matmul(rows: Rows, codes: Codes, weight: Weight, output: Output, target: Target) -> Result<()> {
    let results = check_product(rows.m, weight, output)?;
    let count = elements("codes", rows.m, weight.k)?;
    if results == 0 {
        return Ok(());
    }
    check_addresses(count, &[("codes", codes.codes)])?;
    check_addresses(rows.m, &[("row_scale", codes.scales)])?;
    if codes.mask != 0 {
        check_addresses(count, &[("x", rows.x)])?;
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => cpu::int8::matmul(rows, codes, weight, output, threads),
            Target::Cuda { device, stream } => cuda::int8::matmul(rows, codes, weight, output, device, stream),
        }
    }
}

/// Bytes of the target's memory that [`linear`] needs. What they hold does not matter.
///
/// # Errors
/// A driver failure.
pub fn linear_workspace_size(m: usize, n: usize, k: usize, target: Target) -> Result<usize> {
    match target {
        Target::Cpu { .. } => Ok(0),
        Target::Cuda { device, .. } => cuda::int8::linear_workspace_size(m, n, k, device),
    }
}

/// Where in its workspace [`linear`] leaves the bitmask of outlier columns, and of how many masks one after the other that is the union:
/// one, or one for each row. Bits past the last column may be anything. The CPU leaves none: (0, 0).
///
/// # Errors
/// A driver failure.
pub fn masks(m: usize, x: u64, weight: Weight, workspace: u64, target: Target) -> Result<(u64, usize)> {
    match target {
        Target::Cpu { .. } => Ok((0, 0)),
        Target::Cuda { device, .. } => cuda::int8::masks(m, x, weight, workspace, device),
    }
}

/// Quantizes rows and multiplies them with a weight. With a threshold, what [`masks`] speaks of lies from address `mask` on if that is
/// not 0.
///
/// # Safety
/// As [`quantize_rows`]; `workspace` has as many bytes as [`linear_workspace_size`] says, and what begins at `mask` has room for a mask
/// of each row, of 16 at most.
///
/// # Errors
/// A null address, a threshold that is negative or NaN, too many columns, a driver failure.
pub unsafe fn linear(
    rows: Rows,
    threshold: f32,
    weight: Weight,
    output: Output,
    workspace: u64,
    mask: u64,
    target: Target,
) -> Result<()> {
    check_threshold(threshold)?;
    let results = check_product(rows.m, weight, output)?;
    let count = elements("x", rows.m, weight.k)?;
    if results == 0 {
        return Ok(());
    }
    check_addresses(count, &[("x", rows.x)])?;
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => cpu::int8::linear(rows, threshold, weight, output, threads),
            Target::Cuda { device, stream } => {
                cuda::int8::linear(rows, threshold, weight, output, workspace, mask, device, stream)
            }
        }
    }
}

/// The plain product of an int8 matrix `a` of `m` x `k` with the transpose of one of `n` x `k`, int32.
///
/// # Safety
/// As [`quantize_rows`].
///
/// # Errors
/// A null address, too many columns, a driver failure.
pub unsafe fn matmul_int32(a: u64, m: usize, k: usize, b: u64, n: usize, out: u64, target: Target) -> Result<()> {
    check_columns(k)?;
    let results = elements("out", m, n)?;
    let (of_a, of_b) = (elements("a", m, k)?, elements("b", n, k)?);
    check_addresses(results, &[("out", out)])?;
    if results == 0 {
        return Ok(());
    }
    check_addresses(of_a, &[("a", a)])?;
    check_addresses(of_b, &[("b", b)])?;
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => cpu::int8::matmul_int32(a, m, k, b, n, out, threads),
            Target::Cuda { device, stream } => cuda::int8::matmul_int32(a, m, k, b, n, out, device, stream),
        }
    }
}

/// Writes a rectangle of a weight, `code * (scale * (1 / 127))` in float32 and rounded once.
///
/// # Safety
/// As [`quantize_rows`].
///
/// # Errors
/// A null address, a rectangle that is not within the weight, a driver failure.
pub unsafe fn dequantize_panel(weight: Weight, part: Rectangle, out: u64, dtype: Dtype, target: Target) -> Result<()> {
    let count = elements("weight", weight.n, weight.k)?;
    check_part("rows", part.first_row, part.rows, weight.n)?;
    check_part("columns", part.first_column, part.columns, weight.k)?;
    // Parts of a weight that fits the address space, so this product does, too.
    let results = elements("out", part.rows, part.columns)?;
    if results == 0 {
        return Ok(());
    }
    check_addresses(count, &[("weight", weight.codes)])?;
    check_addresses(weight.n, &[("col_scale", weight.scales)])?;
    check_addresses(results, &[("out", out)])?;
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => cpu::int8::dequantize_panel(weight, part, out, dtype, threads),
            Target::Cuda { device, stream } => cuda::int8::dequantize_panel(weight, part, out, dtype, device, stream),
        }
    }
}
