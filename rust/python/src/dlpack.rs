//! Tensors read by their library's own C function: DLPack's exchange API, major version 1.

use std::ffi::{c_int, c_void};
use std::{ptr, slice};

use pyo3::exceptions::PyAttributeError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyType};

/// What a type offers; see `DLPackExchangeAPI` in dlpack.h.
const ATTRIBUTE: &str = "__dlpack_c_exchange_api__";
const CAPSULE: &std::ffi::CStr = c"dlpack_exchange_api";
const MAJOR: u32 = 1;

/// `DLDevice`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
struct Device {
    kind: i32,
    index: i32,
}

/// `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

/// `DLTensor`.
#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

type Read = unsafe extern "C" fn(*mut c_void, *mut Tensor) -> c_int;

/// `DLPackExchangeAPI`. Of what is not used here only the size counts.
#[repr(C)]
struct ExchangeApi {
    major: u32,
    minor: u32,
    previous: *const c_void,
    allocate: *const c_void,
    export: *const c_void,
    import: *const c_void,
    read: Option<Read>,
    stream: *const c_void,
}

/// Of what and where the elements are, and how many.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    dtype: DataType,
    device: Device,
    numel: i64,
}

/// What a tensor was when it was read.
pub struct View {
    /// Of the first element.
    pub address: u64,
    /// Of the elements.
    pub kind: Kind,
    /// Whether they lie in the order of their indices, without gaps.
    pub is_contiguous: bool,
}

/// Reads tensors of one type.
pub struct Reader(Read);

impl Reader {
    /// Of the type's tensors, or none where its library has no such function.
    pub fn of(class: &Bound<'_, PyType>) -> PyResult<Option<Self>> {
        let capsule = match class.getattr(ATTRIBUTE) {
            Ok(capsule) => capsule,
            Err(error) if error.is_instance_of::<PyAttributeError>(class.py()) => return Ok(None),
            Err(error) => return Err(error),
        };
        let Ok(capsule) = capsule.cast_into::<PyCapsule>() else { return Ok(None) };
        if !capsule.is_valid_checked(Some(CAPSULE)) {
            return Ok(None);
        }
        let api = capsule.pointer_checked(Some(CAPSULE))?.cast::<ExchangeApi>();
        // SAFETY: what a capsule of this name points to begins with a version, whichever that is, and lives as long as
        // the process does.
        let major = unsafe { ptr::addr_of!((*api.as_ptr()).major).read() };
        if major != MAJOR {
            return Ok(None);
        }
        // SAFETY: of this version it is an `ExchangeApi`.
        Ok(unsafe { api.as_ref() }.read.map(Self))
    }

    /// What a tensor is now; none where it has no memory of its own, or none that DLPack can name.
    ///
    /// # Safety
    ///
    /// The object is of the reader's type, or of one derived from it.
    pub unsafe fn read(&self, object: &Bound<'_, PyAny>) -> Option<View> {
        let mut tensor = Tensor {
            data: ptr::null_mut(),
            device: Device { kind: 0, index: 0 },
            ndim: 0,
            dtype: DataType { code: 0, bits: 0, lanes: 0 },
            shape: ptr::null(),
            strides: ptr::null(),
            byte_offset: 0,
        };
        // SAFETY: the caller vouches for the type; the interpreter is attached, as `object` shows.
        if unsafe { (self.0)(object.as_ptr().cast(), &mut tensor) } != 0 {
            drop(PyErr::take(object.py()));
            return None;
        }
        // SAFETY: both have `ndim` elements and live as long as the tensor, which nobody changes meanwhile.
        let (shape, strides) = unsafe { (numbers(tensor.shape, tensor.ndim)?, numbers(tensor.strides, tensor.ndim)?) };
        let numel = shape.iter().try_fold(1_i64, |count, &size| count.checked_mul(size))?;
        Some(View {
            address: (tensor.data.addr() as u64).wrapping_add(tensor.byte_offset),
            kind: Kind { dtype: tensor.dtype, device: tensor.device, numel },
            is_contiguous: numel == 0 || is_contiguous(shape, strides),
        })
    }
}

/// # Safety
///
/// At a pointer that is not null there are `count` numbers.
unsafe fn numbers<'a>(pointer: *const i64, count: i32) -> Option<&'a [i64]> {
    let count = usize::try_from(count).ok()?;
    match (count, pointer.is_null()) {
        (0, _) => Some(&[]),
        (_, true) => None,
        // SAFETY: the caller vouches for it.
        _ => Some(unsafe { slice::from_raw_parts(pointer, count) }),
    }
}

fn is_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    let mut expected = 1;
    for (&size, &stride) in shape.iter().zip(strides).rev() {
        if size != 1 && stride != expected {
            return false;
        }
        expected *= size; // no more than all elements, whose number was counted before
    }
    true
}
