//! A function of one tensor as a CUDA graph: all its launches at the price of one.
//!
//! ```text
//! capture   y = f(input), once to load kernels, once more recorded     input, output: memory of its own
//! run       input <- x;  replay;  a copy of output
//! ```

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::cuda_backend::cudarc::driver::CudaGraph;
use candle_core::{bail, CudaDevice, DType, Device, Error, Result, Shape, Tensor, Var};

const OP: &str = "cuda::Graphed";

/// A function, recorded for one shape and dtype of its input, as an image encoder's forward:
/// `Graphed::capture(&pixel_values, |x| encoder.forward(x, Mode::Eval))`.
///
/// The function's host code runs only in the two runs of [`capture`](Self::capture). These runs fix the kernels, the
/// random draws and the active adapter. The graph reads the weights where they were then, so it keeps the function and
/// all that the function owns or borrows. [`Var::set`] writes a variable in its place, and the next replay reads the
/// new values. The graph's memory is not the pool's. A graph stays on its thread, whose stream it was recorded from.
///
/// [Example](crate::guide::cuda)
pub struct Graphed<F> {
    // Fields are dropped in this order: the graph before what it reads.
    graph: CudaGraph,
    input: Var,
    output: Var,
    _function: F,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> Graphed<F> {
    /// Records what `function` does with tensors of the example's shape and dtype.
    ///
    /// # Errors
    /// - the example is not on a GPU;
    /// - the device tracks events between several streams;
    /// - the function fails, reads a tensor on the host or copies anything large to the GPU: no graph can hold that.
    pub fn capture(example: &Tensor, function: F) -> Result<Self> {
        let device = gpu(example.device())?;
        let input = Var::from_tensor(&example.detach())?;
        // candle keeps the strides of this run on the device, for the next.
        let _kept = device.enable_cuda_graph_htod_cache();
        let output = {
            let first = function(&input.as_detached_tensor())?;
            if !first.device().same_device(example.device()) {
                bail!("{OP}: the output must be on the input's GPU, got {:?}", first.device())
            }
            let output = Var::zeros(first.shape(), first.dtype(), first.device())?;
            output.set(&first)?;
            output
        };
        let graph = record(device, || output.set(&function(&input.as_detached_tensor())?))?;
        Ok(Self { graph, input, output, _function: function })
    }

    /// The function of `x`, of the shape and dtype that it was recorded for.
    ///
    /// # Errors
    /// On another shape, dtype or device, and if the graph cannot be launched.
    pub fn run(&self, x: &Tensor) -> Result<Tensor> {
        check(x, self.input.shape(), self.input.dtype())?;
        if !x.device().same_device(self.input.device()) {
            bail!("{OP}: recorded on {:?}, got a tensor on {:?}", self.input.device(), x.device())
        }
        self.input.set(x)?;
        self.graph.launch().map_err(|e| Error::wrap(e).context(format!("{OP}: replay")))?;
        self.output.as_detached_tensor().copy()
    }
}

/// The GPU, if its stream can be captured.
pub(super) fn gpu(device: &Device) -> Result<&CudaDevice> {
    let Ok(device) = device.as_cuda_device() else {
        bail!("{OP}: CUDA graphs want a tensor on a GPU, got one on {device:?}")
    };
    if device.cuda_stream().context().is_managing_stream_synchronization() {
        bail!(
            "{OP}: with several streams, a capture may not wait for events from before it: turn \
             CudaDevice::disable_event_tracking on before tensors are made"
        )
    }
    Ok(device)
}

fn check(x: &Tensor, shape: &Shape, dtype: DType) -> Result<()> {
    if x.shape() != shape || x.dtype() != dtype {
        bail!("{OP}: recorded for {shape:?} {dtype:?}, got {:?} {:?}", x.shape(), x.dtype())
    }
    Ok(())
}

/// The launches of `work` on the device's stream.
pub(super) fn record(device: &CudaDevice, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    let stream = device.cuda_stream();
    device.synchronize()?;
    stream
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .map_err(|e| Error::wrap(e).context(format!("{OP}: beginning a capture")))?;
    let done = work();
    // Also after a failure: the stream must leave the capture. The work has freed its allocations.
    let graph = stream.end_capture(CUgraphInstantiate_flags(0));
    done.map_err(|e| e.context(format!("{OP}: in the recorded run")))?;
    match graph.map_err(|e| Error::wrap(e).context(format!("{OP}: ending the capture")))? {
        Some(graph) => Ok(graph),
        None => bail!("{OP}: nothing was recorded"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_on_the_cpu_is_refused() -> Result<()> {
        let x = Tensor::zeros((1, 3), DType::F32, &Device::Cpu)?;
        let captured = Graphed::capture(&x, |x| x + 1.0).map(|_| ());
        let message = captured.unwrap_err().to_string();
        assert!(message.contains("on a GPU") && message.contains("Cpu"), "{message}");
        Ok(())
    }

    #[test]
    fn another_shape_or_dtype_than_the_recorded_one_is_refused() -> Result<()> {
        let x = Tensor::zeros((1, 3), DType::F32, &Device::Cpu)?;
        check(&x, x.shape(), x.dtype())?;
        for (shape, dtype) in [((2, 3), DType::F32), ((1, 3), DType::BF16)] {
            let message = check(&x, &Shape::from(shape), dtype).unwrap_err().to_string();
            assert!(message.contains("recorded for") && message.contains("[1, 3]"), "{message}");
        }
        Ok(())
    }
}
