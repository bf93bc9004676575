//! A job over any number of tensors, some changed in place. Its kernels find them by a table in device memory.

use super::replay;
use super::run::{read, tensor, write, Job};
use super::stream::Stream;
use crate::launch::slots::Operands;
use crate::launch::{device_ptr, Backend};
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr};
use candle_core::{
    bail, CpuStorage, CudaStorage, DType, Error, InplaceOp1, Layout, Result, Shape, Storage, Tensor,
};
use std::cell::Cell;

/// The tensors of such a job, all on one GPU.
pub(crate) struct InPlace<'a> {
    /// Changed by the kernels: contiguous f32, f16 or bf16.
    pub changed: &'a [&'a Tensor],
    /// Read by the kernels; the plan's inputs after the table. Contiguous, as [`operand`](super::operand) makes them.
    pub read: &'a [Tensor],
}

impl Job<'_> {
    /// Launches the plan, whose first input is the table that `table` makes of the addresses of what is changed and what is
    /// read. Returns the plan's one output.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_in_place(
        &self,
        tensors: &InPlace<'_>,
        table: impl FnOnce(&[device_ptr], &[device_ptr]) -> Result<Vec<u8>>,
        (dtype, shape): (DType, &Shape),
    ) -> Result<Tensor> {
        let InPlace { changed, read: inputs } = tensors;
        let launched = || -> Result<Tensor> {
            let Some(first) = changed.first() else { bail!("no tensors") };
            let device = first.device().as_cuda_device()?;
            let stream = Stream(device.cuda_stream());
            let touch_all = || changed.iter().map(|t| touch(t, &stream.0)).collect::<Result<_>>();
            let addresses: Vec<_> = touch_all()?;
            // SAFETY: the kernels write every element of the output.
            let mut out = unsafe { device.alloc_uninit(shape, dtype)? };
            let bytes = self.plan.workspace_bytes;
            let workspace = (bytes > 0).then(|| stream.alloc(bytes)).transpose()?;
            {
                let locks: Vec<_> = inputs.iter().map(Tensor::storage_and_layout).collect();
                let guards = locks.iter().map(|(storage, layout)| match &**storage {
                    Storage::Cuda(storage) => read(storage, layout, &stream.0),
                    _ => bail!("expected a tensor on the GPU"),
                });
                let guards = guards.collect::<Result<Vec<_>>>()?;
                let inputs: Vec<_> = guards.iter().map(|(address, _)| *address).collect();
                let rows = table(&addresses, &inputs)?;
                // A recorded step finds one in memory, at every replay another.
                let kept = replay::table();
                let copied = kept.is_none().then(|| device.clone_htod(&rows)).transpose()?;
                let table = copied.as_ref().map(|rows| rows.device_ptr(&stream.0).0).or(kept);
                let inputs: Vec<_> = table.into_iter().chain(inputs).collect();
                let (out, _written) = write(&mut out, &stream.0)?;
                let operands = Operands {
                    inputs: &inputs,
                    outputs: &[out],
                    workspace: workspace.as_ref().map(|memory| stream.address(memory)),
                    dropouts: self.dropouts,
                    ..Default::default()
                };
                for step in &self.plan.steps {
                    // SAFETY: as in `run`; the table has the addresses of tensors that live until the launches are
                    // made, and is freed in the stream's order.
                    unsafe { stream.launch(&step.fill(&operands)?)? };
                }
            }
            // Other streams wait for the change.
            touch_all()?;
            Ok(tensor(out, shape))
        };
        launched().map_err(|e| e.context(format!("{} on the GPU", self.op)))
    }
}

/// The address of a tensor that changes. This stream waits for all uses so far. Later uses on other streams wait for this one.
fn touch(tensor: &Tensor, stream: &CudaStream) -> Result<device_ptr> {
    let touch = Touch { stream, address: Cell::new(0) };
    tensor.inplace_op1(&touch)?;
    Ok(touch.address.get())
}

struct Touch<'a> {
    stream: &'a CudaStream,
    address: Cell<device_ptr>,
}

impl InplaceOp1 for Touch<'_> {
    fn name(&self) -> &'static str {
        "touch"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        Err(Error::msg("expected a tensor on the GPU"))
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let Some((0, _)) = layout.contiguous_offsets() else {
            bail!("expected a contiguous tensor of its own memory, got {layout:?}")
        };
        let (address, _recorded) = write(storage, self.stream)?;
        self.address.set(address);
        Ok(())
    }
}
