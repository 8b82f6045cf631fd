//! Compiles `kernels/*.cu` with NVRTC into PTX and machine-code images that the library embeds.
//!
//! No CUDA toolkit and no host compiler: NVRTC and the CUDA headers are Python packages named in `build-system.requires`, and
//! the interpreter that the crate is built for says where they lie. `FEWBITS_CUDA=0` builds without kernels, and so does a
//! system for which NVRTC is not published (macOS); elsewhere a missing NVRTC is an error. `FEWBITS_IMAGE_CACHE` names a
//! folder that keeps images from one build to another: of another profile, or with clippy, cargo runs this script anew.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

#[path = "src/codebook.rs"]
#[allow(dead_code, missing_docs)]
mod codebook;
#[path = "build/image.rs"]
mod image;
#[path = "build/instances.rs"]
mod instances;
#[path = "src/matmul4_instances.rs"]
#[allow(dead_code, missing_docs)]
mod matmul4_instances;
#[path = "build/nvrtc.rs"]
mod nvrtc;
#[path = "build/tables.rs"]
mod tables;
#[path = "build/wgmma.rs"]
mod wgmma;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Machine code for the chips of today, and PTX that a driver compiles for those of tomorrow (and for 7.0 and 7.2).
const TARGETS: [&str; 9] =
    ["compute_70", "compute_80", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"];
/// One kernel file each, and what it is compiled for.
const FAMILIES: [(&str, &[&str]); 18] = [
    ("quantize", &TARGETS),
    ("dequantize", &TARGETS),
    ("double_quant", &TARGETS),
    ("panel", &TARGETS),
    ("matmul4_plain", &TARGETS),
    ("matmul4_mma", &SINCE_AMPERE),
    ("matmul4_broad", &SINCE_AMPERE),
    ("matmul4_skinny", &HOPPER),
    ("matmul4_mid", &HOPPER),
    ("matmul4_wgmma", &HOPPER),
    ("optim8", &TARGETS),
    ("optim32", &TARGETS),
    ("optim_norm", &TARGETS),
    ("int8_rows", &TARGETS),
    ("int8_plain", &TARGETS),
    ("int8_mma", &SINCE_TURING),
    ("int8_skinny", &HOPPER),
    ("int8_wgmma", &HOPPER),
];
/// What needs asynchronous copies and tensor cores for bfloat16.
const SINCE_AMPERE: [&str; 7] = ["compute_80", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"];
/// What needs tensor cores for int8.
const SINCE_TURING: [&str; 8] = ["compute_80", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"];
/// What uses instructions of Hopper alone.
const HOPPER: [&str; 1] = ["sm_90a"];

fn main() {
    if let Err(error) = build() {
        eprintln!("fewbits: {error}");
        std::process::exit(1);
    }
}

fn build() -> Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=src/codebook.rs");
    println!("cargo::rerun-if-changed=src/matmul4_instances.rs");
    println!("cargo::rerun-if-env-changed=FEWBITS_CUDA");
    println!("cargo::rerun-if-env-changed=FEWBITS_IMAGE_CACHE");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let system = env::var("CARGO_CFG_TARGET_OS")?;
    if env::var("FEWBITS_CUDA").as_deref() == Ok("0") || !matches!(system.as_str(), "linux" | "windows") {
        println!("cargo::warning=fewbits is built without CUDA kernels (FEWBITS_CUDA=0, or no NVRTC for {system})");
        fs::write(out.join("images.rs"), "pub static IMAGES: &[Image] = &[];\n")?;
        return Ok(());
    }

    let nvrtc = nvrtc::Nvrtc::find()?;
    let mut headers = BTreeMap::from([
        ("tables.cuh".to_string(), tables::header()?),
        ("wgmma.cuh".to_string(), wgmma::header()?),
        ("matmul4_instances.cuh".to_string(), instances::header()?),
    ]);
    for entry in fs::read_dir("kernels")? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "cuh") {
            headers.insert(file_name(&path), fs::read_to_string(&path)?);
        }
    }

    let mut jobs = Vec::new();
    for (family, targets) in FAMILIES {
        let source = fs::read_to_string(format!("kernels/{family}.cu"))?;
        let sources = image::Sources::of(family, source, &headers);
        for &target in targets {
            jobs.push((target, sources.clone()));
        }
    }
    // Whoever is free takes the next image.
    let next = AtomicUsize::new(0);
    let workers = thread::available_parallelism()?.get();
    let failures: Vec<String> = thread::scope(|scope| {
        let handles: Vec<_> = (0..workers)
            .map(|_| {
                scope.spawn(|| {
                    while let Some((target, sources)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                        image::write(&nvrtc, &out, target, sources)
                            .map_err(|error| format!("kernels/{}.cu for {target}: {error}", sources.family))?;
                    }
                    Ok(())
                })
            })
            .collect();
        handles
            .into_iter()
            .filter_map(|handle| handle.join().unwrap_or_else(|_| Err("a compiler thread died".to_string())).err())
            .collect()
    });
    if !failures.is_empty() {
        return Err(failures.join("\n").into());
    }

    let mut table = String::from("pub static IMAGES: &[Image] = &[\n");
    for (target, sources) in &jobs {
        let family = sources.family;
        let path = out.join(format!("{family}.{target}.br"));
        writeln!(table, "    Image {{ family: {family:?}, target: {target:?}, packed: include_bytes!({path:?}) }},")?;
    }
    table.push_str("];\n");
    fs::write(out.join("images.rs"), table)?;
    Ok(())
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
