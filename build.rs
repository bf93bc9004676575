//! Compiles the CUDA kernels, with the `cuda` feature alone: `kernels/*/*.cu` for every GPU from compute capability 8.0
//! on, and `kernels/*/sm90/*.cu` for Hopper. The crate embeds each as a fat binary.
//!
//! | environment | meaning |
//! |---|---|
//! | `CANDLE_SAM_LORA_NVCC`, `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH` | where nvcc is, in this order; the first for these kernels alone |
//! | `NVCC_CCBIN` | the host compiler, read by nvcc itself |
//! | `CANDLE_SAM_LORA_CUDA_ARCHS` | compute capabilities, `80;90a`; or `all`, the default |
//! | `CUDA_COMPUTE_CAP` | the same, if that one is not set; candle's own kernels know this one, and take one only |
//! | `CANDLE_SAM_LORA_NVCC_FLAGS` | further flags, as `-lineinfo` |
//! | `CANDLE_SAM_LORA_KERNEL_CACHE` | a folder for compiled kernels, shared by builds; else they are kept in OUT_DIR |

#[path = "build/advice.rs"]
mod advice;
#[path = "build/family.rs"]
mod family;
#[path = "build/files.rs"]
mod files;

use advice::{advice, Release};
use family::{family, is_for_hopper};
use files::with_extensions;
use std::collections::hash_map::DefaultHasher;
use std::fmt::Write;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::{env, fs};

/// The oldest release that knows C++20.
const OLDEST_CUDA: Release = (12, 0);
/// Compiled for, as far as nvcc knows them; PTX serves what is newer.
const ALL: [u32; 6] = [80, 86, 89, 90, 100, 120];
const OLDEST_CAPABILITY: u32 = 80;
const HOW_TO_GET_NVCC: &str = "install the CUDA toolkit (https://developer.nvidia.com/cuda-downloads) and set \
     CUDA_HOME, or, from a checkout, run `eval \"$(scripts/cuda-toolchain.sh)\"`, which needs neither root nor a GPU";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let built = if env::var_os("DOCS_RS").is_some() { embed(&[], &[], "none") } else { build() };
    if let Err(message) = built {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
}

fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-env-changed=NVCC_CCBIN");
    let nvcc = Nvcc::find()?;
    let capabilities = capabilities(&nvcc)?;
    if let Some(advice) = advice(nvcc.release, capabilities.contains(&90)) {
        println!("cargo::warning={}: {advice}", nvcc.path.display());
    }
    let mut portable: Vec<String> =
        capabilities.iter().map(|c| format!("-gencode=arch=compute_{c},code=sm_{c}")).collect();
    // PTX for devices that are newer than all of these.
    portable.extend(
        capabilities.first().map(|c| format!("-gencode=arch=compute_{c},code=compute_{c}")),
    );
    let hopper = match capabilities.contains(&90) {
        true => vec!["-gencode=arch=compute_90a,code=sm_90a".to_string()],
        false => Vec::new(),
    };
    let images: Vec<_> = with_extensions(Path::new("kernels"), &["cu"])?
        .into_iter()
        .map(|source| {
            let targets = if is_for_hopper(&source) { &hopper } else { &portable };
            (source, targets.clone())
        })
        .filter(|(_, targets)| !targets.is_empty())
        .collect();
    embed(&nvcc.compile_all(&images)?, &capabilities, &nvcc.name())
}

/// Writes the table of compiled kernels that src/cuda/modules.rs includes.
fn embed(images: &[(String, PathBuf)], capabilities: &[u32], compiler: &str) -> Result<(), String> {
    let mut table = String::from("pub(super) static IMAGES: &[(&str, &[u8])] = &[\n");
    for (name, path) in images {
        let _ =
            writeln!(table, "    ({name:?}, include_bytes!({:?})),", path.display().to_string());
    }
    let _ = writeln!(table, "];\npub(super) static CAPABILITIES: &[u32] = &{capabilities:?};");
    let _ = writeln!(table, "pub(crate) static COMPILER: &str = {compiler:?};");
    let path = out_dir()?.join("images.rs");
    fs::write(&path, table).map_err(|e| format!("{}: {e}", path.display()))
}

/// Architectures to compile for, sorted: as asked for, or everything that nvcc knows.
fn capabilities(nvcc: &Nvcc) -> Result<Vec<u32>, String> {
    let named = ["CANDLE_SAM_LORA_CUDA_ARCHS", "CUDA_COMPUTE_CAP"]
        .into_iter()
        .filter_map(|name| Some((name, variable(name)?)))
        .next();
    let (name, list) = match &named {
        Some((name, list)) if list != "all" => (*name, list),
        _ => return Ok(ALL.into_iter().filter(|c| nvcc.capabilities.contains(c)).collect()),
    };
    let mut wanted = Vec::new();
    for item in list.split([';', ',', ' ']).filter(|item| !item.is_empty()) {
        let number = item.trim_end_matches(['a', 'f']).replace('.', "");
        let capability = number.parse().map_err(|_| {
            format!("{name}={list}: {item:?} is no compute capability; expected something like 80, 8.6 or 90a;100")
        })?;
        if capability < OLDEST_CAPABILITY {
            println!(
                "cargo::warning={name}={list}: the kernels need compute capability 8.0; on a device of {item} the \
                 operations run as composed candle graphs"
            );
        } else if !nvcc.capabilities.contains(&capability) {
            return Err(format!(
                "{name}={list}: {} compiles for {:?}, not for {item}; name one of these, or get a newer CUDA toolkit",
                nvcc.path.display(),
                nvcc.capabilities
            ));
        } else {
            wanted.push(capability);
        }
    }
    wanted.sort_unstable();
    wanted.dedup();
    Ok(wanted)
}

struct Nvcc {
    path: PathBuf,
    version: String,
    release: Release,
    capabilities: Vec<u32>,
    flags: Vec<String>,
    cache: PathBuf,
}

impl Nvcc {
    fn find() -> Result<Self, String> {
        let path = Self::path();
        let run = |argument: &str| {
            let output = Command::new(&path).arg(argument).output().map_err(|e| {
                format!(
                    "the cuda feature needs nvcc; cannot run {}: {e}\n{HOW_TO_GET_NVCC}",
                    path.display()
                )
            })?;
            Ok::<_, String>(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let version = run("--version")?;
        let release = version.split("release ").nth(1).and_then(|text| {
            let (major, rest) = text.split_once('.')?;
            let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
            Some((major.parse().ok()?, minor.parse().ok()?))
        });
        let release = match release {
            Some(release) if release >= OLDEST_CUDA => release,
            Some((major, minor)) => {
                return Err(format!(
                "{} is CUDA {major}.{minor}; the kernels need {}.{} or newer\n{HOW_TO_GET_NVCC}",
                path.display(),
                OLDEST_CUDA.0,
                OLDEST_CUDA.1
            ))
            }
            None => {
                return Err(format!("{} is no nvcc: {version}\n{HOW_TO_GET_NVCC}", path.display()))
            }
        };
        let known = run("--list-gpu-code")?;
        let capabilities = known
            .split_whitespace()
            .filter_map(|code| code.strip_prefix("sm_")?.parse().ok())
            .collect();
        let mut flags: Vec<String> =
            ["--fatbin", "-std=c++20", "-O3", "-Ikernels"].map(String::from).into();
        flags.extend(
            variable("CANDLE_SAM_LORA_NVCC_FLAGS")
                .iter()
                .flat_map(|f| f.split_whitespace())
                .map(String::from),
        );
        let cache = match variable("CANDLE_SAM_LORA_KERNEL_CACHE") {
            Some(cache) => PathBuf::from(cache),
            None => out_dir()?,
        };
        fs::create_dir_all(&cache).map_err(|e| format!("{}: {e}", cache.display()))?;
        Ok(Self { path, version, release, capabilities, flags, cache })
    }

    /// `nvcc 13.0.88`: the release with its build, since compilers of one release differ too.
    fn name(&self) -> String {
        let build = self.version.split_whitespace().find_map(|word| word.strip_prefix('V'));
        format!("nvcc {}", build.unwrap_or("of an unknown version"))
    }

    fn path() -> PathBuf {
        let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
        let named = ["CANDLE_SAM_LORA_NVCC", "NVCC"].into_iter().find_map(variable);
        let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable);
        let at_home =
            homes.map(|home| Path::new(&home).join("bin").join(&name)).find(|p| p.exists());
        named.map(PathBuf::from).or(at_home).unwrap_or_else(|| PathBuf::from(name))
    }

    /// The name and the fat binary of each source, as many at once as cargo allows.
    fn compile_all(
        &self,
        images: &[(PathBuf, Vec<String>)],
    ) -> Result<Vec<(String, PathBuf)>, String> {
        let headers = with_extensions(Path::new("kernels"), &["h", "cuh"])?;
        let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
        let queue = Mutex::new(images.iter().enumerate());
        let done = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..jobs.min(images.len()) {
                scope.spawn(|| loop {
                    let Some((index, (source, archs))) = lock(&queue).next() else { break };
                    let image = self.compile(source, &headers, archs);
                    lock(&done).push((index, image));
                });
            }
        });
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_by_key(|(index, _)| *index);
        done.into_iter().map(|(_, image)| image).collect()
    }

    /// Compiles one source, unless the same has been compiled before.
    fn compile(
        &self,
        source: &Path,
        headers: &[PathBuf],
        archs: &[String],
    ) -> Result<(String, PathBuf), String> {
        let mut hasher = DefaultHasher::new();
        (&self.version, &self.flags, archs).hash(&mut hasher);
        for file in headers.iter().map(PathBuf::as_path).chain([source]) {
            let content = fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?;
            (file, content).hash(&mut hasher);
        }
        let name = family(source)
            .ok_or_else(|| format!("{} lies in no operation's folder", source.display()))?;
        let image = self.cache.join(format!("{name}-{:016x}.fatbin", hasher.finish()));
        if image.exists() {
            return Ok((name, image));
        }
        // Whole or not at all, even if two builds make it at once.
        let new = image.with_extension(format!("{}.new", std::process::id()));
        let mut command = Command::new(&self.path);
        // Flags meant for all of a user's CUDA code would change the kernels unseen.
        command.env_remove("NVCC_APPEND_FLAGS").env_remove("NVCC_PREPEND_FLAGS");
        command.args(&self.flags).args(archs).arg(source).arg("-o").arg(&new);
        let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
        let log = [output.stdout, output.stderr]
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .concat();
        if !output.status.success() {
            let advice = if ["host compiler", "unsupported GNU version", "Cannot find compiler"]
                .iter()
                .any(|sign| log.contains(sign))
            {
                "\nnvcc needs a host C++ compiler that it supports: install g++, or name one in NVCC_CCBIN"
            } else {
                ""
            };
            return Err(format!("{command:?} failed:\n{log}{advice}"));
        }
        fs::rename(&new, &image).map_err(|e| format!("{}: {e}", image.display()))?;
        Ok((name, image))
    }
}

/// An environment variable that is set and not empty; cargo runs this script again when it changes.
fn variable(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var(name).ok().filter(|value| !value.trim().is_empty())
}

fn out_dir() -> Result<PathBuf, String> {
    env::var_os("OUT_DIR").map(PathBuf::from).ok_or_else(|| "OUT_DIR is not set".to_string())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
