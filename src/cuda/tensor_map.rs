//! Tensor maps as the driver encodes them.

use crate::launch::tensor_map::{Element, Swizzle, TensorMap};
use candle_core::cuda_backend::cudarc::driver::sys::{self, *};
use candle_core::{Error, Result};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

type Encoded = [u8; 128];

/// Maps of each of the two generations: those of an encoder's forward and backward are about a thousand.
const GENERATION: usize = 2048;

/// Encoded maps by what they are made of. An encoded map holds addresses and sizes alone, so it stays right while memory
/// comes and goes. When the young generation is full it becomes the old one, which is forgotten.
#[derive(Default)]
pub(super) struct EncodedMaps(Mutex<[HashMap<TensorMap, Encoded>; 2]>);

impl EncodedMaps {
    /// The map, encoded now or before.
    ///
    /// # Errors
    /// As [`encode`].
    pub fn get(&self, map: &TensorMap) -> Result<Encoded> {
        self.get_or(map, encode)
    }

    fn get_or(
        &self,
        map: &TensorMap,
        encode: impl FnOnce(&TensorMap) -> Result<Encoded>,
    ) -> Result<Encoded> {
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let [young, old] = &mut *maps;
        if let Some(encoded) = young.get(map) {
            return Ok(*encoded);
        }
        let encoded = match old.get(map) {
            Some(encoded) => *encoded,
            None => encode(map)?,
        };
        if young.len() == GENERATION {
            *old = std::mem::take(young);
        }
        young.insert(map.clone(), encoded);
        Ok(encoded)
    }
}

/// The 128 bytes that bulk copies read.
///
/// # Errors
/// On what the copy engine does not take.
fn encode(map: &TensorMap) -> Result<Encoded> {
    map.check()?;
    let element = match map.element {
        Element::Bits16 => CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_UINT16,
        Element::Bits32 => CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_UINT32,
        Element::Tf32 => CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_TFLOAT32,
    };
    let swizzle = match map.swizzle {
        Swizzle::None => CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_NONE,
        Swizzle::Bytes32 => CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_32B,
        Swizzle::Bytes64 => CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_64B,
        Swizzle::Bytes128 => CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let dims: Vec<u64> = map.dims.iter().map(|&n| n.into()).collect();
    let steps = vec![1u32; dims.len()];
    let mut encoded = std::mem::MaybeUninit::<CUtensorMap>::zeroed();
    // SAFETY: the arrays have as many elements as the rank says (`check`); the driver writes the map, which is plain
    // bytes and was zeroed, and keeps nothing.
    let bytes = unsafe {
        sys::cuTensorMapEncodeTiled(
            encoded.as_mut_ptr(),
            element,
            dims.len() as u32,
            map.address as *mut std::ffi::c_void,
            dims.as_ptr(),
            map.strides.as_ptr(),
            map.tile.as_ptr(),
            steps.as_ptr(),
            CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        .result()
        .map_err(|e| Error::wrap(e).context(format!("encoding {map:?}")))?;
        encoded.as_ptr().cast::<Encoded>().read()
    };
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn a_map_is_encoded_once_while_it_is_in_use() -> Result<()> {
        let (maps, encodings) = (EncodedMaps::default(), Cell::new(0));
        let get = |address: u64| -> Result<Encoded> {
            let map = TensorMap::matrix(16 * address, Element::Bits16, (70, 40, 40), (64, 64))?;
            maps.get_or(&map, |map| {
                encodings.set(encodings.get() + 1);
                Ok([map.address as u8; 128])
            })
        };
        assert_eq!(get(3)?, [48; 128]);
        let count = 3 * GENERATION as u64;
        for other in 4..count {
            get(other)?;
            assert_eq!(get(3)?, [48; 128]);
        }
        assert_eq!(encodings.get(), count - 3, "each once");
        // One that was not used for two generations is forgotten: the cache does not grow.
        get(4)?;
        assert_eq!(encodings.get(), count - 2);
        let kept =
            maps.0.lock().unwrap_or_else(PoisonError::into_inner).each_ref().map(HashMap::len);
        assert!(kept.iter().all(|&len| len <= GENERATION), "{kept:?}");
        Ok(())
    }
}
