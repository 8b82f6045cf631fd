//! Launches of the optimizers' kernels.

use crate::optim::{Control, Norms, Step, Trust};
use crate::{Error, Result};

/// # Safety
/// As [`crate::optim::step`].
pub unsafe fn step(_step: &Step, _device: usize, _stream: u64) -> Result<()> {
    Err(Error::NoKernels)
}

/// # Safety
/// As [`crate::optim::norms`].
pub unsafe fn norms(_step: &Step, _kind: Norms, _partials: u64, _device: usize, _stream: u64) -> Result<()> {
    Err(Error::NoKernels)
}

/// # Safety
/// As [`crate::optim::control`].
pub unsafe fn control(_control: &Control, _device: usize, _stream: u64) -> Result<()> {
    Err(Error::NoKernels)
}

/// # Safety
/// As [`crate::optim::trust`].
pub unsafe fn trust(_trust: &Trust, _device: usize, _stream: u64) -> Result<()> {
    Err(Error::NoKernels)
}
