//! AdamW as `torch.optim.AdamW` computes it, over named variables.
//!
//! ```text
//! p   <- p (1 - lr weight_decay)
//! m   <- beta1 m + (1 - beta1) g             v <- beta2 v + (1 - beta2) g^2
//! p   <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//! ```
//! The moments m and v (`exp_avg`, `exp_avg_sq`) are f32 whatever the parameter's dtype, and so is the update.
//!
//! A trainable parameter without a gradient is an error, not a parameter left alone. Wherever an operation has no
//! gradient, candle drops it silently. A run that trains half of its parameters looks like one that trains them all. A
//! parameter that the loss does not depend on is to be frozen ([`set_trainable`](crate::nn::set_trainable)).
//!
//! Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019; `torch/optim/adam.py`.

use super::Gradients;
use crate::{Error, Result, TensorMismatch};
use candle_core::{backprop::GradStore, bail, DType, Tensor, Var};
use candle_nn::Optimizer;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The hyperparameters, with PyTorch's defaults.
///
/// [Example](crate::train)
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-2 }
    }
}

impl AdamWConfig {
    fn validate(&self) -> Result<()> {
        let finite = |x: f64| x.is_finite() && x >= 0.0;
        let decay = |beta: f64| (0.0..1.0).contains(&beta);
        for (name, value, valid, expected) in [
            ("lr", self.lr, finite(self.lr), "finite and not negative"),
            ("beta1", self.beta1, decay(self.beta1), "in [0, 1)"),
            ("beta2", self.beta2, decay(self.beta2), "in [0, 1)"),
            ("eps", self.eps, finite(self.eps), "finite and not negative"),
            (
                "weight_decay",
                self.weight_decay,
                finite(self.weight_decay),
                "finite and not negative",
            ),
        ] {
            if !valid {
                return Err(Error::config(format!(
                    "adamw: {name} must be {expected}, got {value}"
                )));
            }
        }
        Ok(())
    }
}

/// A parameter and its moments.
#[derive(Debug)]
struct Slot {
    name: String,
    var: Var,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

/// A variable to optimize, and the name that its moments are saved under.
///
/// [Example](crate::train)
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Without a name, the variable's position stands for it.
    name: Option<String>,
    var: Var,
}

impl From<Var> for Parameter {
    fn from(var: Var) -> Self {
        Self { name: None, var }
    }
}

impl From<(String, Var)> for Parameter {
    fn from((name, var): (String, Var)) -> Self {
        Self { name: Some(name), var }
    }
}

/// The optimizer. It updates its variables in place, always in the order they were given.
///
/// It is a [`candle_nn::Optimizer`], so a candle program can take it in the place of candle's own.
///
/// [Example](crate::train)
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    steps: u64,
    slots: Vec<Slot>,
}

impl AdamW {
    /// An optimizer of `parameters`: [`trainable_variables`](crate::nn::trainable_variables) of a model with their
    /// names, or variables alone, as `VarMap::all_vars` gives them.
    ///
    /// # Errors
    /// - there are no parameters;
    /// - two parameters share a name;
    /// - a parameter is not a float tensor;
    /// - the configuration is invalid.
    pub fn new<P: Into<Parameter>>(parameters: Vec<P>, config: AdamWConfig) -> Result<Self> {
        config.validate()?;
        if parameters.is_empty() {
            return Err(Error::config("adamw: the model has no trainable parameter"));
        }
        let mut names = BTreeSet::new();
        let mut slots = Vec::with_capacity(parameters.len());
        for (position, parameter) in parameters.into_iter().enumerate() {
            let Parameter { name, var } = parameter.into();
            let name = name.unwrap_or_else(|| position.to_string());
            if !names.insert(name.clone()) {
                return Err(Error::config(format!("adamw: two parameters are named {name}")));
            }
            if !matches!(var.dtype(), DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
                return Err(Error::config(format!(
                    "adamw: {name} must be a float, is {:?}",
                    var.dtype()
                )));
            }
            let zeros = || Tensor::zeros(var.dims(), DType::F32, var.device());
            let (exp_avg, exp_avg_sq) = (zeros()?, zeros()?);
            slots.push(Slot { name, var, exp_avg, exp_avg_sq });
        }
        Ok(Self { config, steps: 0, slots })
    }

    /// How many steps were made.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The hyperparameters.
    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// The gradients of a backward pass for the parameters, in their order.
    ///
    /// # Errors
    /// When parameters have none, or one is not finite.
    pub fn gradients(&self, grads: &GradStore) -> candle_core::Result<Gradients> {
        Gradients::of(self.parameters(), grads).map_err(|error| {
            candle_core::Error::msg(format!("adamw: step {}: {error}", self.steps + 1))
        })
    }

    /// Names and variables, in their order.
    pub(super) fn parameters(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.slots.iter().map(|slot| (slot.name.as_str(), &slot.var))
    }

    /// Makes one step with gradients of [`gradients`](Self::gradients).
    ///
    /// # Errors
    /// - a gradient does not fit its parameter;
    /// - the learning rate was set to a negative number, or to one that is not finite.
    pub fn apply(&mut self, gradients: &Gradients) -> candle_core::Result<()> {
        self.config.validate()?;
        let step = self.steps + 1;
        if gradients.tensors().len() != self.slots.len() {
            bail!(
                "adamw: step {step}: {} gradients for {} parameters",
                gradients.tensors().len(),
                self.slots.len()
            )
        }
        for (slot, gradient) in self.slots.iter_mut().zip(gradients.tensors()) {
            slot.update(gradient, step, &self.config)?;
        }
        self.steps = step;
        Ok(())
    }

    /// Every parameter and its moments, copied: `parameter.<name>`, `exp_avg.<name>`, `exp_avg_sq.<name>`.
    pub fn state(&self) -> candle_core::Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for slot in &self.slots {
            for (kind, tensor) in slot.tensors() {
                state.insert(format!("{kind}.{}", slot.name), tensor.detach().copy()?);
            }
        }
        Ok(state)
    }

    /// Bytes of the tensors of [`state`](Self::state).
    pub(super) fn state_bytes(&self) -> u64 {
        let tensors = self.slots.iter().flat_map(Slot::tensors);
        tensors.map(|(_, t)| (t.elem_count() * t.dtype().size_in_bytes()) as u64).sum()
    }

    /// Puts back what [`state`](Self::state) gave after `steps` steps.
    ///
    /// # Errors
    /// When names or shapes differ from those of this optimizer; nothing was changed then.
    pub fn load_state(&mut self, steps: u64, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut mismatch =
            TensorMismatch { source: "the training state".into(), ..Default::default() };
        let mut known = BTreeSet::new();
        for slot in &self.slots {
            for (kind, tensor) in slot.tensors() {
                let name = format!("{kind}.{}", slot.name);
                match state.get(&name) {
                    None => mismatch.missing.push(name.clone()),
                    Some(found) if found.dims() != tensor.dims() => mismatch.misshaped.push((
                        name.clone(),
                        tensor.dims().to_vec(),
                        found.dims().to_vec(),
                    )),
                    Some(_) => {}
                }
                known.insert(name);
            }
        }
        mismatch.surplus = state.keys().filter(|name| !known.contains(*name)).cloned().collect();
        if !mismatch.is_empty() {
            return Err(Error::Mismatch(mismatch.into()));
        }
        for slot in &mut self.slots {
            let get = |kind: &str| -> candle_core::Result<Tensor> {
                let tensor = &state[&format!("{kind}.{}", slot.name)];
                tensor.to_device(slot.var.device())?.copy()
            };
            slot.var.set(&get("parameter")?.to_dtype(slot.var.dtype())?)?;
            slot.exp_avg = get("exp_avg")?.to_dtype(DType::F32)?;
            slot.exp_avg_sq = get("exp_avg_sq")?.to_dtype(DType::F32)?;
        }
        self.steps = steps;
        Ok(())
    }
}

impl Optimizer for AdamW {
    type Config = AdamWConfig;

    fn new(vars: Vec<Var>, config: AdamWConfig) -> candle_core::Result<Self> {
        Ok(Self::new(vars, config)?)
    }

    /// Makes one step with the gradients of a backward pass.
    ///
    /// # Errors
    /// - a parameter has no gradient, or one that is not finite; nothing was changed then;
    /// - as [`apply`](AdamW::apply).
    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        let gradients = self.gradients(grads)?;
        self.apply(&gradients)
    }

    fn learning_rate(&self) -> f64 {
        self.config.lr
    }

    /// Changes the learning rate of the steps to come. The next step checks it.
    fn set_learning_rate(&mut self, lr: f64) {
        self.config.lr = lr;
    }
}

impl Slot {
    fn tensors(&self) -> [(&'static str, &Tensor); 3] {
        [
            ("parameter", self.var.as_tensor()),
            ("exp_avg", &self.exp_avg),
            ("exp_avg_sq", &self.exp_avg_sq),
        ]
    }

    fn update(
        &mut self,
        gradient: &Tensor,
        step: u64,
        config: &AdamWConfig,
    ) -> candle_core::Result<()> {
        let AdamWConfig { lr, beta1, beta2, eps, weight_decay } = *config;
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        let p = self.var.as_detached_tensor().to_dtype(DType::F32)?;
        let p = (p * (1.0 - lr * weight_decay))?;
        self.exp_avg = (&self.exp_avg + ((gradient - &self.exp_avg)? * (1.0 - beta1))?)?;
        self.exp_avg_sq = ((&self.exp_avg_sq * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
        let denominator = ((self.exp_avg_sq.sqrt()? / correction(beta2).sqrt())? + eps)?;
        let update = ((&self.exp_avg / denominator)? * (lr / correction(beta1)))?;
        self.var.set(&(p - update)?.to_dtype(self.var.dtype())?)
    }
}
