//! Launches of matmul4_plain.cu, matmul4_mma.cu, matmul4_broad.cu, matmul4_skinny.cu, matmul4_mid.cu and matmul4_wgmma.cu.

use std::ffi::c_void;

use super::device::{Device, device};
use super::kernel::Kernel;
use super::launch::{Grid, Launch, arguments};
use super::matmul4_choice as choice;
use super::matmul4_elsewhere::{Cores, broad_runs, elsewhere};
use super::product::{Product, mid_tiles};
use super::tensor_map::{Element, Matrix, TensorMap};
use crate::blockwise::Absmax;
use crate::matmul4::{Rows, Weight};
use crate::matmul4_instances::{MID, SKINNY, STAGE, WIDE};
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

/// kernels/matmul4_problem.cuh
#[repr(C)]
struct DirectProblem {
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
    settled: i32,
}

/// kernels/matmul4_hopper.cuh
#[repr(C)]
struct HopperProblem {
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
    settled: i32,
}

/// Rows of W in a box of matmul4_wgmma.cu: those of a block.
const WIDE_ROWS: u32 = 128;

/// The weight's codes and scales as boxes of `rows` rows and 256 columns.
fn weight_matrices(weight: &Weight, rows: u32) -> [Matrix; 2] {
    let (element, per_box) = match weight.absmax {
        Absmax::Plain(_) => (Element::F32, 4),
        Absmax::Nested { .. } => (Element::U8, 16),
    };
    [
        Matrix {
            address: weight.codes,
            element: Element::U8,
            shape: (weight.n, weight.k / 2),
            box_shape: (rows, STAGE as u32 / 2),
            swizzled: true,
        },
        Matrix {
            address: weight.absmax.first_address(),
            element,
            shape: (weight.n, weight.k / weight.blocksize),
            box_shape: (rows, per_box),
            swizzled: false,
        },
    ]
}

fn token_matrix(weight: &Weight, x: u64, m: usize, tokens: u32) -> Matrix {
    Matrix { address: x, element: Element::U16, shape: (m, weight.k), box_shape: (tokens, 64), swizzled: true }
}

/// Whether tensor cores take the problem: 16-bit activations, and blocks of at least 64 columns that lie within a row.
fn fits_tensor_cores(weight: &Weight, rows: &Rows) -> bool {
    let within = weight.blocksize >= 64 && weight.k > 0 && weight.k.is_multiple_of(weight.blocksize);
    let aligned = rows.x.is_multiple_of(16) && weight.codes.is_multiple_of(16);
    rows.dtype != Dtype::F32 && within && aligned
}

/// Whether the Hopper kernels then do as well: rows that the copy engine can read, and sizes of 30 bits.
fn fits_hopper(weight: &Weight, m: usize) -> bool {
    weight_matrices(weight, 1).iter().all(Matrix::is_copyable)
        && token_matrix(weight, 0, m, 1).is_copyable()
        && weight.n.max(weight.k).max(m) < 1 << 30
}

/// The kernel that multiplies `m` tokens with a weight; none where the caller dequantizes panels.
fn choose(weight: &Weight, m: usize, tensor_cores: bool, device: &Device) -> Option<Product> {
    let cores = match device.major {
        _ if !tensor_cores => Cores::None,
        9 | 10 => Cores::FastMemory,
        _ => Cores::SlowMemory,
    };
    let (n, k, multiprocessors) = (weight.n, weight.k, device.multiprocessors as usize);
    if tensor_cores && device.is_hopper() && fits_hopper(weight, m) {
        choice::on_hopper(m, n, k, matches!(weight.absmax, Absmax::Nested { .. }), multiprocessors)
    } else {
        elsewhere(m, n, k, cores, multiprocessors)
    }
}

/// # Safety
/// As [`crate::matmul4::matmul_4bit`].
pub unsafe fn matmul_4bit(weight: Weight, rows: Rows, ordinal: usize, stream: u64) -> Result<bool> {
    let device = device(ordinal)?;
    let tensor_cores = device.major >= 8 && fits_tensor_cores(&weight, &rows);
    let multiprocessors = device.multiprocessors as usize;
    let Some(product) = choose(&weight, rows.m, tensor_cores, device) else { return Ok(false) };
    let call = Call { weight: &weight, rows: &rows, product, device: ordinal, stream, multiprocessors };
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match product {
            Product::Plain => call.few(8)?,
            Product::Mma(_) => call.few(16)?,
            Product::Broad(instance) => call.broad(instance)?,
            Product::Skinny(instance) => call.skinny(instance)?,
            Product::Mid(instance) => call.mid(instance)?,
            Product::Wide(instance) => call.wide(instance)?,
        }
    }
    Ok(true)
}

/// See [`crate::matmul4::Kept::workspace_size`]. Products that need one are those of tensor cores.
pub fn workspace_size(weight: Weight, m: usize, ordinal: usize) -> Result<usize> {
    let device = device(ordinal)?;
    let product = choose(&weight, m, device.major >= 8, device);
    Ok(choice::workspace_size(product, m, weight.n, weight.k, device.multiprocessors as usize))
}

fn describe(weight: &Weight, rows: &Rows) -> String {
    let (m, n, k) = (rows.m, weight.n, weight.k);
    format!("{m} x {k} of {} by {n} x {k} in blocks of {}", rows.dtype.suffix(), weight.blocksize)
}

/// One product, with what its launch needs.
struct Call<'a> {
    weight: &'a Weight,
    rows: &'a Rows,
    product: Product,
    device: usize,
    stream: u64,
    multiprocessors: usize,
}

impl Call<'_> {
    /// # Safety
    /// `arguments` are the parameters of the product's kernels, with addresses by the promise of [`matmul_4bit`].
    unsafe fn launch(&self, arguments: &mut [*mut c_void], grid: Grid) -> Result<()> {
        let (weight, rows) = (self.weight, self.rows);
        let nested = matches!(weight.absmax, Absmax::Nested { .. });
        let launch = Launch {
            device: self.device,
            stream: self.stream,
            kernel: Kernel::Matmul4 { product: self.product, dtype: rows.dtype, nested },
            grid,
            describe: &|| describe(weight, rows),
        };
        // SAFETY: the caller's promise.
        unsafe { launch.run(arguments) }
    }

    fn direct_problem(&self) -> DirectProblem {
        let (weight, rows) = (self.weight, self.rows);
        DirectProblem {
            x: rows.x,
            codes: weight.codes,
            absmax: weight.absmax.first_address(),
            nested: NestedSource::new(weight.absmax),
            bias: rows.bias,
            y: rows.out,
            m: rows.m as i64,
            n: weight.n as i64,
            k: weight.k as i64,
            log2_blocksize: weight.blocksize.trailing_zeros() as i32,
            quant_type: weight.quant_type as i32,
        }
    }

    /// Blocks take so many rows of W at a time: one a warp, or a tile.
    unsafe fn few(&self, block_rows: usize) -> Result<()> {
        let (problem, grid) = (self.direct_problem(), Grid::Resident(self.weight.n.div_ceil(block_rows) as u64));
        // SAFETY: the parameter of matmul4_plain.cu's and matmul4_mma.cu's kernels; memory by the caller's promise.
        unsafe { self.launch(arguments![problem], grid) }
    }

    unsafe fn broad(&self, instance: usize) -> Result<()> {
        let (weight, rows) = (self.weight, self.rows);
        let shared = rows.workspace != 0;
        let runs = broad_runs(instance, rows.m, weight.n, weight.k, self.multiprocessors, shared);
        let split = runs.split(rows.workspace);
        let (problem, grid) = (self.direct_problem(), Grid::Pieces(runs.clusters as u64));
        // SAFETY: the parameters of matmul4_broad.cu's kernels; memory by the caller's promise, and the workspace has the size that the
        // same split asks for.
        unsafe { self.launch(arguments![problem, split], grid) }
    }

    unsafe fn skinny(&self, instance: usize) -> Result<()> {
        let (weight, rows, shape) = (self.weight, self.rows, SKINNY[instance]);
        let tile = 16 * shape.sixteens;
        let [codes, scales] = weight_matrices(weight, tile);
        let problem = SkinnyProblem {
            codes: codes.map()?,
            scales: scales.map()?,
            tokens: token_matrix(weight, rows.x, rows.m, 8 * shape.eights).map()?,
            x: rows.x,
            nested: NestedSource::new(weight.absmax),
            bias: rows.bias,
            y: rows.out,
            m: rows.m as i32,
            n: weight.n as i32,
            k: weight.k as i32,
            log2_blocksize: weight.blocksize.trailing_zeros() as i32,
            quant_type: weight.quant_type as i32,
            settled: i32::from(weight.settled),
        };
        let groups = (shape.warps / shape.split) as usize;
        let grid = Grid::Overlapping(weight.n.div_ceil(tile as usize).div_ceil(groups) as u64);
        // SAFETY: the parameter of matmul4_skinny.cu's kernels; memory by the caller's promise.
        unsafe { self.launch(arguments![problem], grid) }
    }

    unsafe fn mid(&self, instance: usize) -> Result<()> {
        let (shape, split) = (MID[instance], MID[instance].split as usize);
        let problem = problem(self.weight, self.rows, 64 * shape.groups, shape.columns)?;
        let clusters = mid_tiles(instance, self.rows.m, self.weight.n).min(self.multiprocessors / split);
        // SAFETY: the parameter of matmul4_mid.cu's kernels; memory by the caller's promise.
        unsafe { self.launch(arguments![problem], Grid::Overlapping((clusters * split) as u64)) }
    }

    unsafe fn wide(&self, instance: usize) -> Result<()> {
        let (weight, rows) = (self.weight, self.rows);
        let problem = problem(weight, rows, WIDE_ROWS, WIDE[instance].columns / 2)?;
        let shared = rows.workspace != 0;
        let runs = choice::wide_runs(instance, rows.m, weight.n, weight.k, self.multiprocessors, shared);
        let grid = Grid::Overlapping(2 * runs.clusters as u64);
        let split = runs.split(rows.workspace);
        // SAFETY: the parameters of matmul4_wgmma.cu's kernels; memory by the caller's promise, and the workspace has the size that the
        // same split asks for.
        unsafe { self.launch(arguments![problem, split], grid) }
    }
}

/// The problem of a kernel whose boxes have so many rows and tokens.
fn problem(weight: &Weight, rows: &Rows, box_rows: u32, box_tokens: u32) -> Result<HopperProblem> {
    let [codes, scales] = weight_matrices(weight, box_rows);
    Ok(HopperProblem {
        codes: codes.map()?,
        scales: scales.map()?,
        tokens: token_matrix(weight, rows.x, rows.m, box_tokens).map()?,
        nested: NestedSource::new(weight.absmax),
        bias: rows.bias,
        y: rows.out,
        m: rows.m as i32,
        n: weight.n as i32,
        k: weight.k as i32,
        log2_blocksize: weight.blocksize.trailing_zeros() as i32,
        quant_type: weight.quant_type as i32,
        settled: i32::from(weight.settled),
    })
}
