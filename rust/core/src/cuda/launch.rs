//! The one place that loads and launches kernels.

use std::ffi::{CString, c_void};
use std::ptr;

use cudarc::driver::{result, sys};

use super::device::device;
use super::driver::{check, words};
use super::image;
use super::kernel::Kernel;
use crate::{Error, Result};

/// A loaded kernel.
#[derive(Debug, Clone, Copy)]
pub struct Function {
    handle: sys::CUfunction,
    /// Blocks that a multiprocessor holds at once.
    resident: u32,
    /// Bytes of shared memory of a block.
    shared: u32,
}

// SAFETY: function handles may be used by any thread and live as long as their library, which is never unloaded.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// Loads a kernel from the image of a target into the current context.
    pub fn load(kernel: Kernel, target: &'static str) -> Result<Self> {
        let library = image::library(kernel.family(), target)?;
        let name =
            CString::new(kernel.name()).map_err(|error| Error::argument("kernel", error, "a name without NUL"))?;
        let (mut entry, mut handle, mut resident) = (ptr::null_mut(), ptr::null_mut(), 0);
        let shared = kernel.shared_bytes(target);
        // SAFETY: the library is loaded, the name ends with NUL, the pointers are to locals.
        unsafe {
            check("cuLibraryGetKernel", sys::cuLibraryGetKernel(&mut entry, library.0, name.as_ptr()))?;
            check("cuKernelGetFunction", sys::cuKernelGetFunction(&mut handle, entry))?;
            if shared > 0 {
                let maximum = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                check("cuFuncSetAttribute", sys::cuFuncSetAttribute(handle, maximum, shared as i32))?;
            }
            let threads = kernel.threads() as i32;
            check(
                "cuOccupancyMaxActiveBlocksPerMultiprocessor",
                sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut resident, handle, threads, shared as usize),
            )?;
        }
        Ok(Self { handle, resident: resident.max(1) as u32, shared })
    }
}

/// How many blocks a launch has.
#[derive(Debug, Clone, Copy)]
pub enum Grid {
    /// One for each piece of work.
    Pieces(u64),
    /// As many as the device holds at once, or as there is work for: each loops over its share.
    Resident(u64),
    /// As [`Grid::Resident`]; from compute capability 9.0 on they may start before the previous kernel of the stream has ended: the
    /// kernel itself waits for it.
    Overlapping(u64),
    /// As [`Grid::Pieces`], and may start like those.
    OverlappingPieces(u64),
    /// So many, of fewer threads than usual.
    Small {
        /// How many.
        blocks: u64,
        /// Of each.
        threads: u32,
    },
}

/// Pointers to the values of a kernel's parameters.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => { &mut [$(std::ptr::from_ref(&$value).cast_mut().cast::<std::ffi::c_void>()),*] };
}
pub(crate) use arguments;

/// One launch.
pub struct Launch<'a> {
    /// Ordinal of the device.
    pub device: usize,
    /// Raw stream of that device.
    pub stream: u64,
    /// What runs.
    pub kernel: Kernel,
    /// On how many blocks.
    pub grid: Grid,
    /// Sizes, for an error's text.
    pub describe: &'a dyn Fn() -> String,
}

impl Launch<'_> {
    /// Queues the kernel.
    ///
    /// # Safety
    /// `arguments` point to values of the kernel's parameters, in order and of their types; addresses among them are of memory of
    /// this device that outlives the kernel.
    pub unsafe fn run(self, arguments: &mut [*mut c_void]) -> Result<()> {
        let device = device(self.device)?;
        let _entered = device.enter()?;
        let function = device.function(self.kernel)?;
        let resident = u64::from(device.multiprocessors * function.resident);
        let usual = self.kernel.threads();
        let (blocks, threads) = match self.grid {
            Grid::Pieces(pieces) | Grid::OverlappingPieces(pieces) => (pieces, usual),
            Grid::Resident(pieces) | Grid::Overlapping(pieces) => (pieces.min(resident), usual),
            Grid::Small { blocks, threads } => (blocks, threads),
        };
        // The kernels loop over whatever a grid leaves over.
        let grid = (blocks.clamp(1, 0x7fff_ffff) as u32, 1, 1);
        let block = (threads, 1, 1);
        let stream = self.stream as sys::CUstream;
        // SAFETY: the function belongs to the entered context, and so does the stream; the rest is the caller's promise.
        let launched = unsafe {
            if matches!(self.grid, Grid::Overlapping(_) | Grid::OverlappingPieces(_)) && device.overlaps_launches {
                launch_overlapping(function, grid, block, stream, arguments)
            } else {
                result::launch_kernel(function.handle, grid, block, function.shared, stream, arguments)
            }
        };
        launched.map_err(|error| Error::Launch {
            kernel: self.kernel.name(),
            arguments: (self.describe)(),
            device: self.device,
            words: words(error),
        })
    }
}

/// A launch that may begin while the previous kernel of the stream still runs.
///
/// # Safety
/// As [`Launch::run`]; the kernel waits for the previous one before it touches what that one writes.
unsafe fn launch_overlapping(
    function: Function,
    grid: (u32, u32, u32),
    block: (u32, u32, u32),
    stream: sys::CUstream,
    arguments: &mut [*mut c_void],
) -> std::result::Result<(), result::DriverError> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    let config = sys::CUlaunchConfig {
        gridDimX: grid.0,
        gridDimY: grid.1,
        gridDimZ: grid.2,
        blockDimX: block.0,
        blockDimY: block.1,
        blockDimZ: block.2,
        sharedMemBytes: function.shared,
        hStream: stream,
        attrs: &mut attribute,
        numAttrs: 1,
    };
    // SAFETY: the configuration and its attribute outlive the call; the rest is the caller's promise.
    unsafe { sys::cuLaunchKernelEx(&config, function.handle, arguments.as_mut_ptr(), ptr::null_mut()) }.result()
}
