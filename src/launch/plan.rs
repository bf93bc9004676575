//! A plan: what one pass over a problem launches, over slots. It is made once and serves every call.

use super::bindings::EncodedTensorMap;
use super::slots::Operands;
use super::tensor_map::TensorMap;
use super::Launch;
use bytemuck::Pod;
use candle_core::{bail, Result};

/// A pass over a problem, as plain data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The launches, in the order in which they run, over slots.
    pub steps: Vec<Launch>,
    /// Bytes of scratch memory; may be none.
    pub workspace_bytes: usize,
    /// f32 elements that a forward leaves for its backward.
    pub saved: usize,
}

impl From<Launch> for Plan {
    fn from(launch: Launch) -> Self {
        Self { steps: vec![launch], ..Self::default() }
    }
}

impl Launch {
    /// The bytes of the params struct with the operands of a call in its slots, and the tensor maps as `encode` makes
    /// them.
    ///
    /// # Errors
    /// - the call lacks an operand;
    /// - `encode` fails.
    pub fn fill(
        &self,
        operands: &Operands<'_>,
        mut encode: impl FnMut(&TensorMap) -> Result<[u8; size_of::<EncodedTensorMap>()]>,
    ) -> Result<Vec<u8>> {
        let mut params = self.params.clone();
        for &start in self.slots.addresses {
            replace(&mut params, start, |slot| operands.at(slot))?;
        }
        for &start in self.slots.masks {
            replace(&mut params, start, |slot| operands.mask(slot))?;
        }
        for &(start, mut map) in &self.tensor_maps {
            map.address = operands.at(map.address)?;
            replace(&mut params, start, |_| encode(&map))?;
        }
        Ok(params)
    }
}

/// Replaces the value that stands there.
#[inline]
fn replace<T: Pod>(
    params: &mut [u8],
    start: usize,
    new: impl FnOnce(T) -> Result<T>,
) -> Result<()> {
    let length = params.len();
    let Some(bytes) = params.get_mut(start..start + size_of::<T>()) else {
        bail!("a slot at {start} lies outside of {length} bytes of params")
    };
    let value = new(bytemuck::pod_read_unaligned(bytes))?;
    bytes.copy_from_slice(bytemuck::bytes_of(&value));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::projection::{self, Activation, LoraProblem, ProjectionProblem};
    use crate::launch::rel_pos_attention::{self as attention, Given};
    use crate::launch::slots::present;
    use crate::launch::{device_ptr, layer_norm};
    use crate::launch::{AttentionProblem, Gpu, LayerNormProblem};
    use crate::philox::{philox4x32, Dropout};
    use candle_core::DType;

    const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    /// A sequence of random choices.
    struct Draw(u32);

    impl Draw {
        fn of<T: Copy>(&mut self, options: &[T]) -> T {
            self.0 += 1;
            options[philox4x32([self.0, 0, 0, 0], [0; 2])[0] as usize % options.len()]
        }

        fn coin(&mut self) -> bool {
            self.of(&[false, true])
        }

        fn dropout(&mut self) -> Option<Dropout> {
            let (seed, stream) = (self.of(&[0, 1, 1 << 40]), self.of(&[0, 5]));
            self.coin().then_some(Dropout { p: 0.25, seed, stream })
        }

        fn gpu(&mut self) -> Gpu {
            let four = Gpu { multiprocessors: 4, clusters: false, ..Gpu::H100 };
            self.of(&[Gpu::H100, four, Gpu::A100, Gpu::H100.in_turn(), Gpu::H100.portable_only()])
        }

        fn projection(&mut self) -> ProjectionProblem {
            let lora = LoraProblem {
                rank: self.of(&[3, 8, 16, 17]),
                scaling: self.of(&[0.5, 2.0]),
                dropout: self.dropout(),
                bias: self.coin(),
            };
            let lora = self.coin().then_some(lora);
            ProjectionProblem { out_dim: self.of(&[40, 192, 1152]), bias: self.coin(), lora }
        }

        fn attention(&mut self) -> AttentionProblem {
            let (h, w) = self.of(&[(14, 14), (64, 64), (9, 20), (64, 40)]);
            let (side_h, side_w) = self.of(&[(h, w), (7, 7), (14, 14), (32, 32)]);
            AttentionProblem {
                batch: self.of(&[1, 2]),
                h,
                w,
                num_heads: self.of(&[1, 12]),
                head_dim: self.of(&[32, 64, 80]),
                side_h,
                side_w,
                softmax_scale: self.of(&[0.125, 1.0]),
                rel_pos: self.coin(),
                dropout: self.dropout(),
            }
        }
    }

    /// Aligned addresses of a call's operands: inputs, outputs and scratch memory.
    struct Memory([Vec<device_ptr>; 2], device_ptr);

    impl Memory {
        const TWO: [u64; 2] = [1 << 20, 0x7f12_3456_7000];

        fn new(first: u64) -> Self {
            let spread = |of: std::ops::Range<u64>| of.map(|i| first + (i << 34)).collect();
            Self([spread(1..25), spread(25..28)], first + (28 << 34))
        }

        fn fill(&self, plan: &Plan, dropouts: &[Option<Dropout>]) -> Result<Vec<Launch>> {
            let Self([inputs, outputs], workspace) = self;
            let workspace = (plan.workspace_bytes > 0).then_some(*workspace);
            let operands = Operands { inputs, outputs, workspace, dropouts, ..Default::default() };
            let filled = |step: &Launch| {
                let mut maps = vec![];
                let params = step.fill(&operands, |map| {
                    maps.push(*map);
                    Ok(NO_MAP)
                })?;
                let tensor_maps = step.tensor_maps.iter().map(|(start, _)| *start).zip(maps);
                Ok(Launch { params, tensor_maps: tensor_maps.collect(), ..step.clone() })
            };
            plan.steps.iter().map(filled).collect()
        }
    }

    /// The place of a tensor map that is not encoded.
    const NO_MAP: [u8; 128] = [0; 128];

    #[test]
    fn a_filled_projection_is_one_planned_with_addresses() -> Result<()> {
        use projection::{BackwardOperands, ForwardOperands, Pass, Problem, Small, SmallTensor};
        let (mut draw, mut native) = (Draw(0), 0);
        for _ in 0..500 {
            let parts: Vec<_> = (0..draw.of(&[1, 3])).map(|_| draw.projection()).collect();
            let activation = draw.of(&[Activation::Identity, Activation::Gelu]);
            let (rows, in_dim) = (draw.of(&[1, 196, 1793, 4096]), draw.of(&[63, 64, 768]));
            let problem = Problem { rows, in_dim, projections: &parts, activation };
            let (dtype, gpu) = (draw.of(&DTYPES), draw.gpu());
            let [typed, trained] = [draw.coin(), draw.coin()];
            let parameter = projection::Parameter { packed: false, typed, trained };
            let parameters = draw.coin().then(|| vec![parameter; 4 * parts.len()]);
            let [first, second] = [draw.coin(), draw.coin()];
            let keeps = activation != Activation::Identity;
            let forward = Pass::Forward { residual: first, sum: second && keeps };
            let backward = Pass::Backward { dx: first, parameters: second };
            let dropouts: Vec<_> = parts.iter().map(|p| p.lora.and_then(|l| l.dropout)).collect();
            let adapted = projection::low_rank_len(&problem) > 0;
            let bytes = projection::workspace_bytes(&problem, dtype);
            for memory in Memory::TWO.map(Memory::new) {
                let Memory([inputs, outputs], workspace) = &memory;
                let in_place = |named: usize| -> Option<Vec<_>> {
                    let at = &inputs[named + parts.len()..];
                    let small = |&at| SmallTensor { at, typed, trained };
                    parameters.as_ref().map(|all| at.iter().take(all.len()).map(small).collect())
                };
                let (ahead, behind) = (in_place(3), in_place(5));
                let [ahead, behind] = [&ahead, &behind].map(|tensors| {
                    tensors.as_deref().map_or(Small::Flat(inputs[1]), Small::Separate)
                });
                let operands = ForwardOperands {
                    x: inputs[0],
                    weights: &inputs[3..][..parts.len()],
                    small: ahead,
                    residual: present(first, inputs[2]),
                    out: outputs[0],
                    low_rank: present(adapted, outputs[1]),
                    sum: present(second && keeps, outputs[2]),
                };
                let ahead = projection::forward_of(&problem, dtype, &operands, &gpu)?;
                let operands = BackwardOperands {
                    x: inputs[0],
                    weights: &inputs[5..][..parts.len()],
                    small: behind,
                    low_rank: present(adapted, inputs[2]),
                    sum: present(keeps, inputs[3]),
                    dout: inputs[4],
                    dx: present(first, outputs[0]),
                    dsmall: present(second, outputs[1]),
                    workspace: present(bytes > 0, *workspace),
                };
                let behind = projection::backward_of(&problem, dtype, &operands, &gpu)?;
                for (pass, expected) in [(forward, ahead), (backward, behind)] {
                    native += expected.iter().filter(|l| !l.tensor_maps.is_empty()).count();
                    let plan =
                        projection::plan(&problem, pass, parameters.as_deref(), dtype, &gpu)?;
                    assert_eq!(memory.fill(&plan, &dropouts)?, expected, "{problem:?} {pass:?}");
                }
            }
        }
        assert!(native > 100, "{native} launches of native kernels");
        Ok(())
    }

    #[test]
    fn a_filled_attention_is_one_planned_with_addresses() -> Result<()> {
        use attention::{BackwardOperands, Inputs, Pass};
        let (mut draw, mut native) = (Draw(1 << 20), 0);
        for _ in 0..500 {
            let (problem, dtype, gpu) = (draw.attention(), draw.of(&DTYPES), draw.gpu());
            let given = Given { tables_in_place: draw.coin(), pad: draw.coin() };
            let trained = [problem.rel_pos && draw.coin(), given.pad && draw.coin()];
            let backward = Pass::Backward { tables: trained[0], pad: trained[1] };
            let bytes_h = problem.table_rows().0 * problem.head_dim * dtype.size_in_bytes();
            for memory in Memory::TWO.map(Memory::new) {
                let Memory([inputs, outputs], workspace) = &memory;
                let of = |named: usize| {
                    let tables = match given.tables_in_place {
                        true => [inputs[named], inputs[named + 1]],
                        false => [inputs[1], inputs[1] + bytes_h as u64],
                    };
                    let tables = tables.map(|at| present(problem.rel_pos, at));
                    Inputs { qkv: inputs[0], tables, pad: present(given.pad, inputs[2]) }
                };
                let [out, lse] = [outputs[0], outputs[1]];
                let ahead = attention::forward_of(&problem, dtype, &of(3), [out, lse], &gpu)?;
                let operands = BackwardOperands {
                    out: inputs[3],
                    lse: inputs[4],
                    dout: inputs[5],
                    dqkv: outputs[0],
                    dtables: present(trained[0], outputs[1]),
                    dpad: present(trained[1], outputs[2]),
                    workspace: *workspace,
                };
                let behind = attention::backward_of(&problem, dtype, &of(6), &operands, &gpu)?;
                for (pass, expected) in [(Pass::Forward, ahead), (backward, behind.steps)] {
                    native += expected.iter().filter(|l| l.kernel.contains("sm90")).count();
                    let plan = attention::plan(&problem, given, pass, dtype, &gpu)?;
                    let filled = memory.fill(&plan, &[problem.dropout])?;
                    assert_eq!(filled, expected, "{problem:?} {pass:?}");
                }
            }
        }
        assert!(native > 100, "{native} launches of native kernels");
        Ok(())
    }

    #[test]
    fn a_launch_wants_all_its_operands() -> Result<()> {
        let problem = LayerNormProblem { rows: 5, size: 70, eps: 1e-6 };
        let plan = layer_norm::plan(&problem, layer_norm::Pass::Forward, DType::F32)?;
        let operands = Operands { inputs: &[256, 512], outputs: &[1024], ..Default::default() };
        let message = plan.steps[0].fill(&operands, |_| Ok(NO_MAP)).unwrap_err().to_string();
        assert!(message.contains("input 2"), "{message}");
        Ok(())
    }
}
