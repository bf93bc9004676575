//! From a problem to the launch of a kernel: its name, grid, block, shared memory and the bytes of its params struct.
//!
//! Nothing here needs a GPU: a [`Launch`] is plain data, made by one function per kernel from the problem's shapes and
//! the operands' addresses. A [`Backend`] runs it: the CUDA driver, or in tests the emulator. Sums over rows go through
//! scratch memory, so they have a fixed order.
//!
//! ```text
//! <op>::plan(problem, ..)     -> plan::Plan: launches over operand slots, made once and kept
//! Backend::launch(launch, operands)    fills in the addresses and dropout masks of one call, and runs it
//! ```

pub mod adamw;
// Their documentation stands in kernels/abi.h.
#[allow(missing_docs, non_camel_case_types)]
mod bindings;
pub mod cache;
pub mod concat;
pub mod conv_columns;
pub mod dora;
pub mod dropout;
pub mod family;
pub mod gpu;
pub mod layer_norm;
pub mod multi_head;
pub mod plan;
pub mod projection;
pub mod rel_pos_attention;
pub mod self_test;
pub mod slots;
mod sum_partials;
pub mod tensor_map;
mod tile_table;
pub mod tiles;

pub use crate::problem::{
    AdamWRates, AdamWStep, AttentionProblem, ConvColumns, LayerNormProblem, MultiHeadProblem,
};
pub use bindings::{device_ptr, Slots};
pub use gpu::{Architecture, Gpu};

use bindings::Params;
use candle_core::{bail, DType, Result};
use slots::Operands;
use tensor_map::TensorMap;

/// A kernel's launch, as plain data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Launch {
    /// The kernel's name.
    pub kernel: String,
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Blocks of a cluster, which run at the same time and reach each other's shared memory, along x: 1 for none; else
    /// for Hopper alone.
    pub cluster: u32,
    /// The bytes of the params struct.
    pub params: Vec<u8>,
    /// Operands within `params`.
    pub slots: Slots,
    /// Tensor maps and where in `params` they stand once they are encoded.
    pub tensor_maps: Vec<(usize, TensorMap)>,
    /// Whether the kernel may begin before the previous one has ended (programmatic dependent launch). It then waits
    /// for the previous one itself, by the rules in `docs/kernels.md`. Only for a [`Gpu`] with early launch.
    pub begins_early: bool,
}

impl Launch {
    /// The instance of `family` for `dtype`, `threads` wide, without shared memory.
    fn new<P: Params>(
        family: &str,
        dtype: DType,
        grid: [u64; 3],
        threads: u32,
        params: &P,
    ) -> Result<Self> {
        let kernel = format!("{family}_{}", dtype_name(family, dtype)?);
        let [x, y, z] = grid;
        if grid.contains(&0) || x > 0x7FFF_FFFF || y > 65535 || z > 65535 {
            bail!("{kernel}: a grid of {x} x {y} x {z} blocks is empty or more than a device takes")
        }
        let params = bytemuck::bytes_of(params).to_vec();
        let (grid, block) = (grid.map(|blocks| blocks as u32), [threads, 1, 1]);
        Ok(Self { kernel, grid, block, params, slots: P::SLOTS, cluster: 1, ..Self::default() })
    }
}

/// The place of a kernel's file among files of kernels: its name begins with that of its file, and of several the
/// longest is meant.
pub fn file_of<'a>(kernel: &str, files: impl IntoIterator<Item = &'a str>) -> Option<usize> {
    let holds = |name: &str| {
        kernel.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
    };
    let found = files.into_iter().enumerate().filter(|(_, name)| holds(name));
    found.max_by_key(|(_, name)| name.len()).map(|(index, _)| index)
}

/// A device, real or emulated, that runs kernels.
pub trait Backend {
    /// Memory of the device, freed on drop once the kernels that use it have ended.
    type Memory;

    /// Uninitialised memory, aligned to at least 256 bytes.
    ///
    /// # Errors
    /// If there is none left.
    fn alloc(&self, bytes: usize) -> Result<Self::Memory>;

    /// Where the memory lies.
    fn address(&self, memory: &Self::Memory) -> device_ptr;

    /// Fills the launch with the operands of a call ([`Launch::fill`]) and runs the kernel, after those launched
    /// before.
    ///
    /// # Errors
    /// If there is no such kernel, or it cannot be launched.
    ///
    /// # Safety
    /// The addresses in the filled params must be of live device memory, of the sizes that the kernel expects, until
    /// the kernel has ended.
    unsafe fn launch(&self, launch: &Launch, operands: &Operands<'_>) -> Result<()>;
}

/// A size as kernels take it.
fn narrow(op: &str, what: &str, size: usize) -> Result<u32> {
    match u32::try_from(size) {
        Ok(size) => Ok(size),
        Err(_) => bail!("{op}: {what} must be less than 2^32, got {size}"),
    }
}

/// `f32`, `f16` or `bf16`: how the names of the instances end.
fn dtype_name(op: &str, dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Ok(dtype.as_str()),
        _ => bail!("{op}: tensors must be f32, f16 or bf16, got {dtype:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Params for u32 {
        const SLOTS: Slots = Slots { addresses: &[], masks: &[] };
    }

    #[test]
    fn a_launch_names_its_instance_and_holds_the_bytes_of_its_params() -> Result<()> {
        let launch = Launch::new("op", DType::BF16, [3, 2, 1], 128, &0x0102_0304u32)?;
        assert_eq!((launch.kernel.as_str(), launch.grid), ("op_bf16", [3, 2, 1]));
        assert_eq!(launch.params, 0x0102_0304u32.to_ne_bytes());
        Ok(())
    }

    #[test]
    fn a_kernel_is_looked_for_in_the_file_that_its_name_begins_with() {
        let files = ["foo", "foo_bwd", "foo_bwd_sm90"];
        assert_eq!(file_of("foo_f16", files), Some(0));
        assert_eq!(file_of("foo_bwd_f16", files), Some(1));
        assert_eq!(file_of("foo_bwd_sm90_bf16", files), Some(2));
        for stranger in ["food_f16", "fo_f16", "bar"] {
            assert_eq!(file_of(stranger, files), None);
        }
    }

    #[test]
    fn sizes_are_not_cut() {
        assert!(narrow("op", "size", 1 << 32).is_err());
    }

    #[test]
    fn what_no_device_takes_is_refused() {
        assert!(Launch::new("op", DType::F64, [1, 1, 1], 32, &0u32).is_err());
        for grid in [[0, 1, 1], [1 << 31, 1, 1], [1, 65536, 1], [1, 1, 65536]] {
            let message = Launch::new("op", DType::F32, grid, 32, &0u32).unwrap_err().to_string();
            assert!(message.contains("op_f32") && message.contains("grid"), "{message}");
        }
    }
}
