//! Blockwise 4- and 8-bit quantization on the CPU and on CUDA, without Python.
//!
//! Callers own all memory: every function borrows raw addresses for the length of one call, checks the sizes, and either runs on
//! CPU threads or queues a kernel on the caller's stream. Nothing here allocates device memory, creates a stream or synchronizes.
//!
//! - [`codebook`]: code tables and the definition of the nearest code
//! - [`blockwise`], [`double_quant`], [`int8`], [`matmul4`], [`optim`], [`panel`]: the operations: checks, then [`cpu`] or [`cuda`]
//! - [`cpu`]: vectorized loops, the instruction set chosen at run time
//! - [`cuda`]: the driver, the embedded images, launches

pub mod blockwise;
pub mod codebook;
pub mod cpu;
pub mod cuda;
pub mod double_quant;
mod dtype;
mod error;
mod exact_sum;
pub mod int8;
pub mod matmul4;
#[allow(dead_code, reason = "build.rs reads the rest")]
mod matmul4_instances;
pub mod optim;
pub mod panel;
mod target;

pub use dtype::{Dtype, QuantType};
pub use error::{Error, Result};
pub use target::Target;
