//! LLM.int8() on CUDA: launches of int8_rows.cu, int8_plain.cu, int8_mma.cu, int8_skinny.cu and int8_wgmma.cu.

use std::ffi::c_void;

use super::device::device;
use super::int8_choice::{Circumstances, Int8Product, choose};
use super::kernel::Kernel;
use super::launch::{Grid, Launch, arguments};
use super::runs::token;
use super::tensor_map::{Element, Matrix, TensorMap};
use crate::int8::{Codes, Output, Rectangle, Rows, Weight};
use crate::{Dtype, Result};

/// kernels/int8_rows.cu's `Rows`
#[repr(C)]
struct RowsProblem {
    x: u64,
    codes: u64,
    row_scale: u64,
    mask: u64,
    ready: u64,
    token: u64,
    m: i64,
    k: i64,
    threshold: f32,
    few: i32,
}

/// kernels/int8.cuh
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Operands {
    x: u64,
    codes: u64,
    row_scale: u64,
    weight: u64,
    col_scale: u64,
    mask: u64,
    ready: u64,
    bias: u64,
    out: u64,
    m: i64,
    n: i64,
    k: i64,
}

/// kernels/int8_wgmma.cu
#[repr(C)]
struct WideProblem {
    weight: TensorMap,
    codes: TensorMap,
    x: TensorMap,
    operands: Operands,
}

/// kernels/int8_layout.cuh
#[repr(C)]
struct SkinnyProblem {
    weight: TensorMap,
    codes: TensorMap,
    operands: Operands,
    threshold: f32,
    after_rows: i32,
}

/// Where a launch goes.
#[derive(Clone, Copy)]
struct Queue {
    device: usize,
    stream: u64,
}

/// Quantizes rows; `ready`, where it is not 0, is where the mask's being cleared is told. `few`: they have a mask each, and the product
/// that follows reads W while they are being quantized.
///
/// # Safety
/// As [`crate::int8::quantize_rows`].
unsafe fn rows_to(rows: Rows, k: usize, threshold: f32, to: Codes, ready: u64, few: bool, queue: Queue) -> Result<()> {
    let mask = if threshold > 0.0 { to.mask } else { 0 };
    let ready = if mask == 0 { 0 } else { ready };
    let problem = RowsProblem {
        x: rows.x,
        codes: to.codes,
        row_scale: to.scales,
        mask,
        ready,
        token: token(),
        m: rows.m as i64,
        k: k as i64,
        threshold,
        few: i32::from(few),
    };
    // A warp takes a short row, a block a long one.
    let pieces = if k * rows.dtype.size() <= 2048 { rows.m.div_ceil(8) } else { rows.m };
    let launch = Launch {
        device: queue.device,
        stream: queue.stream,
        kernel: Kernel::Int8Rows(rows.dtype),
        grid: Grid::OverlappingPieces(pieces as u64),
        describe: &|| format!("{} x {k} of {}", rows.m, rows.dtype.suffix()),
    };
    // SAFETY: the parameter of int8_quantize_rows_*; memory by the caller's promise.
    unsafe { launch.run(arguments![problem]) }
}

/// # Safety
/// As [`crate::int8::quantize_rows`].
pub unsafe fn quantize_rows(rows: Rows, k: usize, threshold: f32, to: Codes, device: usize, stream: u64) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { rows_to(rows, k, threshold, to, 0, false, Queue { device, stream }) }
}

fn weight_matrix(weight: Weight, rows: u32) -> Matrix {
    matrix(weight.codes, weight.n, weight.k, rows)
}

/// Boxes of so many rows and 128 columns.
fn matrix(address: u64, rows: usize, k: usize, box_rows: u32) -> Matrix {
    Matrix { address, element: Element::U8, shape: (rows, k), box_shape: (box_rows, 128), swizzled: true }
}

/// Whether Hopper's kernels take operands: rows that the copy engine can read, and sizes of 30 bits.
fn fits_hopper(m: usize, codes: u64, weight: Weight) -> bool {
    weight.k > 0
        && weight_matrix(weight, 1).is_copyable()
        && matrix(codes, m, weight.k, 1).is_copyable()
        && weight.n.max(m) < 1 << 30
}

fn circumstances(m: usize, codes: u64, weight: Weight, own_rows: bool, ordinal: usize) -> Result<Circumstances> {
    let device = device(ordinal)?;
    Ok(Circumstances {
        multiprocessors: device.multiprocessors as usize,
        tensor_cores: device.target != "compute_70",
        copy_engine: device.is_hopper() && fits_hopper(m, codes, weight),
        own_rows,
        workspace: true,
    })
}

/// One product, with what its launch needs.
struct Call {
    operands: Operands,
    product: Int8Product,
    /// None: the int32 sums.
    dtype: Option<Dtype>,
    weight: Weight,
    multiprocessors: usize,
    /// Of rows that the kernel quantizes itself.
    threshold: f32,
    /// The launch before it has quantized the rows for it.
    after_rows: bool,
    /// Where parts of tiles meet, or 0.
    workspace: u64,
    queue: Queue,
}

impl Call {
    /// # Safety
    /// As [`Call::launch_kernel`].
    unsafe fn launch(&self, arguments: &mut [*mut c_void], grid: Grid) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_kernel(Kernel::Int8(self.product, self.dtype), arguments, grid) }
    }

    /// # Safety
    /// `arguments` are the parameters of the product's kernels, with addresses by the promise of [`matmul`].
    unsafe fn launch_kernel(&self, kernel: Kernel, arguments: &mut [*mut c_void], grid: Grid) -> Result<()> {
        let Operands { m, n, k, .. } = self.operands;
        let launch = Launch {
            device: self.queue.device,
            stream: self.queue.stream,
            kernel,
            grid,
            describe: &|| format!("{m} x {k} by {n} x {k} of int8"),
        };
        // SAFETY: the caller's promise.
        unsafe { launch.run(arguments) }
    }

    /// # Safety
    /// As [`matmul`].
    unsafe fn run(&self) -> Result<()> {
        let (operands, weight) = (self.operands, self.weight);
        let (m, n, k) = (operands.m as usize, weight.n, weight.k);
        // SAFETY: the parameters of the kernels; memory by the caller's promise.
        unsafe {
            match self.product {
                Int8Product::Plain => self.launch(arguments![operands], Grid::Overlapping(n.div_ceil(8) as u64)),
                Int8Product::Mma16 | Int8Product::Mma128 => {
                    let rows = if self.product == Int8Product::Mma16 { 16 } else { 128 };
                    let tiles = m.div_ceil(rows) * n.div_ceil(128);
                    self.launch(arguments![operands], Grid::Overlapping(tiles as u64))
                }
                Int8Product::SkinnyOwn
                | Int8Product::SkinnyKept8
                | Int8Product::SkinnyKept16
                | Int8Product::Skinny8
                | Int8Product::Skinny16
                | Int8Product::Skinny32 => {
                    let (rows, tokens) = match self.product {
                        Int8Product::Skinny32 => (32, 32),
                        Int8Product::Skinny16 | Int8Product::SkinnyKept16 => (32, 16),
                        _ => (16, 8),
                    };
                    let map = weight_matrix(weight, rows).map()?;
                    // Own rows do not come by the copy engine.
                    let own = self.product == Int8Product::SkinnyOwn;
                    let codes = if own { map } else { matrix(operands.codes, m, k, tokens).map()? };
                    let problem = SkinnyProblem {
                        weight: map,
                        codes,
                        operands,
                        threshold: self.threshold,
                        after_rows: i32::from(self.after_rows),
                    };
                    self.launch(arguments![problem], Grid::Overlapping(n.div_ceil(rows as usize) as u64))
                }
                Int8Product::Wide64 | Int8Product::Wide128 | Int8Product::Wide256 => {
                    let columns = self.product.columns().unwrap_or(256);
                    let codes = matrix(operands.codes, m, k, columns as u32 / 2).map()?;
                    let x = Matrix {
                        address: operands.x,
                        element: Element::U16,
                        shape: (m, k),
                        box_shape: (columns as u32 / 2, 64),
                        swizzled: true,
                    };
                    // Many outlier columns are for what 16-bit tensor cores and the copy engine take.
                    let many = self.dtype.filter(|dtype| operands.mask != 0 && dtype.size() == 2 && x.is_copyable());
                    let problem = WideProblem {
                        weight: weight_matrix(weight, 128).map()?,
                        codes,
                        x: if many.is_some() { x.map()? } else { codes },
                        operands,
                    };
                    let runs = self.product.runs(m, n, k, self.multiprocessors, self.workspace != 0);
                    let split = runs.split(self.workspace);
                    let (product, grid) = (self.product, Grid::Overlapping(2 * runs.clusters as u64));
                    let Some(dtype) = many else { return self.launch(arguments![problem, split], grid) };
                    // Of two, one finds that the other has all to do.
                    for &outliers in product.outlier_launches(m, n, k, runs) {
                        let kernel = Kernel::Int8Outliers(product, dtype, outliers);
                        self.launch_kernel(kernel, arguments![problem, split], grid)?;
                    }
                    Ok(())
                }
            }
        }
    }
}

/// What all products get; rows of codes where there are any.
fn operands(rows: Rows, codes: Codes, ready: u64, weight: Weight, output: Output) -> Operands {
    Operands {
        x: rows.x,
        codes: codes.codes,
        row_scale: codes.scales,
        weight: weight.codes,
        col_scale: weight.scales,
        mask: codes.mask,
        ready,
        bias: output.bias,
        out: output.out,
        m: rows.m as i64,
        n: weight.n as i64,
        k: weight.k as i64,
    }
}

/// # Safety
/// As [`crate::int8::matmul`]; the result has elements.
pub unsafe fn matmul(
    rows: Rows,
    codes: Codes,
    weight: Weight,
    output: Output,
    device: usize,
    stream: u64,
) -> Result<()> {
    let at = Circumstances { workspace: false, ..circumstances(rows.m, codes.codes, weight, false, device)? };
    let call = Call {
        operands: operands(rows, codes, 0, weight, output),
        product: choose(rows.m, weight.n, weight.k, at)?,
        dtype: Some(rows.dtype),
        weight,
        multiprocessors: at.multiprocessors,
        threshold: 0.0,
        after_rows: false,
        workspace: 0,
        queue: Queue { device, stream },
    };
    // SAFETY: the caller's promise.
    unsafe { call.run() }
}

/// Where things lie in the workspace of [`linear`], in bytes from its first address that is a multiple of `ALIGNMENT`.
struct Layout {
    mask: usize,
    scales: usize,
    codes: usize,
    parts: usize,
}

const ALIGNMENT: usize = 256;
/// Of kernels/int8.cuh's flags, `FLAGS` times `FLAG_STRIDE` numbers.
const FLAG_BYTES: usize = 16 * 16 * 8;

/// Rows that may have a mask each.
const MASKS: usize = 16;

impl Layout {
    /// The flags that the mask is cleared lie first.
    fn new(m: usize, k: usize) -> Self {
        let after = |start: usize, bytes: usize| (start + bytes).next_multiple_of(ALIGNMENT);
        let mask = FLAG_BYTES;
        let scales = after(mask, 4 * k.div_ceil(32) * m.min(MASKS));
        let codes = after(scales, 4 * m);
        Self { mask, scales, codes, parts: after(codes, m * k) }
    }
}

/// Bytes that [`linear`] needs, whichever way it takes: that depends on addresses, too.
pub fn linear_workspace_size(m: usize, n: usize, k: usize, ordinal: usize) -> Result<usize> {
    if m == 0 || n == 0 {
        return Ok(0);
    }
    let aligned = Weight { codes: ALIGNMENT as u64, n, k, scales: 0 };
    let at = circumstances(m, aligned.codes, aligned, false, ordinal)?;
    let parts = choose(m, n, k, at)?.workspace_size(m, n, k, at.multiprocessors);
    Ok(Layout::new(m, k).parts + parts + ALIGNMENT)
}

/// The way that [`linear`] takes, and the first address of its workspace that it uses.
fn way(m: usize, x: u64, weight: Weight, workspace: u64, device: usize) -> Result<(Int8Product, Circumstances, u64)> {
    let base = workspace.next_multiple_of(ALIGNMENT as u64);
    let at = circumstances(m, base, weight, x.is_multiple_of(16), device)?;
    Ok((choose(m, weight.n, weight.k, at)?, at, base))
}

/// As [`crate::int8::masks`].
pub fn masks(m: usize, x: u64, weight: Weight, workspace: u64, device: usize) -> Result<(u64, usize)> {
    let (product, _, base) = way(m, x, weight, workspace, device)?;
    let count = if product.keeps_rows() { m } else { 1 };
    Ok((base + Layout::new(m, weight.k).mask as u64, count))
}

/// # Safety
/// As [`crate::int8::linear`]; the result has elements.
pub unsafe fn linear(
    rows: Rows,
    threshold: f32,
    weight: Weight,
    output: Output,
    workspace: u64,
    mask: u64,
    device: usize,
    stream: u64,
) -> Result<()> {
    let (k, queue) = (weight.k, Queue { device, stream });
    let layout = Layout::new(rows.m, k);
    let (product, at, base) = way(rows.m, rows.x, weight, workspace, device)?;
    let place = |offset: usize| base + offset as u64;
    let mask = match mask {
        _ if threshold <= 0.0 => 0,
        0 => place(layout.mask),
        elsewhere => elsewhere,
    };
    let mut call = Call {
        operands: operands(rows, Codes { codes: 0, scales: 0, mask }, 0, weight, output),
        product,
        dtype: Some(rows.dtype),
        weight,
        multiprocessors: at.multiprocessors,
        threshold,
        after_rows: product != Int8Product::SkinnyOwn,
        workspace: place(layout.parts),
        queue,
    };
    if product != Int8Product::SkinnyOwn {
        let few = product.keeps_rows();
        let ready = if threshold > 0.0 && !few { base } else { 0 };
        let codes = Codes { codes: place(layout.codes), scales: place(layout.scales), mask };
        // SAFETY: the caller's promise; the workspace has the size of this layout.
        unsafe { rows_to(rows, k, threshold, codes, ready, few, queue)? };
        call.operands = operands(rows, codes, ready, weight, output);
    }
    // SAFETY: the caller's promise.
    unsafe { call.run() }
}

/// # Safety
/// As [`crate::int8::matmul_int32`]; the result has elements.
pub unsafe fn matmul_int32(
    a: u64,
    m: usize,
    k: usize,
    b: u64,
    n: usize,
    out: u64,
    device: usize,
    stream: u64,
) -> Result<()> {
    let weight = Weight { codes: b, n, k, scales: 0 };
    let rows = Rows { x: 0, m, dtype: Dtype::F32 };
    let codes = Codes { codes: a, scales: 0, mask: 0 };
    let at = Circumstances { copy_engine: false, ..circumstances(m, a, weight, false, device)? };
    let call = Call {
        operands: operands(rows, codes, 0, weight, Output { bias: 0, out }),
        product: choose(m, n, k, at)?,
        dtype: None,
        weight,
        multiprocessors: at.multiprocessors,
        threshold: 0.0,
        after_rows: false,
        workspace: 0,
        queue: Queue { device, stream },
    };
    // SAFETY: the caller's promise.
    unsafe { call.run() }
}

/// # Safety
/// As [`crate::int8::dequantize_panel`]; the result has elements.
pub unsafe fn dequantize_panel(
    weight: Weight,
    part: Rectangle,
    out: u64,
    dtype: Dtype,
    device: usize,
    stream: u64,
) -> Result<()> {
    let (codes, scales, k) = (weight.codes, weight.scales, weight.k as i64);
    let (first_row, rows) = (part.first_row as i64, part.rows as i64);
    let (first_column, columns) = (part.first_column as i64, part.columns as i64);
    let launch = Launch {
        device,
        stream,
        kernel: Kernel::Int8Panel(dtype),
        grid: Grid::OverlappingPieces(part.rows as u64),
        describe: &|| format!("{rows} x {columns} of an int8 weight of {} x {k}, {}", weight.n, dtype.suffix()),
    };
    // SAFETY: the parameters of int8_dequantize_panel_*, in order; memory by the caller's promise.
    unsafe { launch.run(arguments![codes, k, scales, first_row, rows, first_column, columns, out]) }
}
