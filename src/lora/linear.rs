//! One linear layer with LoRA, for models of candle_nn's layers that are no [`ModuleTree`].

use super::inject::Plan;
use super::state::PREFIX;
use super::target::Matcher;
use super::{BiasTraining, LoraConfig};
use crate::nn::{join, set_values, Linear, Mode, ModuleTree, Node, NodeMut, DEFAULT_ADAPTER};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

/// A linear layer with LoRA, in the place of a `candle_nn::Linear`: its `forward` is `candle_nn::Module`'s.
///
/// A model of candle_nn's layers stays as it is, but for the layers that may be adapted. Adapters live in a
/// `VarBuilder` of their own, under PEFT's names, so one constructor serves training and loading:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder, VarMap};
/// use candle_sam_lora::lora::{read_adapter, write_adapter, LoraConfig, LoraLinear};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let weights = VarBuilder::zeros(DType::F32, &Device::Cpu); // your checkpoint
/// let config = LoraConfig::new(4).alpha(8.0).target_modules(["q", "v"]);
///
/// // Training: the map makes the adapter's variables. Without `pp("base_model.model")` a map lacks PEFT's prefix.
/// let map = VarMap::new();
/// let lora = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu).pp("base_model.model");
/// let q = candle_nn::linear(8, 8, weights.pp("attn.q"))?;
/// let q = LoraLinear::new(q, &config, lora.pp("attn.q"))?;
/// let x = Tensor::ones((1, 8), DType::F32, &Device::Cpu)?;
/// assert_eq!(q.forward(&x)?.dims(), [1, 8]);
/// assert_eq!(map.all_vars().len(), 2); // A and B, for any optimizer
///
/// // Saving: the map holds PEFT's keys already.
/// let folder = std::env::temp_dir().join("lora-linear");
/// let tensors = map.data().lock().unwrap().iter().map(|(key, var)| (key.clone(), var.as_tensor().clone())).collect();
/// write_adapter(&config, &tensors, &folder)?;
///
/// // Loading: the same constructor, over the file's tensors.
/// let (config, tensors) = read_adapter(&folder)?;
/// let lora = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu).pp("base_model.model");
/// let q = LoraLinear::new(candle_nn::linear(8, 8, weights.pp("attn.q"))?, &config, lora.pp("attn.q"))?;
/// assert!(q.is_adapted());
/// # Ok(())
/// # }
/// ```
#[doc(alias = "from_peft")]
#[doc(alias = "from_var_builder")]
#[derive(Clone, Debug)]
pub struct LoraLinear {
    /// The layer; `layer.forward(&x, Mode::Train { seed })` applies the configuration's dropout.
    pub layer: Linear,
}

impl LoraLinear {
    /// `base`, frozen, with the adapter that `adapter` holds for its path. `adapter`'s prefix is that path, with or
    /// without PEFT's `base_model.model` before it. A layer that `config` does not target stays without an adapter.
    ///
    /// A `VarMap` behind `adapter` makes the tensors it lacks, with PEFT's initial values; the same path gives the same
    /// values. Other builders must hold `lora_A.weight`, `lora_B.weight`, and what else the configuration asks for.
    /// Modules that `config` saves whole are the caller's: take them from the same builder.
    ///
    /// # Errors
    /// - the configuration is invalid, or `adapter` has no prefix;
    /// - `bias` is not `none`, or the initialisation changes the base: these concern the whole model
    ///   ([`inject`](super::inject));
    /// - a tensor is missing or has another shape.
    pub fn new(
        base: candle_nn::Linear,
        config: &LoraConfig,
        adapter: VarBuilder<'_>,
    ) -> candle_core::Result<Self> {
        let prefix = adapter.prefix();
        let path = prefix.strip_prefix(PREFIX).unwrap_or(&prefix);
        check(config, path)?;
        let mut base = Linear::from(base);
        base.weight = base.weight.detach();
        base.bias = base.bias.map(|bias| bias.detach());
        if !Matcher::new(config)?.is_target(path, true)? {
            return Ok(Self { layer: base });
        }
        let mut at = At { path, layer: base };
        let plan = Plan::new(&at, DEFAULT_ADAPTER, config)?;
        let values = plan.initial_values(0)?;
        plan.apply(&mut at, values)?;
        let mut layer = at.layer;
        if let Some(own) = layer.adapters.get_mut(DEFAULT_ADAPTER) {
            let adapter = adapter.to_dtype(DType::F32);
            for (leaf, tensor) in own.tensors_mut() {
                let is_new = !adapter.contains_tensor(leaf);
                let mut held = adapter.get(tensor.shape(), leaf)?;
                if is_new {
                    set_values(leaf, &mut held, tensor)?;
                }
                *tensor = held;
            }
        }
        Ok(Self { layer })
    }

    /// Whether the layer carries an adapter.
    pub fn is_adapted(&self) -> bool {
        !self.layer.adapters.is_empty()
    }

    /// `[out, in]`, without the adapter.
    pub fn weight(&self) -> &Tensor {
        &self.layer.weight
    }

    /// `[out]`
    pub fn bias(&self) -> Option<&Tensor> {
        self.layer.bias.as_ref()
    }
}

/// Without an adapter; shares the tensors, and variables stay variables.
impl From<candle_nn::Linear> for LoraLinear {
    fn from(linear: candle_nn::Linear) -> Self {
        Self { layer: linear.into() }
    }
}

/// `[.., in] -> [.., out]` in evaluation: without dropout.
impl candle_nn::Module for LoraLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.layer.forward(x, Mode::Eval)
    }
}

impl ModuleTree for LoraLinear {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        self.layer.visit(path, f)
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        self.layer.visit_mut(path, f)
    }
}

/// Refuses what one layer cannot do.
fn check(config: &LoraConfig, path: &str) -> Result<()> {
    config.validate()?;
    let problem = if path.is_empty() {
        "the adapter's VarBuilder must have the layer's path as prefix, as in lora.pp(\"blocks.0.attn.q\")"
    } else if config.bias != BiasTraining::None {
        "bias trains the base's biases, which a layer alone cannot: use lora::inject on the whole model"
    } else if config.init_lora_weights.changes_base() {
        "init_lora_weights changes the base's weights: use lora::inject on the whole model"
    } else {
        return Ok(());
    };
    Err(Error::config(format!("LoraLinear at {path:?}: {problem}")))
}

/// A layer at its path in a model that this crate does not see.
struct At<'a> {
    path: &'a str,
    layer: Linear,
}

impl ModuleTree for At<'_> {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        self.layer.visit(&join(path, self.path), f)
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        self.layer.visit_mut(&join(path, self.path), f)
    }
}
