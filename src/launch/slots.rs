//! Operands by number: a plan is made before the addresses are known, and serves every call of the same problem.
//!
//! ```text
//! slot             kind << 56 | index << 48 | offset      an address in a space of its own; operands are aligned there
//! Operands::at     operand[kind][index] + offset          what a launch gets; null and other addresses stay
//! ```
//! Planners add offsets to addresses and compare them with null. So they plan with slots, or, in tests, with memory.

use super::bindings::{device_ptr, DropoutMask, DROPOUT_SEED_AT};
use crate::philox::Dropout;
use candle_core::{bail, Result};

const INPUT: u64 = 1;
const OUTPUT: u64 = 2;
const SCRATCH: u64 = 3;
/// Bits of an offset, and of an index.
const OFFSET: u32 = 48;
const INDEX: u32 = 8;

const fn slot(kind: u64, index: usize) -> device_ptr {
    (kind << INDEX | index as u64) << OFFSET
}

const fn index(slot: device_ptr) -> usize {
    (slot >> OFFSET) as usize & ((1 << INDEX) - 1)
}

#[cold]
fn missing(slot: device_ptr) -> Result<device_ptr> {
    let name = match slot >> (OFFSET + INDEX) {
        INPUT => "input",
        OUTPUT => "output",
        _ => "workspace",
    };
    bail!("the plan reads {name} {}, and the call has none", index(slot))
}

/// The slot of an input.
pub const fn input(index: usize) -> device_ptr {
    slot(INPUT, index)
}

/// The slot of an output.
pub const fn output(index: usize) -> device_ptr {
    slot(OUTPUT, index)
}

/// The slot of the scratch memory.
pub const WORKSPACE: device_ptr = slot(SCRATCH, 0);

/// `address` if the operand is there, else null.
pub const fn present(is: bool, address: device_ptr) -> device_ptr {
    if is {
        address
    } else {
        0
    }
}

/// The slot of a call's dropout: its place, counted from one, stands for its seed.
pub const fn dropout(index: usize) -> Dropout {
    Dropout { p: 0.0, seed: index as u64 + 1, stream: 0 }
}

/// A mask as kernels take it; none keeps everything.
pub(super) fn mask(dropout: Option<Dropout>) -> DropoutMask {
    let Some(dropout) = dropout else { return DropoutMask { scale: 1.0, ..Default::default() } };
    DropoutMask {
        seed_low: dropout.seed as u32,
        seed_high: (dropout.seed >> 32) as u32,
        stream: dropout.stream,
        threshold: dropout.threshold(),
        scale: dropout.scale(),
    }
}

/// The mask of whatever seed lies at the address.
fn replayed(mask: DropoutMask, known: bool, at: device_ptr) -> Result<DropoutMask> {
    if !known {
        bail!("a replay has new dropout masks, so their seed must be that of the recorded mode")
    }
    let (seed_low, seed_high) = (at as u32, (at >> 32) as u32);
    Ok(DropoutMask { seed_low, seed_high, threshold: mask.threshold + DROPOUT_SEED_AT, ..mask })
}

/// Addresses and seeds that fill the slots of a plan in one call.
#[derive(Clone, Copy, Debug, Default)]
pub struct Operands<'a> {
    /// The addresses of the inputs.
    pub inputs: &'a [device_ptr],
    /// The addresses of the outputs; null where there is none.
    pub outputs: &'a [device_ptr],
    /// The address of the scratch memory.
    pub workspace: Option<device_ptr>,
    /// The dropouts.
    pub dropouts: &'a [Option<Dropout>],
    /// The seed that is replaced, and the address of those in its place.
    pub replayed: Option<(u64, device_ptr)>,
}

impl Operands<'_> {
    /// The address that a slot stands for; of one that is no slot, itself.
    #[inline]
    pub(super) fn at(&self, address: device_ptr) -> Result<device_ptr> {
        let (kind, index) = (address >> (OFFSET + INDEX), index(address));
        let base = match kind {
            INPUT => self.inputs.get(index).copied(),
            OUTPUT => self.outputs.get(index).copied().filter(|base| *base != 0),
            SCRATCH => self.workspace,
            _ => return Ok(address),
        };
        match base {
            Some(base) => Ok(base + (address & ((1 << OFFSET) - 1))),
            None => missing(address),
        }
    }

    /// The mask that a slot stands for; of one that is no slot, itself. A slot drops nothing.
    pub(super) fn mask(&self, slot: DropoutMask) -> Result<DropoutMask> {
        let index = slot.seed_low.checked_sub(1).filter(|_| slot.threshold == 0);
        let Some(index) = index else { return Ok(slot) };
        match self.dropouts.get(index as usize) {
            Some(&Some(dropout)) => {
                let mask = mask(Some(dropout));
                match self.replayed {
                    Some((seed, at)) if mask.threshold > 0 => {
                        replayed(mask, dropout.seed == seed, at)
                    }
                    _ => Ok(mask),
                }
            }
            _ => bail!("the plan has dropout {index}, and the call has none"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_become_addresses() -> Result<()> {
        let (inputs, outputs, workspace) = ([0x1000, 0x7f00_0000_2000], [0x3000], Some(0x4000));
        let (inputs, outputs) = (&inputs[..], &outputs[..]);
        let operands = Operands { inputs, outputs, workspace, ..Default::default() };
        for (slot, address) in [
            (0, 0),
            (0x1234, 0x1234),
            (input(0), 0x1000),
            (input(1) + 24, 0x7f00_0000_2018),
            (output(0) + (1 << 40), (1 << 40) + 0x3000),
            (WORKSPACE + 256, 0x4100),
        ] {
            assert_eq!(operands.at(slot)?, address);
        }
        let operands = Operands { outputs: &[0x3000, 0], ..operands };
        for missing in [input(2), output(1), output(2)] {
            assert!(operands.at(missing).unwrap_err().to_string().contains("the call has none"));
        }
        assert!(Operands { workspace: None, ..operands }.at(WORKSPACE).is_err());
        Ok(())
    }

    #[test]
    fn a_dropout_is_the_calls() -> Result<()> {
        let second = Some(Dropout { p: 0.25, seed: 3 << 32, stream: 7 });
        let operands = Operands { dropouts: &[None, second], ..Default::default() };
        let words = |mask| bytemuck::cast::<DropoutMask, [u32; 5]>(mask);
        let filled = |slot| operands.mask(mask(slot)).map(words);
        assert_eq!(filled(Some(dropout(1)))?, words(mask(second)));
        assert_eq!(filled(None)?, words(mask(None)));
        let own = Some(Dropout { p: 0.5, seed: 1, stream: 0 });
        assert_eq!(filled(own)?, words(mask(own)));
        assert!(filled(Some(dropout(0))).is_err() && filled(Some(dropout(2))).is_err());
        Ok(())
    }

    #[test]
    fn a_replayed_seed_is_an_address() -> Result<()> {
        let own = Dropout { p: 0.25, seed: 3 << 32, stream: 7 };
        let (dropouts, at) = ([Some(own), Some(Dropout { p: 0.0, ..own })], 0x7f00_1234_5678);
        let operands = Operands { dropouts: &dropouts, ..Default::default() };
        let filled = |seed, index| {
            Operands { replayed: Some((seed, at)), ..operands }.mask(mask(Some(dropout(index))))
        };
        let found = filled(own.seed, 0)?;
        assert_eq!((found.seed_low, found.seed_high, found.stream), (0x1234_5678, 0x7f00, 7));
        assert_eq!(found.threshold, own.threshold() + DROPOUT_SEED_AT);
        assert_eq!(filled(own.seed, 1)?.threshold, 0);
        assert!(filled(own.seed + 1, 0).unwrap_err().to_string().contains("seed"));
        Ok(())
    }
}
