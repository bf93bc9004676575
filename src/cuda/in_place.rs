//! A job over any number of tensors, some changed in place. Its kernels find them by a table in device memory.

use super::replay;
use super::run::{tensor, with_operands, write, Job};
use super::stream::Stream;
use crate::launch::slots::Operands;
use crate::launch::{device_ptr, Backend};
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr};
use candle_core::{
    bail, CpuStorage, CudaStorage, DType, Error, InplaceOp1, Layout, Result, Shape, Tensor,
};

/// The tensors of such a job, all on one GPU.
pub(crate) struct InPlace<'a> {
    /// Changed by the kernels: contiguous f32, f16 or bf16.
    pub changed: &'a [&'a Tensor],
    /// Read by the kernels; the plan's inputs after the table.
    pub read: &'a [&'a Tensor],
}

impl Job<'_> {
    /// Launches the plan, whose first input is the table that `table` makes of the addresses of what is changed and
    /// what is read. Returns the plan's one output.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_in_place(
        &self,
        tensors: &InPlace<'_>,
        table: impl FnOnce(&[device_ptr], &[device_ptr]) -> Result<Vec<u8>>,
        (dtype, shape): (DType, &Shape),
    ) -> Result<Tensor> {
        let InPlace { changed, read } = tensors;
        let launched = || -> Result<Tensor> {
            let Some(first) = changed.first() else { bail!("no tensors") };
            for tensor in *changed {
                let layout = tensor.layout();
                if !layout.is_contiguous() || layout.start_offset() > 0 {
                    bail!("expected a contiguous tensor of its own memory, got {layout:?}")
                }
            }
            let device = first.device().as_cuda_device()?;
            let stream = Stream::of(device)?;
            touch_all(changed, &stream.stream)?;
            // SAFETY: the kernels write every element of the output.
            let mut out = unsafe { device.alloc_uninit(shape, dtype)? };
            let bytes = self.plan.workspace_bytes;
            let workspace = (bytes > 0).then(|| stream.alloc(bytes)).transpose()?;
            let all: Vec<_> = changed.iter().chain(*read).copied().collect();
            with_operands(&all, &stream.stream, |addresses| {
                let (changed, inputs) = addresses.split_at(changed.len());
                let rows = table(changed, inputs)?;
                // A recorded step finds one in memory, at every replay another.
                let kept = replay::table();
                let copied = kept.is_none().then(|| device.clone_htod(&rows)).transpose()?;
                let table = copied.as_ref().map(|rows| rows.device_ptr(&stream.stream).0).or(kept);
                let inputs: Vec<_> = table.iter().chain(inputs).copied().collect();
                let (out, _written) = write(&mut out, &stream.stream)?;
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
                    unsafe { stream.launch(step, &operands)? };
                }
                Ok(())
            })?;
            touch_all(changed, &stream.stream)?;
            Ok(tensor(out, shape))
        };
        launched().map_err(|e| e.context(format!("{} on the GPU", self.op)))
    }
}

/// This stream waits for all uses so far of tensors that change. Later uses on other streams wait for this one.
fn touch_all(tensors: &[&Tensor], stream: &CudaStream) -> Result<()> {
    if !stream.context().is_managing_stream_synchronization() {
        return Ok(()); // there is no other stream
    }
    tensors.iter().try_for_each(|tensor| tensor.inplace_op1(&Touch(stream)))
}

struct Touch<'a>(&'a CudaStream);

impl InplaceOp1 for Touch<'_> {
    fn name(&self) -> &'static str {
        "touch"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        Err(Error::msg("expected a tensor on the GPU"))
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        write(storage, self.0).map(|_recorded| ())
    }
}
