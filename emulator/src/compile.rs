//! From kernel sources to a shared library, object by object, each cached by the hash of all that goes into it.

use crate::files::with_extensions;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

/// Sources to compile.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The folder with the headers. All `.cu` files below it are compiled, unless `files` names others.
    pub kernels: PathBuf,
    /// Compile these `.cu` files instead, against the headers of that folder.
    pub files: Option<Vec<PathBuf>>,
    /// Macros to compile the kernels with, as `NAME=VALUE`.
    pub defines: Vec<String>,
}

impl Sources {
    /// All kernels of a folder.
    pub fn all(kernels: impl Into<PathBuf>) -> Self {
        Self { kernels: kernels.into(), files: None, defines: Vec::new() }
    }

    /// These files, against the headers of a folder.
    pub fn files(kernels: impl Into<PathBuf>, files: Vec<PathBuf>) -> Self {
        Self { files: Some(files), ..Self::all(kernels) }
    }

    /// Compiles into `cache`; the path of the library.
    pub(crate) fn compile(&self, cache: &Path) -> Result<PathBuf, String> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        std::fs::create_dir_all(cache).map_err(|e| format!("{}: {e}", cache.display()))?;
        let runtime = with_extensions(&here.join("runtime"), &["cpp"])?;
        let kernels = match &self.files {
            Some(files) => files.clone(),
            None => with_extensions(&self.kernels, &["cu"])?,
        };
        let mut headers = with_extensions(&here.join("include"), &["h"])?;
        headers.extend(with_extensions(&here.join("runtime"), &["h"])?);
        let compiler = Compiler::new(self)?;

        // As many compilers at once as there are cores, each taking the next source.
        let sources: Vec<PathBuf> = runtime.into_iter().chain(kernels).collect();
        let objects = Mutex::new(vec![PathBuf::new(); sources.len()]);
        let (next, errors) = (AtomicUsize::new(0), Mutex::new(String::new()));
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(|| loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(source) = sources.get(index) else { break };
                    match compiler.object(source, &headers, cache) {
                        Ok(object) => lock(&objects)[index] = object,
                        Err(error) => lock(&errors).push_str(&error),
                    }
                });
            }
        });
        let errors = lock(&errors);
        if !errors.is_empty() {
            return Err(errors.clone());
        }
        let objects = lock(&objects);
        compiler.link(&objects, cache)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

struct Compiler {
    program: String,
    flags: Vec<String>,
    /// Output of `--version`: another compiler makes other objects.
    version: String,
    sanitize: Option<String>,
    kernels: PathBuf,
    defines: Vec<String>,
}

impl Compiler {
    fn new(sources: &Sources) -> Result<Self, String> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let program = std::env::var("CXX").unwrap_or_else(|_| "c++".to_string());
        let sanitize = std::env::var("EMULATOR_SANITIZE").ok().filter(|s| !s.is_empty());
        let mut flags: Vec<String> = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall"]
            .into_iter()
            .chain(["-Wextra", "-Wno-unknown-pragmas", "-pthread", "-ffp-contract=off"])
            .map(str::to_string)
            .collect();
        flags.push(if sanitize.is_some() { "-O1" } else { "-O2" }.to_string());
        // An instruction for fused multiply-add; without it fmaf is a slow call.
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            flags.push("-march=x86-64-v3".to_string());
        }
        if std::env::var_os("EMULATOR_UCONTEXT").is_some() {
            flags.push("-DEMULATOR_UCONTEXT".to_string());
        }
        flags.push(format!("-I{}", here.join("include").display()));
        let Sources { kernels, defines, .. } = sources.clone();
        let version = String::new();
        let mut compiler = Self { program, flags, version, sanitize, kernels, defines };
        compiler.version = compiler.run(&["--version".to_string()])?;
        if !compiler.version.contains("clang") {
            // Each library keeps its own table of kernels though several are loaded.
            compiler.flags.push("-fno-gnu-unique".to_string());
        }
        Ok(compiler)
    }

    fn run(&self, arguments: &[String]) -> Result<String, String> {
        let output = Command::new(&self.program)
            .args(arguments)
            .env_remove("LD_PRELOAD") // the sanitizer's runtime is for the tests
            .output()
            .map_err(|e| {
                format!(
                    "the emulator needs a C++20 compiler: cannot run {}: {e} (set CXX)",
                    self.program
                )
            })?;
        if !output.status.success() {
            let log = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{} {}\n{log}", self.program, arguments.join(" ")));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn object(&self, source: &Path, headers: &[PathBuf], cache: &Path) -> Result<PathBuf, String> {
        let mut flags = self.flags.clone();
        let is_runtime = source.extension().is_some_and(|e| e == "cpp");
        if !is_runtime {
            flags.push(format!("-I{}", self.kernels.display()));
            flags.extend(self.defines.iter().map(|define| format!("-D{define}")));
        }
        if let Some(sanitize) = &self.sanitize {
            // The scheduler is no subject of ThreadSanitizer, but tells it what orders what.
            if sanitize == "thread" {
                flags.push("-DEMULATOR_TSAN".to_string());
            }
            if !(sanitize == "thread" && is_runtime) {
                flags.push(format!("-fsanitize={sanitize}"));
                flags.push("-fno-omit-frame-pointer".to_string());
            }
            if sanitize.contains("undefined") {
                flags.push("-fno-sanitize-recover=undefined".to_string());
            }
        }
        let mut hasher = DefaultHasher::new();
        (&self.version, &flags, source).hash(&mut hasher);
        let mut files = headers.to_vec();
        if !is_runtime {
            files.extend(with_extensions(&self.kernels, &["cuh", "h"])?);
        }
        files.push(source.to_path_buf());
        for file in &files {
            let content = std::fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?;
            (file, content).hash(&mut hasher);
        }
        let stem = source.file_stem().unwrap_or_default().to_string_lossy();
        let object = cache.join(format!("{stem}-{:016x}.o", hasher.finish()));
        self.cached(&object, |out| {
            flags.extend(["-x", "c++", "-c"].map(str::to_string));
            flags.push(source.display().to_string());
            flags.extend(["-o".to_string(), out.display().to_string()]);
            self.run(&flags)
        })
    }

    fn link(&self, objects: &[PathBuf], cache: &Path) -> Result<PathBuf, String> {
        let mut hasher = DefaultHasher::new();
        (objects, &self.sanitize).hash(&mut hasher);
        let library = cache.join(format!("libkernels-{:016x}.so", hasher.finish()));
        self.cached(&library, |out| {
            let mut arguments = vec!["-shared".to_string(), "-pthread".to_string()];
            arguments.extend(self.sanitize.iter().map(|s| format!("-fsanitize={s}")));
            arguments.extend(objects.iter().map(|o| o.display().to_string()));
            arguments.extend(["-o".to_string(), out.display().to_string()]);
            self.run(&arguments)
        })
    }

    /// Makes `path` unless it is there, under another name first, so that it is there whole or not at all.
    fn cached(
        &self,
        path: &Path,
        make: impl FnOnce(&Path) -> Result<String, String>,
    ) -> Result<PathBuf, String> {
        if !path.exists() {
            let thread = std::thread::current().id();
            let new = path.with_extension(format!("{}-{thread:?}.new", std::process::id()));
            make(&new)?;
            std::fs::rename(&new, path).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(path.to_path_buf())
    }
}

/// The output of a C++ program, compiled against the emulator's headers and those of a folder of kernels.
pub(crate) fn output_of(program: &Path, kernels: &Path, cache: &Path) -> Result<String, String> {
    std::fs::create_dir_all(cache).map_err(|e| format!("{}: {e}", cache.display()))?;
    let compiler = Compiler::new(&Sources::all(kernels))?;
    let thread = std::thread::current().id();
    let binary = cache.join(format!("program-{}-{thread:?}", std::process::id()));
    let mut arguments = compiler.flags.clone();
    arguments.extend([format!("-I{}", kernels.display()), program.display().to_string()]);
    arguments.extend(["-o".to_string(), binary.display().to_string()]);
    compiler.run(&arguments)?;
    let output = Command::new(&binary).output();
    // A temporary file that stays behind is no reason to fail.
    let _ = std::fs::remove_file(&binary);
    let output = output.map_err(|e| format!("{}: {e}", binary.display()))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{}: {}", program.display(), output.status)),
    }
}
