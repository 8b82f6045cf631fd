//! How the copy engine (TMA) of compute capability 9.0 and later sees a matrix.

use std::ffi::c_void;

use cudarc::driver::sys;
use cudarc::driver::sys::CUtensorMapDataType_enum as Type;
use cudarc::driver::sys::CUtensorMapSwizzle_enum as Swizzle;

use super::driver::check;
use crate::Result;

/// A tensor map as kernels take it, by value.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct TensorMap([u8; 128]);

/// A matrix in device memory, and the boxes that are copied of it. What a box has outside of the matrix reads as 0.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    /// Address, a multiple of 16.
    pub address: u64,
    /// Type of an element.
    pub element: Element,
    /// Rows and columns.
    pub shape: (usize, usize),
    /// Rows and columns of a box.
    pub box_shape: (u32, u32),
    /// Whether the 16-byte pieces of every row of 128 bytes are exchanged by its number modulo 8.
    pub swizzled: bool,
}

/// Types of matrices' elements. What is only moved can be 16 bits of anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// Bytes.
    U8,
    /// Two bytes.
    U16,
    /// float32.
    F32,
}

impl Element {
    fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::F32 => 4,
        }
    }
}

impl Matrix {
    /// Whether the copy engine can read it: address and row pitch are multiples of 16 bytes, and not too large.
    pub fn is_copyable(&self) -> bool {
        let pitch = self.shape.1 * self.element.size();
        self.address.is_multiple_of(16)
            && pitch.is_multiple_of(16)
            && pitch < 1 << 40
            && self.shape.0.max(self.shape.1) < 1 << 32
    }

    /// Its tensor map.
    pub fn map(&self) -> Result<TensorMap> {
        let element = match self.element {
            Element::U8 => Type::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            Element::U16 => Type::CU_TENSOR_MAP_DATA_TYPE_UINT16,
            Element::F32 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let swizzle =
            if self.swizzled { Swizzle::CU_TENSOR_MAP_SWIZZLE_128B } else { Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE };
        let shape = [self.shape.1 as u64, self.shape.0 as u64];
        let pitch = [(self.shape.1 * self.element.size()) as u64];
        let box_shape = [self.box_shape.1, self.box_shape.0];
        let mut map = TensorMap([0; 128]);
        // SAFETY: the arrays have the lengths that rank 2 asks for, the map the size and alignment of a CUtensorMap; the driver only
        // computes, it reads nothing at the address.
        let code = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                element,
                2,
                self.address as *mut c_void,
                shape.as_ptr(),
                pitch.as_ptr(),
                box_shape.as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", code)?;
        Ok(map)
    }
}
