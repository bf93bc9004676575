//! A value that is computed already, as one node of candle's graph with a backward of its own.

use super::Gradients;
use candle_core::{bail, CpuStorage, CudaStorage, CustomOp3, Layout, MetalStorage, Result, Shape};
use candle_core::{Storage, Tensor};
use std::sync::Mutex;

/// `value` as a function of `inputs`, one to three; `backward` takes the inputs and the gradient of the value. An input
/// that is not there reaches `backward` as a placeholder without a gradient.
pub(crate) fn with_backward(
    name: &'static str,
    inputs: (&Tensor, Option<&Tensor>, Option<&Tensor>),
    value: Tensor,
    backward: impl Fn([&Tensor; 3], &Tensor) -> Result<Gradients> + Send + Sync + 'static,
) -> Result<Tensor> {
    let absent = inputs.0.detach();
    let (second, third) = (inputs.1.unwrap_or(&absent), inputs.2.unwrap_or(&absent));
    if ![inputs.0, second, third].into_iter().any(Tensor::track_op) {
        return Ok(value);
    }
    let value = match value.layout().start_offset() {
        0 => value.contiguous()?,
        _ => value.force_contiguous()?,
    };
    let value = {
        let (storage, layout) = value.storage_and_layout();
        Mutex::new(Some((storage.try_clone(layout)?, layout.shape().clone())))
    };
    inputs.0.apply_op3(second, third, Computed { name, value, backward })
}

struct Computed<F> {
    name: &'static str,
    /// The forward takes it.
    value: Mutex<Option<(Storage, Shape)>>,
    backward: F,
}

impl<F> Computed<F> {
    fn take(&self) -> Result<(Storage, Shape)> {
        match self.value.lock().ok().and_then(|mut value| value.take()) {
            Some(value) => Ok(value),
            None => bail!("{}: the forward runs once", self.name),
        }
    }
}

impl<F> CustomOp3 for Computed<F>
where
    F: Fn([&Tensor; 3], &Tensor) -> Result<Gradients> + Send + Sync,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => bail!("{}: the value left the CPU", self.name),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => bail!("{}: the value left the GPU", self.name),
        }
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        match self.take()? {
            (Storage::Metal(storage), shape) => Ok((storage, shape)),
            _ => bail!("{}: the value left the GPU", self.name),
        }
    }

    fn bwd(
        &self,
        first: &Tensor,
        second: &Tensor,
        third: &Tensor,
        _res: &Tensor,
        grad_res: &Tensor,
    ) -> Result<Gradients> {
        (self.backward)([first, second, third], grad_res)
    }
}
