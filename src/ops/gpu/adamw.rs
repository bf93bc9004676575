//! A step of AdamW over all parameters by its kernels.

use crate::driver::{InPlace, Job};
use crate::launch::adamw::{plan, table, Parameter, OUTCOME, ROW_BYTES};
use crate::launch::device_ptr;
use crate::ops::custom::has_kernels;
use crate::problem::{AdamWRates, AdamWStep};
use candle_core::{bail, DType, Result, Shape, Tensor, Var};

/// A step whose kernels are launched.
pub struct Launched {
    outcome: Tensor,
    parameters: Vec<Parameter>,
    /// The table's addresses.
    addresses: Vec<[device_ptr; 4]>,
}

impl Launched {
    /// The same step, whose outcome is copied to a variable.
    pub fn with_outcome(self, outcome: &Var) -> Result<Self> {
        outcome.set(&self.outcome)?;
        Ok(Self { outcome: outcome.as_detached_tensor(), ..self })
    }

    /// Waits for the step.
    pub fn read(&self) -> Result<Outcome> {
        let outcome = self.outcome.to_vec1::<f32>()?;
        let [grad_norm, wrong, loss, _] = outcome[..] else { bail!("adamw: no outcome") };
        let not_finite = (wrong as usize).checked_sub(1);
        Ok(Outcome { grad_norm: grad_norm.into(), not_finite, loss })
    }

    /// The table of another step of the same tensors. Each parameter has its own numbers.
    pub fn table(
        &self,
        rates: impl Iterator<Item = AdamWRates>,
        step: &AdamWStep,
    ) -> Result<Vec<u8>> {
        let parameters = self.parameters.iter().zip(rates);
        let parameters = parameters.map(|(parameter, rates)| Parameter { rates, ..*parameter });
        table(&parameters.collect::<Vec<_>>(), &self.addresses, step)
    }
}

/// Read back after a step.
pub struct Outcome {
    /// The norm of all gradients together, before clipping. Nothing was changed if its square is infinite in f32.
    pub grad_norm: f64,
    /// The place of the first parameter whose gradient is not finite; nothing was changed then.
    pub not_finite: Option<usize>,
    /// The loss, 0 if there is none. Nothing was changed if it is not finite.
    pub loss: f32,
}

/// Whether the kernels take these parameters: tensors of one GPU.
pub fn takes<'a>(parameters: impl Iterator<Item = &'a Var> + Clone) -> bool {
    let Some(first) = parameters.clone().next() else { return false };
    has_kernels(first.device())
        && parameters.clone().any(|var| var.elem_count() > 0)
        && parameters.into_iter().all(|var| {
            matches!(var.dtype(), DType::F32 | DType::F16 | DType::BF16)
                && var.device().same_device(first.device())
        })
}

/// Bytes of the table of so many parameters.
pub fn table_bytes(parameters: usize) -> usize {
    parameters * ROW_BYTES
}

/// Launches a step with the parameters' gradients in f32. Each row is a parameter and its moments, and the parameter's
/// own numbers.
pub fn launch(
    rows: &[([&Tensor; 3], AdamWRates)],
    gradients: &[Tensor],
    loss: Option<&Tensor>,
    step: &AdamWStep,
) -> Result<Launched> {
    if let Some((([parameter, ..], _), gradient)) = rows
        .iter()
        .zip(gradients)
        .find(|(([parameter, ..], _), gradient)| parameter.shape() != gradient.shape())
    {
        bail!("adamw: a gradient {:?} of a parameter {:?}", gradient.dims(), parameter.dims())
    }
    if let Some(loss) = loss.filter(|loss| loss.dtype() != DType::F32 || loss.elem_count() != 1) {
        bail!("adamw: the loss must be one f32, got {:?} {:?}", loss.dims(), loss.dtype())
    }
    let parameters = rows.iter().map(|&([parameter, ..], rates)| Parameter {
        size: parameter.elem_count(),
        dtype: parameter.dtype(),
        rates,
    });
    let parameters: Vec<_> = parameters.collect();
    let changed: Vec<_> = rows.iter().flat_map(|(tensors, _)| *tensors).collect();
    let plan = plan(&parameters, loss.is_some(), step)?;
    let read: Vec<_> = loss.into_iter().chain(gradients).collect();
    let tensors = InPlace { changed: &changed, read: &read };
    let job = Job { op: "adamw", plan: &plan, dropouts: &[] };
    let mut addresses = vec![];
    let outcome = job.run_in_place(
        &tensors,
        |changed, read| {
            let (gradients, rows) = (&read[read.len() - rows.len()..], changed.as_chunks::<3>().0);
            let rows = rows.iter().zip(gradients).map(|(&[p, m, v], &g)| [p, g, m, v]);
            addresses = rows.collect();
            table(&parameters, &addresses, step)
        },
        (DType::F32, &Shape::from(OUTCOME)),
    )?;
    Ok(Launched { outcome, parameters, addresses })
}
