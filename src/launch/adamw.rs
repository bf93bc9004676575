//! AdamW over all parameters of an optimizer: `kernels/adamw/adamw.cuh`.

use super::bindings::{
    device_ptr, AdamWParams, AdamWTensor, ADAMW_BF16, ADAMW_CHUNK, ADAMW_F16, ADAMW_F32,
    ADAMW_OUTCOME_SHARED_BYTES, ADAMW_SHARED_BYTES, ADAMW_THREADS,
};
use super::plan::Plan;
use super::slots::{input, output, present, WORKSPACE};
use super::{narrow, AdamWRates, AdamWStep, Launch};
use candle_core::{bail, DType, Result};

const OP: &str = "adamw";

/// Elements of the outcome, as `AdamWParams` in `kernels/abi.h` has them: norm, place of a gradient that is not finite,
/// loss, factor of the gradients.
pub const OUTCOME: usize = 4;

/// Bytes of a row of the table.
pub const ROW_BYTES: usize = size_of::<AdamWTensor>();

/// A parameter of a step.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    /// Elements.
    pub size: usize,
    /// f32, f16 or bf16.
    pub dtype: DType,
    /// Its own numbers.
    pub rates: AdamWRates,
}

/// The launches of a step: sums of squares, their norm, the update. Inputs: the [`table`], and the loss in f32, if
/// there is one; output: the outcome, [`OUTCOME`] f32.
///
/// # Errors
/// - there is no element;
/// - there are 2^32 parameters or chunks.
pub fn plan(parameters: &[Parameter], has_loss: bool, step: &AdamWStep) -> Result<Plan> {
    let chunks = parameters.iter().map(|parameter| chunks(parameter.size)).sum::<usize>();
    let params = AdamWParams {
        tensors: input(0),
        partials: WORKSPACE,
        loss: present(has_loss, input(1)),
        outcome: output(0),
        tensor_count: narrow(OP, "the number of parameters", parameters.len())?,
        chunks: narrow(OP, "the number of chunks", chunks)?,
        max_norm: step.max_norm.map_or(f32::INFINITY, |norm| norm as f32),
        beta1_rest: step.beta1_rest as f32,
        beta2: step.beta2 as f32,
        beta2_rest: step.beta2_rest as f32,
    };
    let launch = |family, blocks: usize, shared_bytes| -> Result<Launch> {
        let grid = [blocks as u64, 1, 1];
        let launch = Launch::new(family, DType::F32, grid, ADAMW_THREADS, &params)?;
        Ok(Launch { shared_bytes, ..launch })
    };
    let steps = vec![
        launch("adamw_partials", chunks, ADAMW_SHARED_BYTES)?,
        launch("adamw_outcome", 1, ADAMW_OUTCOME_SHARED_BYTES)?,
        launch("adamw_update", chunks, ADAMW_SHARED_BYTES)?,
    ];
    Ok(Plan { steps, workspace_bytes: size_of::<f32>() * chunks, saved: 0 })
}

/// The table of the tensors: a parameter's row has the addresses of it, its gradient, `exp_avg` and `exp_avg_sq`.
/// Beside these are the numbers that differ from step to step.
///
/// # Errors
/// - a dtype is not f32, f16 or bf16.
pub fn table(
    parameters: &[Parameter],
    addresses: &[[device_ptr; 4]],
    step: &AdamWStep,
) -> Result<Vec<u8>> {
    let mut first_chunk = 0;
    let mut rows = Vec::with_capacity(parameters.len() * ROW_BYTES);
    for (own, addresses) in parameters.iter().zip(addresses) {
        let Parameter { size, dtype, rates } = *own;
        let [parameter, gradient, exp_avg, exp_avg_sq] = *addresses;
        let dtype = match dtype {
            DType::F32 => ADAMW_F32,
            DType::F16 => ADAMW_F16,
            DType::BF16 => ADAMW_BF16,
            _ => bail!("{OP}: parameters must be f32, f16 or bf16, got {dtype:?}"),
        };
        let row = AdamWTensor {
            parameter,
            gradient,
            exp_avg,
            exp_avg_sq,
            size: size as u64,
            first_chunk,
            dtype,
            decay: rates.decay as f32,
            rate: rates.rate as f32,
            root_correction: step.root_correction as f32,
            eps: step.eps as f32,
        };
        first_chunk += chunks(size) as u32;
        rows.extend(bytemuck::bytes_of(&row));
    }
    Ok(rows)
}

fn chunks(size: usize) -> usize {
    size.div_ceil(ADAMW_CHUNK as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: AdamWStep = AdamWStep {
        beta1_rest: 0.1,
        beta2: 0.999,
        beta2_rest: 0.001,
        root_correction: 30.0,
        eps: 1e-8,
        max_norm: None,
    };

    fn parameter((size, dtype): (usize, DType)) -> Parameter {
        Parameter { size, dtype, rates: AdamWRates { decay: 0.99, rate: 1e-3 } }
    }

    #[test]
    fn every_chunk_has_a_block() -> Result<()> {
        let chunk = ADAMW_CHUNK as usize;
        let parameters =
            [(1, DType::F32), (0, DType::F32), (2 * chunk + 1, DType::BF16)].map(parameter);
        let plan = plan(&parameters, true, &STEP)?;
        let blocks: Vec<_> = plan.steps.iter().map(|step| step.grid[0]).collect();
        assert_eq!((blocks, plan.workspace_bytes), (vec![4, 1, 4], 16));
        let bytes = table(&parameters, &[[16; 4]; 3], &STEP)?;
        let rows: Vec<AdamWTensor> = bytes
            .chunks_exact(size_of::<AdamWTensor>())
            .map(bytemuck::pod_read_unaligned)
            .collect();
        let first: Vec<_> = rows.iter().map(|row| (row.first_chunk, row.dtype)).collect();
        assert_eq!(first, [(0, ADAMW_F32), (1, ADAMW_F32), (1, ADAMW_BF16)]);
        Ok(())
    }

    #[test]
    fn no_element_and_other_dtypes_are_refused() {
        assert!(plan(&[parameter((0, DType::F32))], false, &STEP).is_err());
        let refused = table(&[parameter((1, DType::F64))], &[[16; 4]], &STEP);
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("F64"), "{message}");
    }
}
