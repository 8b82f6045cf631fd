//! The operations on NVIDIA GPUs, through the driver alone.
//!
//! Nothing is opened before the first CUDA tensor arrives.

pub(crate) mod blockwise;
mod device;
mod driver;
mod image;
pub(crate) mod int8;
mod int8_choice;
mod kernel;
mod launch;
pub(crate) mod matmul4;
pub(crate) mod matmul4_choice;
mod matmul4_elsewhere;
pub(crate) mod optim;
mod optim_kernels;
pub(crate) mod panel;
mod pointer;
mod product;
mod runs;
mod settled;
mod tensor_map;

pub use device::{DeviceInfo, devices};
pub use driver::driver_version;
pub use image::{built_targets, is_built};
pub use pointer::{device_of, read_table};
pub use settled::Settled;
