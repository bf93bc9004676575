//! Models from their files: weights, adapter, image processor.

use super::console::Console;
use crate::file_kind::Kind;
use crate::lora::{
    adapter_keys, load_adapter_as, load_adapter_tensors, read_samed_adapter, LoraConfig,
    CONFIG_FILE,
};
use crate::nn::{quantize_int8, set_trainable, ModuleTree, DEFAULT_ADAPTER};
use crate::sam::{
    checkpoint, AttentionKind, SamConfig, SamHqModel, SamModel, SamPredictor, SamProcessor,
    SamVisionEncoder,
};
use crate::{hub, Error, Result};
use anyhow::{anyhow, Context};
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use clap::ValueEnum;
use std::path::{Path, PathBuf};

/// Where a model's tensors are, and their type.
pub struct Placement {
    /// The CPU or a GPU.
    pub device: Device,
    /// The dtype of weights and activations.
    pub dtype: DType,
    /// How the frozen weights of the encoder's linear layers are stored, if not in the dtype.
    pub quantize: Option<Quantize>,
}

/// Types of quantized weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Quantize {
    /// 8 bits, with a scale for each output channel
    Int8,
}

impl Placement {
    /// The CPU, in f32: where models are converted.
    pub fn exact() -> Self {
        Self { device: Device::Cpu, dtype: DType::F32, quantize: None }
    }

    /// Quantizes an encoder, if that is wanted, and says what became of its weights.
    pub fn quantize(&self, encoder: &mut SamVisionEncoder, console: Console) -> Result<()> {
        if let Some(Quantize::Int8) = self.quantize {
            console.note(quantize_int8(encoder)?);
        }
        Ok(())
    }
}

/// The files of a model.
pub struct Source {
    /// File of weights, or folder with them.
    pub weights: PathBuf,
    /// Folder or file of an adapter.
    pub adapter: Option<PathBuf>,
}

/// The files of the model called `name`. Without a name, those of the model that `adapter` was trained on. Without an
/// adapter, those of the small one that comes with the project.
pub fn find(
    name: Option<&Path>,
    adapter: Option<&Path>,
    console: Console,
) -> anyhow::Result<Source> {
    let adapter = adapter.map(hub::folder).transpose()?;
    let weights = match (name, &adapter) {
        (None, Some(adapter)) => base_of(adapter, console)?,
        _ => folder(name)?,
    };
    Ok(Source { weights, adapter })
}

/// The file or folder of the model called `name`, by default of the small one that comes with the project.
pub fn folder(name: Option<&Path>) -> Result<PathBuf> {
    name.map_or_else(|| Ok(shipped_model()), hub::folder)
}

/// The small model that comes with the project.
pub fn shipped_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets").join("tiny-sam")
}

/// The model that an adapter names.
fn base_of(adapter: &Path, console: Console) -> anyhow::Result<PathBuf> {
    let shown = adapter.display();
    let nameless = || format!("{shown}: does not name its base model; name it with --model");
    if is_foreign(adapter) {
        return Err(match Kind::of_file(adapter) {
            Kind::Foreign(what) => Error::file(adapter, what).into(),
            _ => anyhow!(nameless()),
        });
    }
    adapter_keys(adapter)?; // tells where no adapter is there
    let config = match adapter.is_dir() {
        true => adapter.join(CONFIG_FILE),
        false => adapter.with_file_name(CONFIG_FILE),
    };
    let config = LoraConfig::load(&config)?;
    let named = config.base_model_name_or_path.filter(|name| !name.trim().is_empty());
    let named = named.with_context(nameless)?;
    let found = hub::folder(&named).map_err(|e| {
        anyhow!(
            "{shown}: was trained on {named:?}, which is not to be had here ({e}); name the model with --model"
        )
    })?;
    console.note(format!("{shown}: base model {named:?}"));
    Ok(found)
}

/// Whether this is one file without a configuration, as SAMed and micro-sam save LoRA.
fn is_foreign(adapter: &Path) -> bool {
    adapter.is_file() && !adapter.with_file_name(CONFIG_FILE).exists()
}

/// A model that points and boxes prompt.
pub enum Prompted {
    /// Segment Anything.
    Sam(Box<SamModel>),
    /// SAM-HQ.
    Hq(Box<SamHqModel>),
}

impl Prompted {
    /// The SAM, or that inside.
    pub fn sam(&self) -> &SamModel {
        match self {
            Self::Sam(sam) => sam,
            Self::Hq(hq) => &hq.sam,
        }
    }

    /// All tensors.
    pub fn tree(&self) -> &dyn ModuleTree {
        match self {
            Self::Sam(sam) => sam.as_ref(),
            Self::Hq(hq) => hq.as_ref(),
        }
    }

    /// The predictor of the model.
    pub fn predictor(&self, processor: SamProcessor) -> SamPredictor<'_> {
        match self {
            Self::Sam(sam) => SamPredictor::with_processor(sam, processor),
            Self::Hq(hq) => SamPredictor::of_hq(hq, processor),
        }
    }
}

/// The model in a file of weights or in a folder with one. Says what was found there.
pub fn load(
    path: &Path,
    kind: AttentionKind,
    place: &Placement,
    console: Console,
) -> Result<SamModel> {
    let sizes = checkpoint::sizes(path)?;
    let vb = VarBuilder::zeros(place.dtype, &place.device);
    let mut model = SamModel::new(&sizes.config, kind, vb)?;
    let loaded = checkpoint::load(&mut model, path)?;
    console.note(format!("model: {loaded}; {sizes}"));
    place.quantize(&mut model.vision_encoder, console)?;
    Ok(model)
}

/// The image processor beside a model's weights. Where there is none, that is said.
pub fn processor(path: &Path, config: &SamConfig, console: Console) -> Result<SamProcessor> {
    let size = config.vision_config.image_size;
    let missing = |folder: &Path| {
        console.note(format!(
            "{}: neither processor_config.json nor preprocessor_config.json is there; images are processed as SAM's \
             are",
            folder.display()
        ));
    };
    let folder = if path.is_file() { path.parent().unwrap_or(path) } else { path };
    // Beside a single file it counts if the configuration there is this model's.
    let is_own = || SamConfig::load(folder.join("config.json")).is_ok_and(|own| own == *config);
    if path.is_file() && !is_own() {
        missing(folder);
        return Ok(SamProcessor::new(size));
    }
    let processor = SamProcessor::load(folder, size)?;
    if SamProcessor::config_file(folder)?.is_none() {
        missing(folder);
    }
    Ok(processor)
}

impl Source {
    /// The model, frozen, with its adapter.
    pub fn load(&self, place: &Placement, console: Console) -> Result<SamModel> {
        let mut model = load(&self.weights, self.kind()?, place, console)?;
        self.adapt(&mut model, console)?;
        Ok(model)
    }

    /// The model, frozen, with its adapter: a SAM or a SAM-HQ. Says which it is.
    pub fn load_prompted(&self, place: &Placement, console: Console) -> Result<Prompted> {
        // `load` tells why a file cannot be read.
        if !checkpoint::is_sam_hq(&self.weights).unwrap_or(false) {
            return Ok(Prompted::Sam(Box::new(self.load(place, console)?)));
        }
        let sizes = checkpoint::sizes(&self.weights)?;
        let vb = VarBuilder::zeros(place.dtype, &place.device);
        let mut model = SamHqModel::new(&sizes.config, self.kind()?, vb)?;
        let loaded = checkpoint::load(&mut model, &self.weights)?;
        console.note(format!("model: SAM-HQ, {loaded}; {sizes}"));
        place.quantize(&mut model.sam.vision_encoder, console)?;
        self.adapt(&mut model, console)?;
        Ok(Prompted::Hq(Box::new(model)))
    }

    /// The image processor of the model.
    pub fn processor(&self, config: &SamConfig, console: Console) -> Result<SamProcessor> {
        processor(&self.weights, config, console)
    }

    /// The attention whose names the adapter means.
    pub fn kind(&self) -> Result<AttentionKind> {
        let Some(adapter) = &self.adapter else { return Ok(AttentionKind::Fused) };
        // SAMed's and micro-sam's are on q, k and v apart, whatever their names.
        let fused = !is_foreign(adapter)
            && adapter_keys(adapter)?
                .iter()
                .any(|name| name.contains(".attn.qkv.") || name.starts_with("attn.qkv."));
        Ok(if fused { AttentionKind::Fused } else { AttentionKind::Split })
    }

    /// Puts the adapter into a model, if there is one, and freezes the model. Says what was found.
    pub fn adapt(
        &self,
        model: &mut dyn ModuleTree,
        console: Console,
    ) -> Result<Option<LoraConfig>> {
        let Some(adapter) = &self.adapter else { return Ok(None) };
        let config = if is_foreign(adapter) {
            let (config, tensors) = read_samed_adapter(model, adapter, None)?;
            load_adapter_tensors(model, DEFAULT_ADAPTER, &config, tensors)?;
            let path = adapter.display();
            let rank = config.rank;
            console.note(format!("adapter: {path}: LoRA of SAMed or micro-sam, of rank {rank}"));
            config
        } else {
            let loaded = load_adapter_as(model, DEFAULT_ADAPTER, adapter, &checkpoint::SAM)?;
            console.note(format!("adapter: {loaded}"));
            loaded.config
        };
        set_trainable(model, |_| false)?;
        Ok(Some(config))
    }
}
