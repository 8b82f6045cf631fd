//! The embedded images: machine code for known chips, PTX for the others.

use std::collections::HashMap;
use std::io::Read;
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::sys;

use super::driver::check;
use crate::{Error, Result};

/// One kernel file compiled for one target.
pub struct Image {
    family: &'static str,
    target: &'static str,
    packed: &'static [u8],
}

impl Image {
    fn unpacked(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        brotli_decompressor::Decompressor::new(self.packed, 1 << 16)
            .read_to_end(&mut bytes)
            .map_err(|error| Error::Driver { call: "decompressing a kernel image", words: error.to_string() })?;
        Ok(bytes)
    }
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The targets of this build, as the compiler names them.
pub fn built_targets() -> Vec<&'static str> {
    let mut targets = Vec::new();
    for image in IMAGES {
        if !targets.contains(&image.target) {
            targets.push(image.target);
        }
    }
    targets
}

/// Whether this build carries kernels.
pub fn is_built() -> bool {
    !IMAGES.is_empty()
}

/// A chip that a target names: `(9, 0, true)` for `sm_90a`.
fn parse(target: &str) -> Option<(bool, i32, bool)> {
    let (kind, number) = target.split_once('_')?;
    let specific = number.ends_with('a');
    let capability = number.trim_end_matches('a').parse().ok()?;
    Some((kind == "sm", capability, specific))
}

/// The best of `targets` for a compute capability: machine code of the same major version and the highest minor version that is
/// not above the chip's (architecture-specific code on exactly its chip), else the newest PTX that is not above it.
pub fn choose<'a>(targets: &[&'a str], major: i32, minor: i32) -> Option<&'a str> {
    let chip = major * 10 + minor;
    let rank = |target: &str| {
        let (machine_code, capability, specific) = parse(target)?;
        let runs = match (machine_code, specific) {
            (_, true) => capability == chip,
            (true, false) => capability / 10 == major && capability <= chip,
            (false, false) => capability <= chip,
        };
        runs.then_some((machine_code, capability, specific))
    };
    targets.iter().copied().filter(|target| rank(target).is_some()).max_by_key(|target| rank(target))
}

/// A loaded image. Libraries belong to no context, so one serves every GPU of its kind.
#[derive(Clone, Copy)]
pub struct Library(pub sys::CUlibrary);

// SAFETY: a CUlibrary is a handle that the driver lets every thread use; it is never unloaded.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// Loads the image of a family for a target, once.
pub fn library(family: &'static str, target: &'static str) -> Result<Library> {
    static LIBRARIES: OnceLock<Mutex<HashMap<(&str, &str), Library>>> = OnceLock::new();
    let mut libraries = LIBRARIES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(library) = libraries.get(&(family, target)) {
        return Ok(*library);
    }
    let image = IMAGES.iter().find(|image| (image.family, image.target) == (family, target)).ok_or(Error::NoKernels)?;
    let bytes = image.unpacked()?;
    let mut handle = ptr::null_mut();
    // SAFETY: the bytes are a whole image (PTX ends in NUL), which the driver copies; no options are passed.
    let code = unsafe {
        sys::cuLibraryLoadData(
            &mut handle,
            bytes.as_ptr().cast(),
            ptr::null_mut(),
            ptr::null_mut(),
            0,
            ptr::null_mut(),
            ptr::null_mut(),
            0,
        )
    };
    check("cuLibraryLoadData", code)?;
    Ok(*libraries.entry((family, target)).or_insert(Library(handle)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETS: [&str; 9] =
        ["compute_70", "compute_80", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"];

    #[test]
    fn every_chip_gets_its_best_image() {
        let expected = [
            ((6, 1), None),
            ((7, 0), Some("compute_70")),
            ((7, 2), Some("compute_70")),
            ((7, 5), Some("sm_75")),
            ((8, 0), Some("sm_80")),
            ((8, 6), Some("sm_86")),
            ((8, 7), Some("sm_86")),
            ((8, 9), Some("sm_89")),
            ((9, 0), Some("sm_90a")),
            ((10, 0), Some("sm_100")),
            ((10, 3), Some("sm_100")),
            ((11, 0), Some("compute_80")),
            ((12, 0), Some("sm_120")),
            ((12, 1), Some("sm_120")),
            ((13, 0), Some("compute_80")),
        ];
        for ((major, minor), target) in expected {
            assert_eq!(choose(&TARGETS, major, minor), target, "compute capability {major}.{minor}");
        }
    }

    #[test]
    fn every_embedded_image_inflates() {
        for image in IMAGES {
            let bytes = image.unpacked().unwrap();
            let ptx = image.target.starts_with("compute_");
            assert_eq!(bytes.starts_with(b"\x7fELF"), !ptx, "{} {}", image.family, image.target);
            assert_eq!(bytes.ends_with(b"\0"), ptx || bytes.ends_with(b"\0"), "{} {}", image.family, image.target);
        }
    }
}
