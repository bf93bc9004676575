//! Devices and models from the command line's words.

use super::console;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use candle_sam_lora::sam::{checkpoint, AttentionKind, SamConfig, SamModel};
use candle_sam_lora::{hub, Result};
use std::path::{Path, PathBuf};

/// The file or folder of the model called `name`, by default of the small one that comes with the project.
pub fn folder(name: Option<&Path>) -> Result<PathBuf> {
    name.map_or_else(|| Ok(shipped_model()), hub::folder)
}

/// The small model that comes with the project.
pub fn shipped_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets").join("tiny-sam")
}

/// The device called `name`.
///
/// On the CPU the heavy work is in this crate's operations, which have threads of their own. Candle's elementwise ones
/// wait for each other by spinning, which on a busy machine takes several times longer than one thread would; they
/// get one, unless `CANDLE_NUM_THREADS` says otherwise. The results are the same, bit for bit.
pub fn device(name: &str) -> Result<Device> {
    const THREADS: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(THREADS).is_none() {
        std::env::set_var(THREADS, "1");
    }
    candle_sam_lora::device(name)
}

/// The model in a file of weights or in a folder with one, in `dtype`. Says what was found there.
pub fn load_model(
    path: &Path,
    kind: AttentionKind,
    dtype: DType,
    device: &Device,
) -> Result<(SamConfig, SamModel)> {
    let sizes = checkpoint::sizes(path)?;
    let mut model = SamModel::new(&sizes.config, kind, VarBuilder::zeros(dtype, device))?;
    let loaded = checkpoint::load(&mut model, path)?;
    console::say(format!("model: {loaded}; {sizes}"));
    Ok((sizes.config, model))
}
