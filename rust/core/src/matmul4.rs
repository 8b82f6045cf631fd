//! Products with a 4-bit weight: `y[m][n] = sum over k of x[m][k] * W[n][k] + bias[n]`, `W` never written out whole.
//!
//! `W[n][k] = code[codes[n * K + k]] * absmax[(n * K + k) / blocksize]`: blocks are cut from the flattened weight, so where `K` is
//! no multiple of the block size they run across rows. Sums are float32, rounded once to the output dtype.

use std::sync::OnceLock;

use crate::blockwise::{Absmax, Blocks, check_absmax, check_addresses};
use crate::cuda::Settled;
use crate::{Dtype, Error, QuantType, Result, Target, cpu, cuda};

/// A weight of `n` rows (output features) and `k` columns (input features).
#[derive(Debug, Clone, Copy)]
pub struct Weight {
    /// Address of `(n * k + 1) / 2` bytes, the first code of each pair in the high nibble.
    pub codes: u64,
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// Elements of a block: a power of two from 32 to 4096.
    pub blocksize: usize,
    /// The code.
    pub quant_type: QuantType,
    /// The block scales.
    pub absmax: Absmax,
    /// Whether codes and scales may be read before the previous kernel of the stream has ended: see [`Settled`].
    pub settled: bool,
}

impl Weight {
    /// The flattened weight as blocks that dequantize to `dtype`.
    pub(crate) fn blocks(&self, dtype: Dtype) -> Result<Blocks> {
        let elements = self.n.checked_mul(self.k).ok_or_else(|| {
            Error::argument(
                "quant_state.shape",
                format!("({}, {})", self.n, self.k),
                "a weight that fits the address space",
            )
        })?;
        Blocks::new(elements, self.blocksize, dtype)
    }
}

/// What is multiplied with it, and where the result goes.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    /// Address of `m * k` elements.
    pub x: u64,
    /// Rows of `x` (tokens).
    pub m: usize,
    /// Type of `x`, the bias and the result.
    pub dtype: Dtype,
    /// Address of `n` elements, or 0.
    pub bias: u64,
    /// Address of `m * n` elements.
    pub out: u64,
    /// Address of as many bytes as [`Kept::workspace_size`] says, or 0: the product is slower without.
    pub workspace: u64,
}

/// The name in `FEWBITS_MATMUL4` of dequantizing panels and multiplying them.
pub(crate) const PANELS: &str = "panels";

/// The environment variable `FEWBITS_MATMUL4`, read once: it forces one path for tests and measurements, where that path takes the
/// problem.
pub(crate) fn forced_name() -> Option<&'static str> {
    static NAME: OnceLock<Option<String>> = OnceLock::new();
    NAME.get_or_init(|| std::env::var("FEWBITS_MATMUL4").ok()).as_deref()
}

/// Raises unless `FEWBITS_MATMUL4` is absent or names a path of some device.
fn check_forced() -> Result<()> {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    let Some(name) = forced_name() else { return Ok(()) };
    let names = || [PANELS.to_string()].into_iter().chain(cpu::matmul4::names()).chain(cuda::matmul4_choice::names());
    if *KNOWN.get_or_init(|| names().any(|known| known == name)) {
        return Ok(());
    }
    let known: Vec<String> = names().collect();
    Err(Error::argument("FEWBITS_MATMUL4", name, format!("one of {}", known.join(", "))))
}

/// Multiplies. `false`, with nothing written, where dequantizing panels of the weight and an ordinary product are faster (or where
/// no kernel takes the problem): that is the caller's to do.
///
/// # Safety
/// The addresses hold what the fields say, on the target's device, and nobody else moves or writes them until the work is done.
///
/// # Errors
/// A null address, a block size that is no power of two, a driver failure.
pub unsafe fn matmul_4bit(weight: Weight, rows: Rows, target: Target) -> Result<bool> {
    let elements = weight.blocks(rows.dtype)?.n;
    check_addresses(elements, &[("B", weight.codes)])?;
    check_absmax(elements, weight.absmax)?;
    let (inputs, outputs) = (rows.m.saturating_mul(weight.k), rows.m.saturating_mul(weight.n));
    if inputs.max(outputs) > isize::MAX as usize / 8 {
        return Err(Error::argument("A", format!("{} rows", rows.m), "tensors that fit the address space"));
    }
    check_addresses(inputs, &[("A", rows.x)])?;
    check_addresses(outputs, &[("out", rows.out)])?;
    check_forced()?;
    if outputs == 0 {
        return Ok(true);
    }
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match target {
            Target::Cpu { threads } => cpu::matmul4::matmul_4bit(weight, rows, threads),
            Target::Cuda { device, stream } => cuda::matmul4::matmul_4bit(weight, rows, device, stream),
        }
    }
}

/// A weight that is multiplied again and again.
#[derive(Debug)]
pub struct Kept {
    weight: Weight,
    settled: Settled,
}

impl Kept {
    /// Keeps a weight.
    pub fn new(weight: Weight) -> Self {
        Self { weight, settled: Settled::default() }
    }

    /// Bytes of the target's memory that help the product of `m` rows. What they hold does not matter.
    ///
    /// # Errors
    /// A driver failure.
    pub fn workspace_size(&self, m: usize, target: Target) -> Result<usize> {
        match target {
            Target::Cpu { .. } => Ok(0),
            Target::Cuda { device, .. } => cuda::matmul4::workspace_size(self.weight, m, device),
        }
    }

    /// As [`matmul_4bit`]. From the second call with a `version` on, the kernel may start with the weight before the previous one has
    /// ended. The version changes whenever somebody writes to codes or scales; `None`: nobody knows.
    ///
    /// # Safety
    /// As [`matmul_4bit`], and nobody has written to the weight since the first call with this version.
    ///
    /// # Errors
    /// As [`matmul_4bit`].
    pub unsafe fn matmul_4bit(&self, rows: Rows, version: Option<u64>, target: Target) -> Result<bool> {
        let (Target::Cuda { stream, .. }, Some(version)) = (target, version) else {
            // SAFETY: the caller's promise, handed on.
            return unsafe { matmul_4bit(self.weight, rows, target) };
        };
        let settled = self.settled.is_settled(version, stream);
        // SAFETY: as above.
        let taken = unsafe { matmul_4bit(Weight { settled, ..self.weight }, rows, target)? };
        if taken && !settled {
            self.settled.waits(version, stream);
        }
        Ok(taken)
    }
}
