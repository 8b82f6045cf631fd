//! The three floating-point types: to float32 exactly, and back rounding to nearest, ties to even.
//!
//! Plain integer arithmetic without branches, so that loops over arrays become vector code.

/// Elements handled at a time.
pub const LANES: usize = 32;

/// The bits of an element of one of the three types.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Its value.
    fn widen(self) -> f32;
    /// The nearest element; every NaN becomes the one that GPUs write.
    fn narrow(value: f32) -> Self;
}

/// Evaluates an expression with a name for the element type of a dtype.
macro_rules! for_dtype {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            $crate::Dtype::F32 => {
                type $element = $crate::cpu::element::F32;
                $body
            }
            $crate::Dtype::F16 => {
                type $element = $crate::cpu::element::F16;
                $body
            }
            $crate::Dtype::Bf16 => {
                type $element = $crate::cpu::element::Bf16;
                $body
            }
        }
    };
}
pub(crate) use for_dtype;

/// Bits of a float32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct F32(pub u32);

/// Bits of a float16.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct F16(pub u16);

/// Bits of a bfloat16.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Element for F32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(self.0)
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self(if value.is_nan() { 0x7fff_ffff } else { value.to_bits() })
    }
}

impl Element for Bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        Self(if value.is_nan() { 0x7fff } else { rounded as u16 })
    }
}

impl Element for F16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.0);
        let (sign, magnitude) = ((bits & 0x8000) << 16, bits & 0x7fff);
        let normal = (magnitude << 13) + (112 << 23);
        // 2^23 + mantissa, less 2^23, is the mantissa as a float: no subnormal float32 on the way.
        let subnormal = ((f32::from_bits(0x4b00_0000 | magnitude) - 8_388_608.0) * f32::from_bits(103 << 23)).to_bits();
        let special = (magnitude << 13) | 0x7f80_0000;
        let value = if magnitude < 0x0400 {
            subnormal
        } else if magnitude >= 0x7c00 {
            special
        } else {
            normal
        };
        f32::from_bits(sign | value)
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let (sign, magnitude) = ((bits >> 16) as u16 & 0x8000, bits & 0x7fff_ffff);
        let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + (magnitude >> 13 & 1)) >> 13;
        // Adding 0.5 leaves the value, rounded, in units of 2^-24: a subnormal float16's.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0x3f00_0000);
        let half = if magnitude > 0x7f80_0000 {
            return Self(0x7fff);
        } else if magnitude >= 0x4780_0000 {
            0x7c00
        } else if magnitude < 0x3880_0000 {
            subnormal
        } else {
            normal
        };
        Self(half as u16 | sign)
    }
}

/// `N` elements from `x` on as float32.
///
/// # Safety
/// `x` holds `N` elements.
#[inline(always)]
pub unsafe fn load<T: Element, const N: usize>(x: *const T) -> [f32; N] {
    // SAFETY: the caller's promise; any alignment will do.
    unsafe { x.cast::<[T; N]>().read_unaligned() }.map(T::widen)
}

/// Calls `whole` for each run of `N` elements, and `rest` for a shorter last one, padded with zeros.
///
/// Both get the index of the run's first element; `rest` also how many it really has.
///
/// # Safety
/// `x` holds `count` elements.
#[inline(always)]
pub unsafe fn for_runs<T: Element, const N: usize>(
    x: *const T,
    count: usize,
    mut whole: impl FnMut(usize, [f32; N]),
    rest: impl FnOnce(usize, [f32; N], usize),
) {
    let end = count / N * N;
    for i in (0..end).step_by(N) {
        // SAFETY: `i + N <= end <= count`.
        whole(i, unsafe { load(x.add(i)) });
    }
    if end < count {
        let mut padded = [T::default(); N];
        // SAFETY: `count - end < N` elements remain; an array of plain bits may be written bytewise.
        unsafe {
            let bytes = (count - end) * size_of::<T>();
            std::ptr::copy_nonoverlapping(x.add(end).cast::<u8>(), padded.as_mut_ptr().cast::<u8>(), bytes);
        }
        rest(end, padded.map(T::widen), count - end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_bit_types_survive_the_round_trip() {
        for bits in 0..=u16::MAX {
            let half = F16(bits);
            let back = F16::narrow(half.widen());
            assert_eq!(back.0, if half.widen().is_nan() { 0x7fff } else { bits });
            let brain = Bf16(bits);
            let back = Bf16::narrow(brain.widen());
            assert_eq!(back.0, if brain.widen().is_nan() { 0x7fff } else { bits });
        }
    }

    #[test]
    fn halfway_values_round_to_even() {
        for bits in (0..0x7c00u16).step_by(7) {
            let (low, high) = (F16(bits).widen(), if bits == 0x7bff { 65536.0 } else { F16(bits + 1).widen() });
            let even = if bits % 2 == 0 { bits } else { bits + 1 };
            let middle = ((f64::from(low) + f64::from(high)) / 2.0) as f32;
            assert_eq!(F16::narrow(middle).0, even);
            assert_eq!(F16::narrow(f32::from_bits(middle.to_bits() - 1)).0, bits);
            assert_eq!(F16::narrow(f32::from_bits(middle.to_bits() + 1)).0, bits + 1);
        }
        assert_eq!(Bf16::narrow(f32::from_bits(0x3f80_8000)).0, 0x3f80);
        assert_eq!(Bf16::narrow(f32::from_bits(0x3f81_8000)).0, 0x3f82);
        assert_eq!(Bf16::narrow(f32::MAX).0, 0x7f80);
    }
}
