//! GPUs: their primary contexts, sizes and kernels.

use std::ffi::{CStr, c_char};
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys;
use cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::driver::{check, driver, driver_version};
use super::image;
use super::kernel::Kernel;
use super::launch::Function;
use crate::{Error, Result};

const MAX_DEVICES: usize = 64;

/// A GPU that has been used.
pub struct Device {
    /// Its multiprocessors.
    pub multiprocessors: u32,
    /// Major part of its compute capability.
    pub major: i32,
    /// Whether a kernel may start before the previous one of its stream has ended.
    pub overlaps_launches: bool,
    /// The image that its kernels come from.
    pub target: &'static str,
    context: sys::CUcontext,
    functions: [OnceLock<Function>; Kernel::COUNT],
}

// SAFETY: a primary context is retained for the life of the process and may be entered by any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// What `fewbits info` tells of a GPU.
#[derive(Debug, Clone)]
pub struct DeviceInfo {
    /// The driver's name of it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes of memory.
    pub memory: usize,
    /// The image that runs on it.
    pub target: Option<&'static str>,
}

/// All GPUs, without creating a context on any.
///
/// # Errors
/// A missing or old driver, a failed driver call.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    driver()?;
    let mut count = 0;
    // SAFETY: the driver is initialized; the pointer is to a local.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    (0..count).map(describe).collect()
}

fn attribute(attribute: Attribute, device: sys::CUdevice) -> Result<i32> {
    let mut value = 0;
    // SAFETY: the driver is initialized; the pointer is to a local.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
    Ok(value)
}

fn describe(device: sys::CUdevice) -> Result<DeviceInfo> {
    let mut name = [0 as c_char; 256];
    let mut memory = 0;
    // SAFETY: the driver is initialized; the name's length is passed and the driver ends it with NUL.
    let name = unsafe {
        check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device))?;
        check("cuDeviceTotalMem", sys::cuDeviceTotalMem_v2(&mut memory, device))?;
        CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)?;
    let target = image::choose(&image::built_targets(), major, minor);
    Ok(DeviceInfo { name, capability: (major, minor), memory, target })
}

/// The GPU of an ordinal, opened at its first use.
pub fn device(ordinal: usize) -> Result<&'static Device> {
    static DEVICES: [OnceLock<Device>; MAX_DEVICES] = [const { OnceLock::new() }; MAX_DEVICES];
    let slot =
        DEVICES.get(ordinal).ok_or_else(|| Error::argument("device", ordinal, format!("below {MAX_DEVICES}")))?;
    if let Some(device) = slot.get() {
        return Ok(device);
    }
    let opened = open(ordinal)?;
    Ok(slot.get_or_init(|| opened))
}

fn open(ordinal: usize) -> Result<Device> {
    if !image::is_built() {
        return Err(Error::NoKernels);
    }
    driver()?;
    let (mut device, mut context) = (0, ptr::null_mut());
    // SAFETY: the driver is initialized; the pointers are to locals. The context is torch's own, kept for good.
    unsafe {
        check("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal as i32))?;
        check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
    }
    let info = describe(device)?;
    let (major, minor) = info.capability;
    let target = info.target.ok_or(Error::UnsupportedDevice { device: info.name, major, minor })?;
    let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device)? as u32;
    Ok(Device {
        multiprocessors,
        major,
        // Graphs record such launches from CUDA 12.3 on.
        overlaps_launches: major >= 9 && driver_version()? >= (12, 3),
        target,
        context,
        functions: [const { OnceLock::new() }; Kernel::COUNT],
    })
}

impl Device {
    /// Whether kernels written for Hopper alone run here.
    pub fn is_hopper(&self) -> bool {
        self.target == "sm_90a"
    }

    /// Makes the device's context current until the guard is dropped; the caller's stays what it was.
    pub fn enter(&self) -> Result<Entered> {
        let mut current = ptr::null_mut();
        // SAFETY: the driver is initialized; the context lives as long as the process.
        unsafe {
            check("cuCtxGetCurrent", sys::cuCtxGetCurrent(&mut current))?;
            if current == self.context {
                return Ok(Entered { pushed: false });
            }
            check("cuCtxPushCurrent", sys::cuCtxPushCurrent_v2(self.context))?;
        }
        Ok(Entered { pushed: true })
    }

    /// A kernel of this device, loaded at its first use. The context must be entered.
    pub fn function(&self, kernel: Kernel) -> Result<Function> {
        let slot = &self.functions[kernel.index()];
        if let Some(function) = slot.get() {
            return Ok(*function);
        }
        let loaded = Function::load(kernel, self.target)?;
        Ok(*slot.get_or_init(|| loaded))
    }
}

/// See [`Device::enter`].
pub struct Entered {
    pushed: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = ptr::null_mut();
            // SAFETY: pops what `enter` pushed, on the same thread: the guard is not Send.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
        }
    }
}
