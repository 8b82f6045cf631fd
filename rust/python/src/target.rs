//! Numbers at the boundary to the core's types.

use fewbits_core::blockwise::Absmax;
use fewbits_core::matmul4::Weight;
use fewbits_core::{Dtype, QuantType, Target};

use crate::error::{Result, unknown};

/// `device` is a CUDA ordinal and `queue` a raw stream of it, or -1 and the number of CPU threads.
pub fn target(device: i64, queue: u64) -> Result<Target> {
    match device {
        -1 => Ok(Target::Cpu { threads: usize::try_from(queue).unwrap_or(usize::MAX) }),
        0.. => Ok(Target::Cuda { device: device as usize, stream: queue }),
        _ => Err(unknown("device", device, "a CUDA ordinal, or -1 for the CPU")),
    }
}

/// 0 float32, 1 float16, 2 bfloat16.
pub fn dtype(number: usize) -> Result<Dtype> {
    Dtype::ALL.get(number).copied().ok_or_else(|| unknown("dtype", number, "0 (float32), 1 (float16) or 2 (bfloat16)"))
}

/// 0 nf4, 1 fp4.
pub fn quant_type(number: usize) -> Result<QuantType> {
    QuantType::ALL.get(number).copied().ok_or_else(|| unknown("quant_type", number, "0 (nf4) or 1 (fp4)"))
}

/// Block scales: plain float32 where `nested_blocksize` is 0, else 8-bit codes and what decodes them.
pub fn absmax(absmax: u64, nested_code: u64, nested_absmax: u64, nested_blocksize: usize, offset: u64) -> Absmax {
    match nested_blocksize {
        0 => Absmax::Plain(absmax),
        blocksize => Absmax::Nested { codes: absmax, code: nested_code, absmax: nested_absmax, blocksize, offset },
    }
}

/// A 4-bit weight of `n` rows and `k` columns; the last five arguments as in [`absmax`].
pub fn weight(
    codes: u64,
    n: usize,
    k: usize,
    blocksize: usize,
    quant_type: usize,
    absmax: u64,
    nested_code: u64,
    nested_absmax: u64,
    nested_blocksize: usize,
    offset: u64,
) -> Result<Weight> {
    let absmax = self::absmax(absmax, nested_code, nested_absmax, nested_blocksize, offset);
    Ok(Weight { codes, n, k, blocksize, quant_type: self::quant_type(quant_type)?, absmax, settled: false })
}
