//! Core errors as Python exceptions: the one place.

use fewbits_core as core;
use pyo3::create_exception;
use pyo3::exceptions::{PyIndexError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

create_exception!(fewbits._native, Error, PyRuntimeError, "The CUDA driver is missing, too old, or refused a call.");

/// A core error on its way to Python.
pub struct CoreError(core::Error);

/// Result of a native function.
pub type Result<T> = std::result::Result<T, CoreError>;

impl From<core::Error> for CoreError {
    fn from(error: core::Error) -> Self {
        Self(error)
    }
}

impl From<CoreError> for PyErr {
    fn from(CoreError(error): CoreError) -> Self {
        let text = error.to_string();
        match error {
            core::Error::Argument { .. } => PyValueError::new_err(text),
            core::Error::Index { .. } => PyIndexError::new_err(text),
            core::Error::NoDriver
            | core::Error::OldDriver { .. }
            | core::Error::NoKernels
            | core::Error::UnsupportedDevice { .. }
            | core::Error::Driver { .. }
            | core::Error::Launch { .. }
            | core::Error::Threads { .. } => Error::new_err(text),
        }
    }
}

/// An argument that names nothing the core knows.
pub fn unknown(argument: &'static str, got: impl ToString, expected: &str) -> CoreError {
    CoreError(core::Error::Argument { argument, got: got.to_string(), expected: expected.to_string() })
}
