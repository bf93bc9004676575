//! AdamW as `torch.optim.AdamW` computes it, over named variables.
//!
//! ```text
//! p   <- p (1 - lr weight_decay)
//! m   <- beta1 m + (1 - beta1) g             v <- beta2 v + (1 - beta2) g^2
//! p   <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//! ```
//! The moments m and v (`exp_avg`, `exp_avg_sq`) are f32 whatever the parameter's dtype, and so is the update. A
//! parameter in f64 keeps its digits. On a GPU three kernels check, measure, clip and update all parameters at once,
//! and the host waits once.
//!
//! A trainable parameter without a gradient is an error, not a parameter left alone. Wherever an operation has no
//! gradient, candle drops it silently. A run that trains half of its parameters looks like one that trains them all. A
//! parameter that the loss does not depend on is to be frozen ([`set_trainable`](crate::nn::set_trainable)).
//!
//! Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019; `torch/optim/adam.py`.

#[cfg(feature = "cuda")]
mod by_kernels;

use super::gradients::first_not_finite;
use super::groups::Factors;
use super::{AdamWConfig, Gradients, ParameterGroups};
use crate::ops::{optimizer, Collector};
use crate::problem::{AdamWRates, AdamWStep};
use crate::{Error, Result, TensorMismatch};
use candle_core::{backprop::GradStore, bail, DType, Tensor, Var};
use candle_nn::Optimizer;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// A parameter and its moments.
#[derive(Debug)]
struct Slot {
    name: String,
    var: Var,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    /// Factors of the learning rate and the weight decay.
    factors: Factors,
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
    /// Whether kernels of a GPU make the steps.
    #[cfg(feature = "cuda")]
    by_kernels: bool,
}

/// Measures of a step, from before it.
///
/// [Example](crate::train::AdamW)
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepMeasures {
    /// The norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// The loss; 0 if none was given.
    pub loss: f32,
}

impl AdamW {
    /// An optimizer of `parameters`: [`trainable_variables`](crate::nn::trainable_variables) of a model with their
    /// names, or variables alone, as `VarMap::all_vars` gives them.
    ///
    /// # Errors
    /// - there are no parameters;
    /// - two parameters share a name, or are one variable, which a step would change twice;
    /// - a parameter is not a float tensor;
    /// - the configuration is invalid.
    pub fn new<P: Into<Parameter>>(parameters: Vec<P>, config: AdamWConfig) -> Result<Self> {
        config.validate()?;
        if parameters.is_empty() {
            return Err(Error::config("adamw: the model has no trainable parameter"));
        }
        let (mut names, mut variables) = (BTreeSet::new(), HashMap::new());
        let mut slots = Vec::with_capacity(parameters.len());
        for (position, parameter) in parameters.into_iter().enumerate() {
            let Parameter { name, var } = parameter.into();
            let name = name.unwrap_or_else(|| position.to_string());
            if !names.insert(name.clone()) {
                return Err(Error::config(format!("adamw: two parameters are named {name}")));
            }
            if let Some(other) = variables.insert(var.id(), name.clone()) {
                let message = format!("adamw: {other} and {name} are one variable; name it once");
                return Err(Error::config(message));
            }
            if !matches!(var.dtype(), DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
                return Err(Error::config(format!(
                    "adamw: {name} must be a float, is {:?}",
                    var.dtype()
                )));
            }
            let zeros = || Tensor::zeros(var.dims(), DType::F32, var.device());
            let (exp_avg, exp_avg_sq) = (zeros()?, zeros()?);
            slots.push(Slot { name, var, exp_avg, exp_avg_sq, factors: Factors::default() });
        }
        Ok(Self {
            config,
            steps: 0,
            #[cfg(feature = "cuda")]
            by_kernels: crate::ops::adamw::takes(slots.iter().map(|slot| &slot.var)),
            slots,
        })
    }

    /// Gives parameters the learning rates and weight decays of their groups.
    ///
    /// # Errors
    /// - as [`ParameterGroups::validate`].
    pub fn set_groups(&mut self, groups: &ParameterGroups) -> Result<()> {
        groups.validate(self.slots.iter().map(|slot| slot.name.as_str()))?;
        for slot in &mut self.slots {
            slot.factors = groups.factors(&slot.name, &slot.var);
        }
        Ok(())
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
    /// When parameters have none.
    pub fn gradients(&self, grads: &GradStore) -> candle_core::Result<Gradients> {
        Gradients::of(self.parameters(), |var| Ok(grads.get(var).cloned()))
            .map_err(|error| self.failed(error))
    }

    /// The value of a loss, and the gradients of its backward, in the parameters' order. On a GPU its operations hand
    /// over most of them past candle's store, with fewer launches than [`gradients`](Self::gradients) takes.
    ///
    /// # Errors
    /// - `loss` fails;
    /// - parameters have no gradient.
    pub fn backward(
        &self,
        loss: impl FnOnce() -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<(Tensor, Gradients)> {
        let collector = self.collector();
        let loss = collector.during(loss)?;
        let store = loss.backward()?;
        let gradients = Gradients::of(self.parameters(), |v| collector.total(v, store.get(v)));
        Ok((loss.detach(), gradients.map_err(|error| self.failed(error))?))
    }

    /// For the gradients of one backward.
    pub(super) fn collector(&self) -> Arc<Collector> {
        Collector::of(self.parameters().map(|(_, var)| var.as_tensor()))
    }

    fn failed(&self, error: candle_core::Error) -> candle_core::Error {
        candle_core::Error::msg(format!("adamw: step {}: {error}", self.steps + 1))
    }

    /// Fails where the norm's square is infinite in f32, as the second moments of such gradients are: their parameters
    /// would stand still from then on.
    fn check_norm(&self, norm: f64) -> candle_core::Result<()> {
        match norm * norm <= f64::from(f32::MAX) {
            true => Ok(()),
            false => Err(self.failed(candle_core::Error::msg(format!(
                "the norm of the gradients is {norm:e}, and its square is infinite in f32; try a lower learning rate"
            )))),
        }
    }

    /// The error on the gradient of the parameter in this place.
    fn not_finite(&self, place: usize) -> candle_core::Error {
        let name = self.slots.get(place).map_or("?", |slot| &slot.name);
        self.failed(candle_core::Error::msg(format!("the gradient of {name} is not finite")))
    }

    /// Fails unless all gradients are finite, as a step does.
    pub(super) fn check(&self, gradients: &Gradients) -> candle_core::Result<()> {
        gradients.first_not_finite()?.map_or(Ok(()), |place| Err(self.not_finite(place)))
    }

    /// Fails unless all parameters are finite, as after a step with too high a rate.
    pub(super) fn check_parameters(&self) -> candle_core::Result<()> {
        let tensors = self.parameters().map(|(_, var)| var.as_tensor());
        let Some(place) = first_not_finite(tensors)? else { return Ok(()) };
        let name = self.slots.get(place).map_or("?", |slot| &slot.name);
        bail!("train: step {}: {name} is no longer finite; try a lower learning rate", self.steps)
    }

    /// Names and variables, in their order.
    pub(super) fn parameters(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.slots.iter().map(|slot| (slot.name.as_str(), &slot.var))
    }

    /// Makes one step with gradients of [`gradients`](Self::gradients), shortened to `max_norm` if they are longer.
    ///
    /// On a GPU the step is launched before the host sees the gradients and `loss`, a scalar in f32.
    ///
    /// # Errors
    /// - the loss, a gradient or the square of the norm is not finite in f32; nothing was changed then;
    /// - a gradient does not fit its parameter;
    /// - the learning rate was set to a negative number, or to one that is not finite.
    pub fn apply(
        &mut self,
        gradients: &Gradients,
        loss: Option<&Tensor>,
        max_norm: Option<f64>,
    ) -> candle_core::Result<StepMeasures> {
        self.config.validate()?;
        let (step, found) = (self.steps + 1, gradients.tensors().len());
        if found != self.slots.len() {
            bail!("adamw: step {step}: {found} gradients for {} parameters", self.slots.len())
        }
        let numbers = self.config.at(step, max_norm);
        #[cfg(feature = "cuda")]
        let measures = match self.by_kernels {
            true => self.apply_by_kernels(gradients, loss, &numbers)?,
            false => self.apply_alone(gradients, loss, &numbers)?,
        };
        #[cfg(not(feature = "cuda"))]
        let measures = self.apply_alone(gradients, loss, &numbers)?;
        self.steps = step;
        Ok(measures)
    }

    /// One parameter after the other, by candle's operations.
    fn apply_alone(
        &mut self,
        gradients: &Gradients,
        loss: Option<&Tensor>,
        step: &AdamWStep,
    ) -> candle_core::Result<StepMeasures> {
        let loss = loss.map_or(Ok(0.0), Tensor::to_scalar::<f32>)?;
        check_loss(loss, self.steps)?;
        let grad_norm = gradients.norm()?;
        if !grad_norm.is_finite() {
            self.check(gradients)?; // or only the squares are infinite
        }
        self.check_norm(grad_norm)?;
        let clipped = step.max_norm.map(|most| gradients.clone().clipped(grad_norm, most));
        let clipped = clipped.transpose()?;
        let gradients = clipped.as_ref().unwrap_or(gradients).tensors();
        for (slot, gradient) in self.slots.iter_mut().zip(gradients) {
            let rates = self.config.rates(self.steps + 1, slot.factors);
            slot.update(gradient, step, rates)?;
        }
        Ok(StepMeasures { grad_norm, loss })
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
                tensor.to_device(slot.var.device())?.force_contiguous()
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
    /// - a parameter has no gradient; nothing was changed then;
    /// - as [`apply`](AdamW::apply).
    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        let gradients = self.gradients(grads)?;
        self.apply(&gradients, None, None).map(|_| ())
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
        step: &AdamWStep,
        rates: AdamWRates,
    ) -> candle_core::Result<()> {
        let p = self.var.as_detached_tensor();
        let in_f64 = p.dtype() == DType::F64;
        let p = if in_f64 { p } else { p.to_dtype(DType::F32)? };
        if p.device().is_cpu() && !in_f64 {
            let tensors = [&p, &self.exp_avg, &self.exp_avg_sq];
            let [p, m, v] = optimizer::adamw(tensors, gradient, step, rates)?;
            (self.exp_avg, self.exp_avg_sq) = (m, v);
            return self.var.set(&p.to_dtype(self.var.dtype())?);
        }
        let p = (p * rates.decay)?;
        self.exp_avg = (&self.exp_avg + ((gradient - &self.exp_avg)? * step.beta1_rest)?)?;
        self.exp_avg_sq =
            ((&self.exp_avg_sq * step.beta2)? + (gradient.sqr()? * step.beta2_rest)?)?;
        let denominator = ((self.exp_avg_sq.sqrt()? * step.root_correction)? + step.eps)?;
        let update = ((&self.exp_avg / denominator)? * rates.rate)?.to_dtype(p.dtype())?;
        self.var.set(&(p - update)?.to_dtype(self.var.dtype())?)
    }
}

/// Fails unless the loss of the step after `steps` is finite.
pub(super) fn check_loss(loss: f32, steps: u64) -> candle_core::Result<()> {
    if !loss.is_finite() {
        bail!("train: step {}: the loss is {loss}; try a lower learning rate", steps + 1)
    }
    Ok(())
}
