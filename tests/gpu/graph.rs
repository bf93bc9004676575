//! CUDA graphs: what an operation launches is captured and replayed. An operation that copied from the host, waited for
//! the GPU or used another stream could not be.

use crate::common::cases::{dropout, layer_norm, Attention, OnTensors, Op, DROPOUT};
use crate::common::{random, values};
use crate::trial;
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::{DType, Device, Error, Result, Tensor};
use candle_sam_lora::ops::{self, Activation, Lora, Projection};
use libtest_mimic::Trial;

/// An operation with kernels, and its inputs. Whatever the operation takes is among these: a tensor that the closure
/// brought to the device itself would be a copy from the host.
struct Captured {
    name: String,
    inputs: Vec<Tensor>,
    run: OnTensors<'static>,
}

impl From<Op<'static>> for Captured {
    fn from(op: Op<'static>) -> Self {
        Self { name: op.name, inputs: op.inputs, run: op.fused }
    }
}

/// Inputs: x, weight, bias, A, B, residual.
fn lora_linear() -> Captured {
    let (rows, in_dim, out_dim, rank) = (65, 96, 72, 16);
    let run = |t: &[Tensor]| {
        let lora = Lora { a: &t[3], b: &t[4], b_bias: None, scaling: 0.7, dropout: Some(DROPOUT) };
        let projection = Projection { weight: &t[1], bias: Some(&t[2]), lora: Some(lora) };
        ops::lora_linear(&t[0], &projection, Activation::Gelu, Some(&t[5]))
    };
    Captured {
        name: format!("lora_linear {rows} {in_dim} {out_dim} {rank}"),
        inputs: vec![
            random(1, (rows, in_dim)),
            random(2, (out_dim, in_dim)),
            random(3, out_dim),
            random(4, (rank, in_dim)),
            random(5, (out_dim, rank)),
            random(6, (rows, out_dim)),
        ],
        run: Box::new(run),
    }
}

/// The operations with kernels.
fn captured() -> Vec<Captured> {
    let attention = Attention {
        batch: 1,
        grid: (16, 20),
        heads: 2,
        dim: 64,
        window: Some(14),
        tables: (27, 27),
        dropout: None,
    };
    let ops = [layer_norm(&[2, 14, 14, 768]), dropout(&[3, 100, 77]), attention.op()];
    ops.map(Captured::from).into_iter().chain([lora_linear()]).collect()
}

pub fn trials() -> Vec<Trial> {
    let names: Vec<String> = captured().into_iter().map(|op| op.name).collect();
    let trials = names.into_iter().enumerate().map(|(index, name)| {
        trial(format!("graph {name}"), move |device| match captured().get(index) {
            Some(op) => replay(op, device),
            None => candle_core::bail!("there is no case {index}"),
        })
    });
    trials.collect()
}

fn replay(op: &Captured, device: &Device) -> Result<()> {
    let inputs: Vec<Tensor> = op
        .inputs
        .iter()
        .map(|t| t.to_dtype(DType::BF16)?.to_device(device))
        .collect::<Result<_>>()?;
    // The first run loads the kernels, which a capture may not.
    let expected = values(&(op.run)(&inputs)?);
    let cuda = device.as_cuda_device()?;
    let stream = cuda.cuda_stream();
    cuda.synchronize()?;
    stream
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .map_err(Error::wrap)?;
    let captured = (op.run)(&inputs);
    // The output's memory belongs to the graph: each launch allocates it anew, at the same address.
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).map_err(Error::wrap)?;
    let (out, Some(graph)) = (captured?, graph) else {
        candle_core::bail!("{}: nothing was captured", op.name)
    };
    for run in 0..3 {
        graph.launch().map_err(Error::wrap)?;
        assert!(values(&out) == expected, "{}: replay {run} gave other bits", op.name);
    }
    Ok(())
}
