//! Tensor maps as the driver encodes them.

use crate::launch::cache::Cache;
use crate::launch::tensor_map::{Element, Swizzle, TensorMap, MOST_DIMS};
use candle_core::cuda_backend::cudarc::driver::sys::{self, *};
use candle_core::{Error, Result};

type Encoded = [u8; 128];

/// An encoder's forward and backward have about a thousand maps.
const GENERATION: usize = 2048;

/// Encoded maps by what they are made of. An encoded map holds addresses and sizes alone, so it stays right while
/// memory comes and goes.
pub(super) type EncodedMaps = Cache<TensorMap, Encoded, GENERATION>;

/// The 128 bytes that bulk copies read.
///
/// # Errors
/// On what the copy engine does not take.
pub(super) fn encode(map: &TensorMap) -> Result<Encoded> {
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
    let (mut dims, steps) = ([0u64; MOST_DIMS], [1u32; MOST_DIMS]);
    for (wide, &size) in dims.iter_mut().zip(map.dims()) {
        *wide = size.into();
    }
    let mut encoded = std::mem::MaybeUninit::<CUtensorMap>::zeroed();
    // SAFETY: the arrays have as many elements as the rank says, or more. The driver writes the map, which is plain
    // bytes and was zeroed, and keeps nothing.
    let bytes = unsafe {
        sys::cuTensorMapEncodeTiled(
            encoded.as_mut_ptr(),
            element,
            map.dims().len() as u32,
            map.address as *mut std::ffi::c_void,
            dims.as_ptr(),
            map.strides().as_ptr(),
            map.tile().as_ptr(),
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
