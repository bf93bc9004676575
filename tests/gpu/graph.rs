//! CUDA graphs: what an operation launches is captured and replayed. An operation that copied from the host, waited for
//! the GPU or used another stream could not be.

use crate::common::cases::{dropout, layer_norm, Attention, Op};
use crate::common::values;
use crate::trial;
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::{DType, Device, Error, Result, Tensor};
use libtest_mimic::Trial;

/// The operations with kernels.
fn captured() -> Vec<Op<'static>> {
    let attention = Attention {
        batch: 1,
        grid: (16, 20),
        heads: 2,
        dim: 64,
        window: Some(14),
        tables: (27, 27),
        dropout: None,
    };
    vec![layer_norm(&[2, 14, 14, 768]), dropout(&[3, 100, 77]), attention.op()]
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

fn replay(op: &Op, device: &Device) -> Result<()> {
    let inputs: Vec<Tensor> = op
        .inputs
        .iter()
        .map(|t| t.to_dtype(DType::BF16)?.to_device(device))
        .collect::<Result<_>>()?;
    // The first run loads the kernels, which a capture may not.
    let expected = values(&(op.fused)(&inputs)?);
    let cuda = device.as_cuda_device()?;
    let stream = cuda.cuda_stream();
    cuda.synchronize()?;
    stream
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .map_err(Error::wrap)?;
    let captured = (op.fused)(&inputs);
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
