//! The driver library: whether it is there, and its errors in words.

use std::ffi::CStr;
use std::sync::OnceLock;

use cudarc::driver::result::DriverError;
use cudarc::driver::sys;

use crate::{Error, Result};

/// First version with `cuLibraryLoadData`.
const OLDEST: (i32, i32) = (12, 0);

/// Makes sure that the driver is there, new enough and initialized. Cheap after the first success.
pub fn driver() -> Result<()> {
    static READY: OnceLock<()> = OnceLock::new();
    if READY.get().is_some() {
        return Ok(());
    }
    let version = driver_version()?;
    if version < OLDEST {
        return Err(Error::OldDriver { major: version.0, minor: version.1 });
    }
    // SAFETY: the library is present; cuInit may be called any number of times.
    check("cuInit", unsafe { sys::cuInit(0) })?;
    let _ = READY.set(());
    Ok(())
}

/// The version of CUDA that the installed driver supports.
///
/// # Errors
/// [`Error::NoDriver`] where there is none.
pub fn driver_version() -> Result<(i32, i32)> {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: only tries to open the driver library. Every other call would panic without one, so nothing comes before this.
    if !*PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
        return Err(Error::NoDriver);
    }
    let mut version = 0;
    // SAFETY: the library is present; the pointer is to a local.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    Ok((version / 1000, version % 1000 / 10))
}

/// Turns a driver result into ours.
pub fn check(call: &'static str, code: sys::CUresult) -> Result<()> {
    match code {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(Error::Driver { call, words: words(DriverError(code)) }),
    }
}

/// The driver's own name and description of an error.
pub fn words(error: DriverError) -> String {
    let text = |found: std::result::Result<&CStr, DriverError>| found.map(|s| s.to_string_lossy().into_owned()).ok();
    match (text(error.error_name()), text(error.error_string())) {
        (Some(name), Some(description)) => format!("{name}: {description}"),
        _ => format!("unknown error {}", error.0 as u32),
    }
}
