//! NVRTC from the Python packages `nvidia-cuda-nvrtc-cu12` and `nvidia-cuda-runtime-cu12`.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, ptr};

use libloading::Library;

use crate::Result;

/// PTX is labelled with the oldest version that has all of its instructions, so that a driver of CUDA 11.8 takes it;
/// an assembler refuses an instruction newer than the label.
const PTX_VERSION: &str = ".version 7.8";

type Program = *mut c_void;

/// The run-time compiler.
pub struct Nvrtc {
    library: Library,
    include: PathBuf,
    /// Major and minor version, part of every image's stamp.
    pub version: (c_int, c_int),
}

impl Nvrtc {
    /// Asks the interpreter that the crate is built for where the compiler and the headers lie.
    pub fn find() -> Result<Self> {
        let python = env::var("PYO3_PYTHON").unwrap_or_else(|_| "python3".to_string());
        println!("cargo::rerun-if-env-changed=PYO3_PYTHON");
        let script = "import importlib.util as u\n\
                      for name in ('nvidia.cuda_nvrtc', 'nvidia.cuda_runtime'):\n    \
                          spec = u.find_spec(name)\n    \
                          print(list(spec.submodule_search_locations)[0] if spec else '')";
        let output = Command::new(&python).args(["-c", script]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut lines = text.lines();
        let (Some(nvrtc), Some(runtime)) =
            (lines.next().filter(|l| !l.is_empty()), lines.next().filter(|l| !l.is_empty()))
        else {
            return Err(format!(
                "{python} has no NVRTC: install nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12 (versions in pyproject.toml), \
                 or set FEWBITS_CUDA=0 for a build without CUDA kernels\n{}",
                String::from_utf8_lossy(&output.stderr)
            )
            .into());
        };
        let path = library_path(Path::new(nvrtc))?;
        // SAFETY: NVRTC's own library, which runs no code of ours when it is loaded.
        let library = unsafe { Library::new(&path)? };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the signature is the one of nvrtc.h.
        unsafe {
            let version: libloading::Symbol<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int> =
                library.get(b"nvrtcVersion\0")?;
            version(&mut major, &mut minor);
        }
        Ok(Self { library, include: Path::new(runtime).join("include"), version: (major, minor) })
    }

    /// PTX text (NUL-terminated) for a `compute_` target, machine code for an `sm_` one.
    pub fn compile(
        &self,
        name: &str,
        source: &str,
        headers: &[(String, String)],
        target: &str,
        options: &[&str],
    ) -> Result<Vec<u8>> {
        let source = CString::new(source)?;
        let name = CString::new(name)?;
        let names =
            headers.iter().map(|(n, _)| CString::new(n.as_str())).collect::<std::result::Result<Vec<_>, _>>()?;
        let texts =
            headers.iter().map(|(_, t)| CString::new(t.as_str())).collect::<std::result::Result<Vec<_>, _>>()?;
        let mut options: Vec<String> = options.iter().map(|o| (*o).to_string()).collect();
        options.push(format!("--gpu-architecture={target}"));
        options.push(format!("--include-path={}", self.include.display()));
        let options = options.into_iter().map(CString::new).collect::<std::result::Result<Vec<_>, _>>()?;
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (name_pointers, text_pointers, option_pointers) = (pointers(&names), pointers(&texts), pointers(&options));

        // SAFETY: signatures are those of nvrtc.h; every pointer outlives the calls, and the program is destroyed once.
        unsafe {
            let create: libloading::Symbol<
                unsafe extern "C" fn(
                    *mut Program,
                    *const c_char,
                    *const c_char,
                    c_int,
                    *const *const c_char,
                    *const *const c_char,
                ) -> c_int,
            > = self.library.get(b"nvrtcCreateProgram\0")?;
            let compile: libloading::Symbol<unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int> =
                self.library.get(b"nvrtcCompileProgram\0")?;
            let destroy: libloading::Symbol<unsafe extern "C" fn(*mut Program) -> c_int> =
                self.library.get(b"nvrtcDestroyProgram\0")?;

            let mut program: Program = ptr::null_mut();
            let count = c_int::try_from(headers.len())?;
            let code = create(
                &mut program,
                source.as_ptr(),
                name.as_ptr(),
                count,
                text_pointers.as_ptr(),
                name_pointers.as_ptr(),
            );
            self.check(code)?;
            let code = compile(program, c_int::try_from(options.len())?, option_pointers.as_ptr());
            let result = if code == 0 {
                if target.starts_with("compute_") {
                    self.bytes(program, b"nvrtcGetPTXSize\0", b"nvrtcGetPTX\0").and_then(label_ptx)
                } else {
                    self.bytes(program, b"nvrtcGetCUBINSize\0", b"nvrtcGetCUBIN\0")
                }
            } else {
                let log = self.bytes(program, b"nvrtcGetProgramLogSize\0", b"nvrtcGetProgramLog\0")?;
                Err(String::from_utf8_lossy(&log).into_owned().into())
            };
            destroy(&mut program);
            result
        }
    }

    /// # Safety
    /// `program` is a live program of this library, and the names are a size and a content getter of nvrtc.h.
    unsafe fn bytes(&self, program: Program, size_name: &[u8], name: &[u8]) -> Result<Vec<u8>> {
        // SAFETY: signatures as in nvrtc.h; the buffer has the size that the library asked for.
        unsafe {
            let size: libloading::Symbol<unsafe extern "C" fn(Program, *mut usize) -> c_int> =
                self.library.get(size_name)?;
            let get: libloading::Symbol<unsafe extern "C" fn(Program, *mut u8) -> c_int> = self.library.get(name)?;
            let mut length = 0;
            self.check(size(program, &mut length))?;
            let mut bytes = vec![0; length];
            self.check(get(program, bytes.as_mut_ptr()))?;
            Ok(bytes)
        }
    }

    fn check(&self, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: signature as in nvrtc.h; the library returns a static string.
        unsafe {
            let text: libloading::Symbol<unsafe extern "C" fn(c_int) -> *const c_char> =
                self.library.get(b"nvrtcGetErrorString\0")?;
            Err(CStr::from_ptr(text(code)).to_string_lossy().into_owned().into())
        }
    }
}

fn label_ptx(ptx: Vec<u8>) -> Result<Vec<u8>> {
    let text = String::from_utf8(ptx)?;
    let start = text.find(".version").ok_or("PTX without a version")?;
    let end = start + text[start..].find('\n').ok_or("PTX without a line end")?;
    // A hint about loads whose bytes are not all used, which only newer versions know.
    let hint = |line: &&str| !line.trim_start().starts_with(".pragma \"used_bytes_mask");
    let body: String = text[end..].split_inclusive('\n').filter(hint).collect();
    Ok(format!("{}{}{body}", &text[..start], PTX_VERSION).into_bytes())
}

fn library_path(package: &Path) -> Result<PathBuf> {
    for folder in ["lib", "bin"] {
        let Ok(entries) = fs::read_dir(package.join(folder)) else { continue };
        for entry in entries {
            let path = entry?.path();
            let name = crate::file_name(&path);
            let library = name.starts_with("libnvrtc.so") || (name.starts_with("nvrtc64_") && name.ends_with(".dll"));
            if library && !name.contains("alt") {
                return Ok(path);
            }
        }
    }
    Err(format!("no NVRTC library in {}", package.display()).into())
}
