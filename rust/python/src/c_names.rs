//! Functions under bitsandbytes' C names and with its arguments, for code that binds them through ctypes.
//!
//! Addresses may be of the host's or a GPU's memory: the driver tells which. `fewbits.functional.lib` is a `ctypes.PyDLL`, whose
//! calls hold the interpreter's lock and raise the exception that a call leaves behind. Each returns 0, or 1 with an exception.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::RwLock;
use std::thread::available_parallelism;

use fewbits_core::blockwise::{self, Absmax, Blocks};
use fewbits_core::matmul4::{self, Rows, Weight};
use fewbits_core::{Dtype, QuantType, Target, cuda};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::error::{Result, unknown};
use crate::target::quant_type;

/// Addresses of 4-bit tables that stay where they are, and the type of each.
static TABLES: RwLock<Vec<(u64, QuantType)>> = RwLock::new(Vec::new());

/// Notes which 4-bit type the table at an address is of: one that is never freed. Reading it from a GPU would take a wait.
#[pyfunction]
pub fn remember_table(address: u64, quant_type: usize) -> Result<()> {
    let quant_type = self::quant_type(quant_type)?;
    if let Ok(mut tables) = TABLES.write() {
        tables.push((address, quant_type));
    }
    Ok(())
}

/// Runs a function's work; an error, or a panic, is left behind as a Python exception.
fn answer(work: impl FnOnce() -> Result<()>) -> i32 {
    let error = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return 0,
        Ok(Err(error)) => PyErr::from(error),
        Err(_) => PyRuntimeError::new_err("fewbits: internal error in a function called by its C name"),
    };
    Python::attach(|py| error.restore(py));
    1
}

fn count(argument: &'static str, value: i32) -> Result<usize> {
    usize::try_from(value).map_err(|_| unknown(argument, value, "a number of at least 0"))
}

/// Where a call runs: where all of its addresses are.
fn target_of(addresses: &[*const c_void], stream: *const c_void) -> Result<Target> {
    let mut found: Option<Option<usize>> = None;
    for address in addresses.iter().filter(|address| !address.is_null()) {
        let place = cuda::device_of(*address as u64)?;
        if *found.get_or_insert(place) != place {
            return Err(unknown("pointers", "addresses on several devices", "all of them on one"));
        }
    }
    Ok(match found.flatten() {
        Some(device) => Target::Cuda { device, stream: stream as u64 },
        None => Target::Cpu { threads: available_parallelism().map_or(1, |threads| threads.get()) },
    })
}

/// The type of a 4-bit table: the kernels know types.
fn type_of(table: *const c_void, target: Target) -> Result<QuantType> {
    if table.is_null() {
        return Err(unknown("datatype", "a null address", "the address of the 16 values of nf4 or fp4"));
    }
    let address = table as u64;
    if let Ok(tables) = TABLES.read()
        && let Some((_, quant_type)) = tables.iter().find(|(known, _)| *known == address)
    {
        return Ok(*quant_type);
    }
    let values = match target {
        // SAFETY: the caller passes the address of 16 floats of the host, aligned or not.
        Target::Cpu { .. } => unsafe { table.cast::<[f32; 16]>().read_unaligned() },
        // SAFETY: the same of the device.
        Target::Cuda { device, .. } => unsafe { cuda::read_table(address, device)? },
    };
    QuantType::ALL
        .into_iter()
        .find(|quant_type| *quant_type.values() == values)
        .ok_or_else(|| unknown("datatype", "other values", "the 16 values of nf4 or fp4"))
}

macro_rules! dequantize {
    ($name:ident, $dtype:expr, $quant_type:expr) => {
        /// `out[i] = code[A[i]] * absmax[i / blocksize]`; `code` counts for 8-bit codes alone.
        ///
        /// # Safety
        /// The addresses hold `n` codes and values, the scales of their blocks, and 256 floats, all in one memory.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            code: *const c_void,
            a: *const c_void,
            absmax: *const c_void,
            out: *mut c_void,
            blocksize: i32,
            n: i32,
            stream: *const c_void,
        ) -> i32 {
            let quant_type: Option<QuantType> = $quant_type;
            answer(|| {
                let blocks = Blocks::new(count("n", n)?, count("blocksize", blocksize)?, $dtype)?;
                let code = if quant_type.is_none() { code } else { std::ptr::null() };
                let target = target_of(&[code, a, absmax, out], stream)?;
                let (a, absmax, out) = (a as u64, absmax as u64, out as u64);
                // SAFETY: the caller's promise.
                unsafe {
                    match quant_type {
                        None => blockwise::dequantize_8bit(blocks, a, code as u64, absmax, out, target)?,
                        Some(kind) => blockwise::dequantize_4bit(blocks, a, kind, Absmax::Plain(absmax), out, target)?,
                    }
                }
                Ok(())
            })
        }
    };
}

dequantize!(cdequantize_blockwise_fp32, Dtype::F32, None);
dequantize!(cdequantize_blockwise_fp16, Dtype::F16, None);
dequantize!(cdequantize_blockwise_bf16, Dtype::Bf16, None);
dequantize!(cdequantize_blockwise_fp32_nf4, Dtype::F32, Some(QuantType::Nf4));
dequantize!(cdequantize_blockwise_fp16_nf4, Dtype::F16, Some(QuantType::Nf4));
dequantize!(cdequantize_blockwise_bf16_nf4, Dtype::Bf16, Some(QuantType::Nf4));
dequantize!(cdequantize_blockwise_fp32_fp4, Dtype::F32, Some(QuantType::Fp4));
dequantize!(cdequantize_blockwise_fp16_fp4, Dtype::F16, Some(QuantType::Fp4));
dequantize!(cdequantize_blockwise_bf16_fp4, Dtype::Bf16, Some(QuantType::Fp4));

macro_rules! gemv {
    ($name:ident, $dtype:expr) => {
        /// `out[j] = sum_i A[i] * B[j, i]` for a 4-bit weight `B` of `m` rows and `k` columns, and one row `A`: `n` is 1.
        ///
        /// # Safety
        /// The addresses hold a row of `k`, a weight of those sizes with its scales, 16 floats and room for `m`, all in one memory.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            m: i32,
            n: i32,
            k: i32,
            a: *const c_void,
            b: *const c_void,
            absmax: *const c_void,
            datatype: *const c_void,
            out: *mut c_void,
            _lda: i32,
            ldb: i32,
            _ldc: i32,
            blocksize: i32,
            stream: *const c_void,
        ) -> i32 {
            answer(|| {
                let (rows, columns) = (count("m", m)?, count("k", k)?);
                if n != 1 {
                    return Err(unknown("n", n, "1, the number of rows of A"));
                }
                // Rows lie one after another, without a gap: those of an odd length would share a byte.
                if columns % 2 != 0 || count("ldb", ldb)? != columns / 2 {
                    return Err(unknown("ldb", ldb, "k / 2, for an even k"));
                }
                let target = target_of(&[a, b, absmax, datatype, out], stream)?;
                let weight = Weight {
                    codes: b as u64,
                    n: rows,
                    k: columns,
                    blocksize: count("blocksize", blocksize)?,
                    quant_type: type_of(datatype, target)?,
                    absmax: Absmax::Plain(absmax as u64),
                    settled: false,
                };
                let row = Rows { x: a as u64, m: 1, dtype: $dtype, bias: 0, out: out as u64, workspace: 0 };
                // SAFETY: the caller's promise.
                if unsafe { matmul4::matmul_4bit(weight, row, target)? } {
                    return Ok(());
                }
                Err(unknown("k", k, "sizes that a kernel for one row takes"))
            })
        }
    };
}

gemv!(cgemm_4bit_inference_naive_fp32, Dtype::F32);
gemv!(cgemm_4bit_inference_naive_fp16, Dtype::F16);
gemv!(cgemm_4bit_inference_naive_bf16, Dtype::Bf16);
