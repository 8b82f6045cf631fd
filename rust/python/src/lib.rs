//! `fewbits._native`: the Rust core for Python.
//!
//! Addresses and sizes come in as plain integers; [`fewbits_core`] checks them. CPU work and driver calls run without the
//! interpreter's lock. Nothing here computes. [`whereabouts`] alone reads tensors itself, as there are many.

use pyo3::prelude::*;

mod blockwise;
mod c_names;
mod dlpack;
mod error;
mod info;
mod int8;
mod matmul4;
mod optim;
mod panel;
mod target;
mod whereabouts;

/// Quantization kernels on raw addresses.
#[pymodule(gil_used = false)]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::blockwise::{
        codebook, dequantize_4bit, dequantize_4bit_nested, dequantize_blockwise, nested_workspace_size, quantize_4bit,
        quantize_4bit_nested, quantize_blockwise,
    };
    #[pymodule_export]
    use super::c_names::remember_table;
    #[pymodule_export]
    use super::error::Error;
    #[pymodule_export]
    use super::info::{cpu_info, driver_info, images};
    #[pymodule_export]
    use super::int8::{
        Int8Weight, int8_dequantize_panel, int8_linear, int8_linear_workspace_size, int8_matmul, int8_matmul_int32,
        int8_quantize_rows,
    };
    #[pymodule_export]
    use super::matmul4::{Weight4bit, matmul_4bit};
    #[pymodule_export]
    use super::optim::{optim_control, optim_norms, optim_step, optim_trust};
    #[pymodule_export]
    use super::panel::{dequantize_4bit_panel, dequantize_4bit_rows};
    #[pymodule_export]
    use super::whereabouts::Whereabouts;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("built_with_cuda", fewbits_core::cuda::is_built())?;
        super::optim::add_constants(module)
    }
}
