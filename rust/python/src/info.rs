//! What the machine and this build offer.

use fewbits_core::{cpu, cuda};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The driver and its devices; never raises for want of one.
#[pyfunction]
pub fn driver_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    let version = cuda::driver_version();
    let devices = version.is_ok().then(cuda::devices);
    let error = match (&version, &devices) {
        (Err(error), _) | (_, Some(Err(error))) => Some(error.to_string()),
        _ => None,
    };
    info.set_item("present", version.is_ok())?;
    info.set_item("error", error)?;
    info.set_item("version", version.ok())?;
    let mut list = Vec::new();
    for device in devices.and_then(Result::ok).unwrap_or_default() {
        let entry = PyDict::new(py);
        entry.set_item("name", device.name)?;
        entry.set_item("compute_capability", device.capability)?;
        entry.set_item("memory", device.memory)?;
        entry.set_item("image", device.target)?;
        list.push(entry);
    }
    info.set_item("devices", list)?;
    Ok(info)
}

/// The processor's vector extensions and the path in use.
#[pyfunction]
pub fn cpu_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("features", cpu::path::features())?;
    info.set_item("path", cpu::Path::chosen().name())?;
    Ok(info)
}

/// Targets of the embedded kernel images.
#[pyfunction]
pub fn images() -> Vec<&'static str> {
    cuda::built_targets()
}
