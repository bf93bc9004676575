//! A value that is computed already, as one node of candle's graph with a backward of its own.

use super::Gradients;
use candle_core::op::BackpropOp;
use candle_core::{bail, CpuStorage, CudaStorage, CustomOp3, Layout, MetalStorage, Result, Shape};
use candle_core::{Storage, Tensor};
use std::sync::Mutex;

/// The inputs of an operation, one to three.
pub(super) type Inputs<'a> = (&'a Tensor, Option<&'a Tensor>, Option<&'a Tensor>);

/// All three inputs of a custom operation; a missing one is a placeholder without a gradient, never read.
pub(super) fn three((first, second, third): Inputs<'_>) -> [Tensor; 3] {
    let or_placeholder = |input: Option<&Tensor>| input.cloned().unwrap_or_else(|| first.detach());
    [first.clone(), or_placeholder(second), or_placeholder(third)]
}

/// `value` as a function of `inputs`; `backward` takes the inputs and the gradient of the value. A missing input
/// reaches `backward` as a placeholder without a gradient.
pub(crate) fn with_backward(
    name: &'static str,
    inputs: Inputs<'_>,
    value: Tensor,
    backward: impl Fn([&Tensor; 3], &Tensor) -> Result<Gradients> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !three(inputs).iter().any(Tensor::track_op) {
        return Ok(value);
    }
    let value = match value.layout().start_offset() {
        0 => value.contiguous()?,
        _ => value.force_contiguous()?,
    };
    let value = {
        let (storage, layout) = value.storage_and_layout();
        (storage.try_clone(layout)?, layout.shape().clone())
    };
    node(name, inputs, value, move |inputs, _, grad| backward(inputs, grad))
}

/// As [`with_backward`], of a storage that nobody else holds; `backward` takes the value too.
pub(super) fn node(
    name: &'static str,
    inputs: Inputs<'_>,
    (storage, shape): (Storage, Shape),
    backward: impl Fn([&Tensor; 3], &Tensor, &Tensor) -> Result<Gradients> + Send + Sync + 'static,
) -> Result<Tensor> {
    let [first, second, third] = three(inputs);
    if ![&first, &second, &third].into_iter().any(Tensor::track_op) {
        return Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false));
    }
    let value = Mutex::new(Some((storage, shape)));
    first.apply_op3(&second, &third, Computed { name, value, backward })
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
    F: Fn([&Tensor; 3], &Tensor, &Tensor) -> Result<Gradients> + Send + Sync,
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
        value: &Tensor,
        grad: &Tensor,
    ) -> Result<Gradients> {
        (self.backward)([first, second, third], value, grad)
    }
}
