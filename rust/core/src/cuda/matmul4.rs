//! Launches of matmul4_plain.cu, matmul4_mma.cu, matmul4_skinny.cu, matmul4_mid.cu and matmul4_wgmma.cu.

use super::device::device;
use super::launch::{Grid, Kernel, Launch};
use super::matmul4_choice::{self as choice, Path};
use super::tensor_map::{Element, Matrix, TensorMap};
use crate::blockwise::Absmax;
use crate::matmul4::{Rows, Weight};
use crate::matmul4_instances::{MID, SKINNY, STAGE, Skinny, Tokens, WIDE};
use crate::{Dtype, Result};

/// kernels/matmul4.cuh
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct NestedSource {
    code: u64,
    absmax: u64,
    offset: u64,
    log2_blocksize: i32,
}

impl NestedSource {
    fn new(absmax: Absmax) -> Self {
        match absmax {
            Absmax::Plain(_) => Self { code: 0, absmax: 0, offset: 0, log2_blocksize: 0 },
            Absmax::Nested { code, absmax, blocksize, offset, .. } => {
                Self { code, absmax, offset, log2_blocksize: blocksize.trailing_zeros() as i32 }
            }
        }
    }
}

/// kernels/matmul4_plain.cu and kernels/matmul4_mma.cu
#[repr(C)]
struct PlainProblem {
    x: u64,
    codes: u64,
    absmax: u64,
    nested: NestedSource,
    bias: u64,
    y: u64,
    m: i64,
    n: i64,
    k: i64,
    log2_blocksize: i32,
    quant_type: i32,
}

/// kernels/matmul4_skinny.cu
#[repr(C)]
struct SkinnyProblem {
    codes: TensorMap,
    scales: TensorMap,
    tokens: TensorMap,
    x: u64,
    nested: NestedSource,
    bias: u64,
    y: u64,
    m: i32,
    n: i32,
    k: i32,
    log2_blocksize: i32,
    quant_type: i32,
    ahead: i32,
    early: i32,
}

/// kernels/matmul4_mid.cu and kernels/matmul4_wgmma.cu
#[repr(C)]
struct WideProblem {
    codes: TensorMap,
    scales: TensorMap,
    tokens: TensorMap,
    nested: NestedSource,
    bias: u64,
    y: u64,
    m: i32,
    n: i32,
    k: i32,
    log2_blocksize: i32,
    quant_type: i32,
}

/// Rows of W in a box of matmul4_wgmma.cu, and of a cluster of two blocks.
const WIDE_ROWS: usize = 128;

/// The weight's codes and scales as boxes of `rows` rows and 256 columns.
fn weight_matrices(weight: &Weight, rows: u32) -> [Matrix; 2] {
    let (element, address) = match weight.absmax {
        Absmax::Plain(absmax) => (Element::F32, absmax),
        Absmax::Nested { codes, .. } => (Element::U8, codes),
    };
    let per_box = if element == Element::F32 { 4 } else { 16 };
    [
        Matrix {
            address: weight.codes,
            element: Element::U8,
            shape: (weight.n, weight.k / 2),
            box_shape: (rows, STAGE as u32 / 2),
            swizzled: true,
        },
        Matrix {
            address,
            element,
            shape: (weight.n, weight.k / weight.blocksize),
            box_shape: (rows, per_box),
            swizzled: false,
        },
    ]
}

fn token_matrix(weight: &Weight, rows: &Rows, tokens: u32) -> Matrix {
    Matrix {
        address: rows.x,
        element: Element::U16,
        shape: (rows.m, weight.k),
        box_shape: (tokens, 64),
        swizzled: true,
    }
}

/// Whether tensor cores take the problem: 16-bit activations, and blocks of at least 64 columns that lie within a row.
fn fits_tensor_cores(weight: &Weight, rows: &Rows) -> bool {
    let within = weight.blocksize >= 64 && weight.k > 0 && weight.k.is_multiple_of(weight.blocksize);
    let aligned = rows.x.is_multiple_of(16) && weight.codes.is_multiple_of(16);
    rows.dtype != Dtype::F32 && within && aligned
}

/// Whether the Hopper kernels do: rows that the copy engine can read, and sizes of 30 bits.
fn fits_hopper(weight: &Weight, rows: &Rows) -> bool {
    weight_matrices(weight, 1).iter().all(Matrix::is_copyable)
        && token_matrix(weight, rows, 1).is_copyable()
        && weight.n.max(weight.k).max(rows.m) < 1 << 30
}

/// # Safety
/// As [`crate::matmul4::matmul_4bit`].
pub unsafe fn matmul_4bit(weight: Weight, rows: Rows, ordinal: usize, stream: u64) -> Result<bool> {
    let device = device(ordinal)?;
    choice::check_forced()?;
    let tensor_cores = device.major >= 8 && fits_tensor_cores(&weight, &rows);
    let path = if tensor_cores && device.target == "sm_90a" && fits_hopper(&weight, &rows) {
        choice::on_hopper(rows.m, weight.n, weight.k, device.multiprocessors as usize)
    } else {
        choice::elsewhere(rows.m, tensor_cores)
    };
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match path {
            Path::Plain => plain(&weight, &rows, None, ordinal, stream)?,
            Path::Mma => plain(&weight, &rows, Some(rows.m.div_ceil(8) - 1), ordinal, stream)?,
            Path::Skinny(instance) => skinny(&weight, &rows, instance, ordinal, stream)?,
            Path::Mid(instance) => mid(&weight, &rows, instance, device.multiprocessors, ordinal, stream)?,
            Path::Wide(instance) => wide(&weight, &rows, instance, device.multiprocessors, ordinal, stream)?,
            Path::Panels => return Ok(false),
        }
    }
    Ok(true)
}

fn describe(weight: &Weight, rows: &Rows) -> String {
    let (m, n, k) = (rows.m, weight.n, weight.k);
    format!("{m} x {k} of {} by {n} x {k} in blocks of {}", rows.dtype.suffix(), weight.blocksize)
}

/// matmul4_plain.cu, or an instance of matmul4_mma.cu.
unsafe fn plain(weight: &Weight, rows: &Rows, mma: Option<usize>, device: usize, stream: u64) -> Result<()> {
    let absmax = match weight.absmax {
        Absmax::Plain(absmax) => absmax,
        Absmax::Nested { codes, .. } => codes,
    };
    let problem = PlainProblem {
        x: rows.x,
        codes: weight.codes,
        absmax,
        nested: NestedSource::new(weight.absmax),
        bias: rows.bias,
        y: rows.out,
        m: rows.m as i64,
        n: weight.n as i64,
        k: weight.k as i64,
        log2_blocksize: weight.blocksize.trailing_zeros() as i32,
        quant_type: weight.quant_type as i32,
    };
    let (dtype, nested) = (rows.dtype, is_nested(weight));
    // Rows of a block at a time: one a warp, or a tile.
    let (kernel, block_rows) = match mma {
        None => (Kernel::Plain4 { dtype, nested }, 8),
        Some(instance) => (Kernel::Mma4 { instance, dtype, nested }, 16),
    };
    let grid = Grid::Resident(weight.n.div_ceil(block_rows) as u64);
    let launch = Launch { device, stream, kernel, grid, describe: &|| describe(weight, rows) };
    // SAFETY: the parameter of either file's kernels; memory by the caller's promise.
    unsafe { launch.run(&mut [std::ptr::from_ref(&problem).cast_mut().cast()]) }
}

unsafe fn skinny(weight: &Weight, rows: &Rows, instance: usize, device: usize, stream: u64) -> Result<()> {
    let shape: &Skinny = &SKINNY[instance];
    let tile = 16 * shape.sixteens;
    let [codes, scales] = weight_matrices(weight, tile);
    let problem = SkinnyProblem {
        codes: codes.map()?,
        scales: scales.map()?,
        tokens: token_matrix(weight, rows, 8 * shape.eights).map()?,
        x: rows.x,
        nested: NestedSource::new(weight.absmax),
        bias: rows.bias,
        y: rows.out,
        m: rows.m as i32,
        n: weight.n as i32,
        k: weight.k as i32,
        log2_blocksize: weight.blocksize.trailing_zeros() as i32,
        quant_type: weight.quant_type as i32,
        ahead: shape.depth as i32,
        early: 0,
    };
    debug_assert!(
        !matches!(shape.tokens, Tokens::Held(stages) if weight.k.div_ceil(STAGE) != (stages * shape.split) as usize)
    );
    let groups = (shape.warps / shape.split) as usize;
    let launch = Launch {
        device,
        stream,
        kernel: Kernel::Skinny4 { instance, dtype: rows.dtype, nested: is_nested(weight) },
        grid: Grid::Overlapping(weight.n.div_ceil(tile as usize).div_ceil(groups) as u64),
        describe: &|| describe(weight, rows),
    };
    // SAFETY: the parameter of matmul4_skinny.cu's kernels; memory by the caller's promise.
    unsafe { launch.run(&mut [std::ptr::from_ref(&problem).cast_mut().cast()]) }
}

/// The problem of a kernel whose boxes have so many rows and tokens.
fn problem(weight: &Weight, rows: &Rows, box_rows: u32, box_tokens: u32) -> Result<WideProblem> {
    let [codes, scales] = weight_matrices(weight, box_rows);
    Ok(WideProblem {
        codes: codes.map()?,
        scales: scales.map()?,
        tokens: token_matrix(weight, rows, box_tokens).map()?,
        nested: NestedSource::new(weight.absmax),
        bias: rows.bias,
        y: rows.out,
        m: rows.m as i32,
        n: weight.n as i32,
        k: weight.k as i32,
        log2_blocksize: weight.blocksize.trailing_zeros() as i32,
        quant_type: weight.quant_type as i32,
    })
}

unsafe fn mid(
    weight: &Weight,
    rows: &Rows,
    instance: usize,
    multiprocessors: u32,
    device: usize,
    stream: u64,
) -> Result<()> {
    let shape = MID[instance];
    let problem = problem(weight, rows, 64 * shape.groups, shape.columns)?;
    let clusters = choice::mid_tiles(instance, rows.m, weight.n).min((multiprocessors / shape.split) as usize);
    let launch = Launch {
        device,
        stream,
        kernel: Kernel::Mid4 { instance, dtype: rows.dtype, nested: is_nested(weight) },
        grid: Grid::Overlapping((clusters * shape.split as usize) as u64),
        describe: &|| describe(weight, rows),
    };
    // SAFETY: the parameter of matmul4_mid.cu's kernels; memory by the caller's promise.
    unsafe { launch.run(&mut [std::ptr::from_ref(&problem).cast_mut().cast()]) }
}

unsafe fn wide(
    weight: &Weight,
    rows: &Rows,
    instance: usize,
    multiprocessors: u32,
    device: usize,
    stream: u64,
) -> Result<()> {
    let columns = WIDE[instance].columns;
    let problem = problem(weight, rows, WIDE_ROWS as u32, columns / 2)?;
    let clusters = weight.n.div_ceil(2 * WIDE_ROWS) * rows.m.div_ceil(columns as usize);
    let launch = Launch {
        device,
        stream,
        kernel: Kernel::Wide4 { instance, dtype: rows.dtype, nested: is_nested(weight) },
        grid: Grid::Overlapping(2 * clusters.min(multiprocessors as usize / 2) as u64),
        describe: &|| describe(weight, rows),
    };
    // SAFETY: the parameter of matmul4_wgmma.cu's kernels; memory by the caller's promise.
    unsafe { launch.run(&mut [std::ptr::from_ref(&problem).cast_mut().cast()]) }
}

fn is_nested(weight: &Weight) -> bool {
    matches!(weight.absmax, Absmax::Nested { .. })
}
