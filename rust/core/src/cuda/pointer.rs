//! Whose memory an address is in, for callers that bring no device with it.

use cudarc::driver::{result, sys};

use super::device::device;
use super::driver::{check, driver, words};
use crate::{Error, Result};

/// The ordinal of the GPU whose memory an address is in, or `None` for memory of the host, page-locked or not.
///
/// # Errors
/// A driver failure other than that there is no driver.
pub fn device_of(address: u64) -> Result<Option<usize>> {
    match driver() {
        Err(Error::NoDriver) => return Ok(None),
        other => other?,
    }
    let mut kind = 0_u32;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
    // SAFETY: the driver is initialized; the pointer is to a local of the attribute's size. No address is read.
    let code = unsafe { sys::cuPointerGetAttribute((&raw mut kind).cast(), attribute, address) };
    match code {
        // Memory that CUDA does not know.
        sys::CUresult::CUDA_ERROR_INVALID_VALUE => return Ok(None),
        code => check("cuPointerGetAttribute", code)?,
    }
    if kind != sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32 {
        return Ok(None);
    }
    let mut ordinal = 0_i32;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
    // SAFETY: as above.
    check("cuPointerGetAttribute", unsafe {
        sys::cuPointerGetAttribute((&raw mut ordinal).cast(), attribute, address)
    })?;
    usize::try_from(ordinal).map(Some).map_err(|_| Error::argument("device", ordinal, "a CUDA ordinal"))
}

/// Sixteen floats of a GPU's memory. Waits for the legacy default stream.
///
/// # Safety
/// The address is that of so many in the memory of the device.
///
/// # Errors
/// A driver failure, as while a stream is captured in a graph.
pub unsafe fn read_table(address: u64, ordinal: usize) -> Result<[f32; 16]> {
    let entered = device(ordinal)?.enter()?;
    let mut table = [0.0; 16];
    // SAFETY: the caller's promise; the device's context is current.
    let outcome = unsafe { result::memcpy_dtoh_sync(&mut table, address) };
    drop(entered);
    match outcome {
        Ok(()) => Ok(table),
        Err(error) => Err(Error::Driver { call: "cuMemcpyDtoH", words: words(error) }),
    }
}
