//! One image: what it is made of, compiled and packed, or taken from an earlier build.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::Path;
use std::{env, fs};

use crate::Result;
use crate::nvrtc::Nvrtc;

/// Products stay products: CPU and GPU must agree to the last bit, so nothing is fused that the source does not fuse.
const OPTIONS: [&str; 3] = ["--std=c++17", "--fmad=false", "--extra-device-vectorization"];

/// The best that there is: the wheel holds little else.
const QUALITY: i32 = 11;

/// A kernel file and the headers that it includes, itself or by way of others.
#[derive(Clone)]
pub struct Sources {
    pub family: &'static str,
    text: String,
    headers: Vec<(String, String)>,
}

impl Sources {
    /// `headers` has all that there are; NVRTC sees no more than the images' stamps do.
    pub fn of(family: &'static str, text: String, headers: &BTreeMap<String, String>) -> Self {
        let mut found = BTreeMap::new();
        let mut unread = vec![&text];
        while let Some(text) = unread.pop() {
            for name in text.lines().filter_map(included) {
                // Another name is NVRTC's to refuse.
                if let Some(header) = headers.get(name)
                    && found.insert(name.to_string(), header.clone()).is_none()
                {
                    unread.push(header);
                }
            }
        }
        Self { family, headers: found.into_iter().collect(), text }
    }
}

/// The name in `#include "name"`.
fn included(line: &str) -> Option<&str> {
    line.strip_prefix("#include \"")?.split('"').next()
}

/// Puts one image into `out`, compiled unless the same sources and options gave it before: there, or in the cache.
pub fn write(nvrtc: &Nvrtc, out: &Path, target: &str, sources: &Sources) -> Result<()> {
    let Sources { family, text, headers } = sources;
    let mut hasher = DefaultHasher::new();
    (text, headers, target, OPTIONS, QUALITY, &nvrtc.version).hash(&mut hasher);
    let stamp = format!("{:016x}", hasher.finish());
    let (stamp_path, image_path) =
        (out.join(format!("{family}.{target}.stamp")), out.join(format!("{family}.{target}.br")));
    if image_path.exists() && fs::read_to_string(&stamp_path).is_ok_and(|s| s == stamp) {
        return Ok(());
    }
    let cached =
        env::var_os("FEWBITS_IMAGE_CACHE").map(|cache| Path::new(&cache).join(format!("{family}.{target}.{stamp}.br")));
    let packed = match cached.as_deref().map(fs::read) {
        Some(Ok(packed)) => packed,
        _ => compile(nvrtc, target, sources)?,
    };
    fs::write(image_path, &packed)?;
    fs::write(stamp_path, stamp)?;
    if let Some(path) = cached.filter(|path| !path.exists()) {
        // Under a name of its own until it is whole: other builds may read the cache now.
        let part = path.with_extension(format!("{}.part", std::process::id()));
        fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        fs::write(&part, packed)?;
        fs::rename(part, path)?;
    }
    Ok(())
}

/// Compiles one image and packs it.
fn compile(nvrtc: &Nvrtc, target: &str, sources: &Sources) -> Result<Vec<u8>> {
    let image = nvrtc.compile(&format!("{}.cu", sources.family), &sources.text, &sources.headers, target, &OPTIONS)?;
    // Half of what zlib makes of it: instances of a template repeat each other further back than its window reaches.
    let parameters =
        brotli::enc::BrotliEncoderParams { quality: QUALITY, lgwin: 24, size_hint: image.len(), ..Default::default() };
    let mut packed = Vec::new();
    brotli::BrotliCompress(&mut image.as_slice(), &mut packed, &parameters)?;
    Ok(packed)
}
