//! Kernels by name, and the one place that launches them.

use std::ffi::{CString, c_void};
use std::ptr;

use cudarc::driver::{result, sys};

use super::device::device;
use super::driver::{check, words};
use super::image;
use crate::{Dtype, Error, Result};

/// A kernel.
#[derive(Debug, Clone, Copy)]
pub enum Kernel {
    /// quantize.cu
    Quantize4(Dtype),
    /// quantize.cu
    Quantize8(Dtype),
    /// dequantize.cu
    Dequantize4(Dtype),
    /// dequantize.cu
    Dequantize4Nested(Dtype),
    /// dequantize.cu
    Dequantize8(Dtype),
    /// panel.cu
    Panel(Dtype),
    /// panel.cu
    PanelNested(Dtype),
    /// double_quant.cu
    QuantizeAbsmax,
}

impl Kernel {
    /// How many there are.
    pub const COUNT: usize = 7 * Dtype::ALL.len() + 1;

    /// Its place in a device's table.
    pub fn index(self) -> usize {
        let types = Dtype::ALL.len();
        match self {
            Self::Quantize4(dtype) => dtype as usize,
            Self::Quantize8(dtype) => types + dtype as usize,
            Self::Dequantize4(dtype) => 2 * types + dtype as usize,
            Self::Dequantize4Nested(dtype) => 3 * types + dtype as usize,
            Self::Dequantize8(dtype) => 4 * types + dtype as usize,
            Self::Panel(dtype) => 5 * types + dtype as usize,
            Self::PanelNested(dtype) => 6 * types + dtype as usize,
            Self::QuantizeAbsmax => 7 * types,
        }
    }

    fn family(self) -> &'static str {
        match self {
            Self::Quantize4(_) | Self::Quantize8(_) => "quantize",
            Self::Dequantize4(_) | Self::Dequantize4Nested(_) | Self::Dequantize8(_) => "dequantize",
            Self::Panel(_) | Self::PanelNested(_) => "panel",
            Self::QuantizeAbsmax => "double_quant",
        }
    }

    /// Its name in the source.
    pub fn name(self) -> String {
        match self {
            Self::Quantize4(dtype) => format!("quantize_4bit_{}", dtype.suffix()),
            Self::Quantize8(dtype) => format!("quantize_8bit_{}", dtype.suffix()),
            Self::Dequantize4(dtype) => format!("dequantize_4bit_{}", dtype.suffix()),
            Self::Dequantize4Nested(dtype) => format!("dequantize_4bit_nested_{}", dtype.suffix()),
            Self::Dequantize8(dtype) => format!("dequantize_8bit_{}", dtype.suffix()),
            Self::Panel(dtype) => format!("dequantize_4bit_panel_{}", dtype.suffix()),
            Self::PanelNested(dtype) => format!("dequantize_4bit_panel_nested_{}", dtype.suffix()),
            Self::QuantizeAbsmax => "quantize_absmax".to_string(),
        }
    }

    /// Threads of a block; the sources' `THREADS`.
    fn threads(self) -> u32 {
        match self {
            Self::Quantize4(_) | Self::Quantize8(_) => 512,
            Self::Dequantize4(_) | Self::Dequantize4Nested(_) | Self::Dequantize8(_) => 256,
            Self::Panel(_) | Self::PanelNested(_) => 256,
            Self::QuantizeAbsmax => 1024,
        }
    }
}

/// A loaded kernel.
#[derive(Debug, Clone, Copy)]
pub struct Function {
    handle: sys::CUfunction,
    /// Blocks that a multiprocessor holds at once.
    resident: u32,
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
        // SAFETY: the library is loaded, the name ends with NUL, the pointers are to locals.
        unsafe {
            check("cuLibraryGetKernel", sys::cuLibraryGetKernel(&mut entry, library.0, name.as_ptr()))?;
            check("cuKernelGetFunction", sys::cuKernelGetFunction(&mut handle, entry))?;
            let threads = kernel.threads() as i32;
            check(
                "cuOccupancyMaxActiveBlocksPerMultiprocessor",
                sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut resident, handle, threads, 0),
            )?;
        }
        Ok(Self { handle, resident: resident.max(1) as u32 })
    }
}

/// How many blocks a launch has.
#[derive(Debug, Clone, Copy)]
pub enum Grid {
    /// One for each piece of work.
    Pieces(u64),
    /// As many as the device holds at once, or as there is work for: each loops over its share.
    Resident(u64),
    /// At most one a multiprocessor, all running together so that they can wait for each other. From compute capability 9.0 on
    /// they may start before the previous kernel of the stream has ended: the kernel itself waits for it.
    Cooperative(u64),
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
        let resident = |blocks_each: u32| u64::from(device.multiprocessors * blocks_each);
        let (blocks, cooperative) = match self.grid {
            Grid::Pieces(pieces) => (pieces, false),
            Grid::Resident(pieces) => (pieces.min(resident(function.resident)), false),
            Grid::Cooperative(pieces) => (pieces.min(resident(1)), true),
        };
        // The kernels loop over whatever a grid leaves over.
        let grid = (blocks.clamp(1, 0x7fff_ffff) as u32, 1, 1);
        let block = (self.kernel.threads(), 1, 1);
        let stream = self.stream as sys::CUstream;
        // SAFETY: the function belongs to the entered context, and so does the stream; the rest is the caller's promise.
        let launched = unsafe {
            if cooperative && device.overlaps_launches {
                launch_overlapping(function.handle, grid, block, stream, arguments)
            } else if cooperative {
                result::launch_cooperative_kernel(function.handle, grid, block, 0, stream, arguments)
            } else {
                result::launch_kernel(function.handle, grid, block, 0, stream, arguments)
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

/// A cooperative launch that may begin while the previous kernel of the stream still runs.
///
/// # Safety
/// As [`Launch::run`]; the kernel waits for the previous one before it touches what that one writes.
unsafe fn launch_overlapping(
    function: sys::CUfunction,
    grid: (u32, u32, u32),
    block: (u32, u32, u32),
    stream: sys::CUstream,
    arguments: &mut [*mut c_void],
) -> std::result::Result<(), result::DriverError> {
    let attribute = |id, set: fn(&mut sys::CUlaunchAttributeValue)| {
        // SAFETY: plain numbers, for which zero is a value.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = id;
        set(&mut attribute.value);
        attribute
    };
    let mut attributes = [
        attribute(sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, |value| value.cooperative = 1),
        attribute(sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, |value| {
            value.programmaticStreamSerializationAllowed = 1;
        }),
    ];
    let config = sys::CUlaunchConfig {
        gridDimX: grid.0,
        gridDimY: grid.1,
        gridDimZ: grid.2,
        blockDimX: block.0,
        blockDimY: block.1,
        blockDimZ: block.2,
        sharedMemBytes: 0,
        hStream: stream,
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    };
    // SAFETY: the configuration and its attributes outlive the call; the rest is the caller's promise.
    unsafe { sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), ptr::null_mut()) }.result()
}
