//! Memory of ours that begins on a line of the cache.

use std::marker::PhantomData;

/// A line of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Zeros that begin on a line of the cache, so that no vector lies across two. `W` is plain bits.
pub struct Buffer<W> {
    lines: Vec<Line>,
    len: usize,
    of: PhantomData<W>,
}

impl<W: Copy + Default> Buffer<W> {
    pub fn new(len: usize) -> Self {
        Self { lines: vec![Line([0; 64]); (len * size_of::<W>()).div_ceil(64)], len, of: PhantomData }
    }
    pub fn as_ptr(&self) -> *const W {
        self.lines.as_ptr().cast()
    }
    pub fn as_mut_ptr(&mut self) -> *mut W {
        self.lines.as_mut_ptr().cast()
    }
    pub fn as_slice(&self) -> &[W] {
        // SAFETY: `new` made room for `len` elements and filled it.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }
    pub fn as_mut_slice(&mut self) -> &mut [W] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.len) }
    }
}
