//! CUDA graphs: what an operation and its backward launch is captured and replayed. An operation that copied from the
//! host, waited for the GPU or used another stream could not be captured. The few numbers
//! that candle's own operations copy, as strides, candle keeps from a first run if it is asked to.

use crate::common::cases::{dropout, layer_norm, Attention, MultiHead, OnTensors, Op, DROPOUT};
use crate::common::{gradients, random, values};
use crate::{trial, with_each};
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::cuda_backend::cudarc::driver::CudaGraph;
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
        let projection =
            Projection { weight: &t[1], scales: None, bias: Some(&t[2]), lora: Some(lora) };
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
    let tokens = MultiHead { batch: (2, 2), queries: 7, keys: 300, heads: 2, dim: 16 };
    let rows = [layer_norm(&[2, 14, 14, 768]), dropout(&[3, 100, 77])];
    let ops = rows.into_iter().chain([attention.op(), tokens.op()]);
    ops.map(Captured::from).chain([lora_linear()]).collect()
}

pub fn trials() -> Vec<Trial> {
    let names: Vec<String> = captured().into_iter().map(|op| op.name).collect();
    let mut trials = Vec::new();
    for (index, name) in names.into_iter().enumerate() {
        for (pass, backward) in [("forward", false), ("backward", true)] {
            trials.push(trial(format!("graph {pass} {name}"), move |device| {
                match captured().get(index) {
                    Some(op) => with_each(device, || replay(op, backward, device)),
                    None => candle_core::bail!("there is no case {index}"),
                }
            }));
        }
    }
    trials
}

/// The output, or output and gradients.
fn run(op: &Captured, inputs: &[Tensor], grad_out: Option<&Tensor>) -> Result<Vec<Tensor>> {
    let Some(grad_out) = grad_out else { return Ok(vec![(op.run)(inputs)?]) };
    let (out, gradients) = gradients(inputs, grad_out, &op.run)?;
    Ok(std::iter::once(out).chain(gradients).collect())
}

/// The result of `run`, and the graph of its launches.
pub fn capture<T>(
    device: &Device,
    run: impl FnOnce() -> Result<T>,
) -> Result<(T, Option<CudaGraph>)> {
    let stream = device.as_cuda_device()?.cuda_stream();
    stream
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .map_err(Error::wrap)?;
    let captured = run();
    // The outputs' memory belongs to the graph: each launch allocates it anew, at the same address.
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).map_err(Error::wrap)?;
    Ok((captured?, graph))
}

fn replay(op: &Captured, backward: bool, device: &Device) -> Result<()> {
    let on_device = |t: &Tensor| t.to_dtype(DType::BF16)?.to_device(device);
    let inputs = op.inputs.iter().map(on_device).collect::<Result<Vec<_>>>()?;
    let shape = (op.run)(&inputs)?.shape().clone();
    let grad_out = backward.then(|| on_device(&random(81, shape))).transpose()?;
    let cuda = device.as_cuda_device()?;
    let _kept = cuda.enable_cuda_graph_htod_cache();
    // The first run loads the kernels, which a capture may not.
    let expected: Vec<_> = run(op, &inputs, grad_out.as_ref())?.iter().map(values).collect();
    cuda.synchronize()?;
    let (outputs, Some(graph)) = capture(device, || run(op, &inputs, grad_out.as_ref()))? else {
        candle_core::bail!("{}: nothing was captured", op.name)
    };
    for run in 0..3 {
        graph.launch().map_err(Error::wrap)?;
        // Reading them is not part of the graph, and copies as it likes.
        let got: Vec<_> = outputs.iter().map(values).collect();
        assert!(got == expected, "{}: replay {run} gave other bits", op.name);
    }
    // Freed on the stream, as long as the graph that they come from is there.
    drop(outputs);
    Ok(())
}
