//! Tensor maps: how Hopper's bulk copies (TMA) are told of a tensor and of the tile of it that is copied at once.
//!
//! A [`TensorMap`] is a description. The backend encodes it into the params struct, since only the driver knows how:
//! `cuTensorMapEncodeTiled` on a GPU, the emulator its own way.

use super::bindings::device_ptr;
use candle_core::{bail, Result};
use std::hash::{Hash, Hasher};

/// The longest dimension: coordinates are signed numbers of 32 bits.
pub const LONGEST: usize = i32::MAX as usize;

/// Kind of element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 16 bits of any kind.
    Bits16,
    /// 32 bits of any kind.
    Bits32,
    /// f32, rounded on the way to what tensor cores take of it.
    Tf32,
}

impl Element {
    /// Its size.
    pub fn bytes(self) -> u32 {
        match self {
            Self::Bits16 => 2,
            Self::Bits32 | Self::Tf32 => 4,
        }
    }
}

/// Bytes of a tile's row within which shared memory is swizzled, so that neither rows nor columns of 16 bytes meet in
/// the same banks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Swizzle {
    None,
    Bytes32,
    Bytes64,
    Bytes128,
}

impl Swizzle {
    /// Their number.
    pub fn bytes(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Bytes32 => 32,
            Self::Bytes64 => 64,
            Self::Bytes128 => 128,
        }
    }
}

/// Most dimensions that the copy engine takes.
pub const MOST_DIMS: usize = 5;

/// A tensor in device memory and its tiles. Dimensions are innermost first; the first one's elements lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Address of the first element.
    pub address: device_ptr,
    /// Kind of element.
    pub element: Element,
    rank: usize,
    dims: [u32; MOST_DIMS],
    strides: [u64; MOST_DIMS - 1],
    tile: [u32; MOST_DIMS],
    /// Swizzle of the tile in shared memory.
    pub swizzle: Swizzle,
}

/// A tensor has few maps, so its address is hash enough.
impl Hash for TensorMap {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.address.hash(state);
    }
}

impl TensorMap {
    /// A tensor of one to five dimensions with elements of a kind. The strides are in bytes, from one index to the next
    /// of each dimension but the first. Elements outside the tensor are read as zeros and not written.
    ///
    /// # Errors
    /// - as [`Self::matrix`];
    /// - strides or sizes of the tile are too few or too many.
    pub fn new(
        (address, element): (device_ptr, Element),
        dims: &[u32],
        strides: &[u64],
        tile: &[u32],
        swizzle: Swizzle,
    ) -> Result<Self> {
        let rank = dims.len();
        if !(1..=MOST_DIMS).contains(&rank) || strides.len() + 1 != rank || tile.len() != rank {
            bail!("a tensor map of {dims:?} in tiles of {tile:?}, {strides:?}: not what bulk copies take")
        }
        let mut map = Self {
            address,
            element,
            rank,
            dims: [1; MOST_DIMS],
            strides: [0; MOST_DIMS - 1],
            tile: [1; MOST_DIMS],
            swizzle,
        };
        map.dims[..rank].copy_from_slice(dims);
        map.strides[..rank - 1].copy_from_slice(strides);
        map.tile[..rank].copy_from_slice(tile);
        map.check().map(|()| map)
    }

    /// Sizes, one to five.
    pub fn dims(&self) -> &[u32] {
        &self.dims[..self.rank]
    }

    /// Bytes from one index to the next of each dimension but the first.
    pub fn strides(&self) -> &[u64] {
        &self.strides[..self.rank - 1]
    }

    /// Sizes of the tile.
    pub fn tile(&self) -> &[u32] {
        &self.tile[..self.rank]
    }

    /// Columns of a matrix `[rows, cols]` with rows `stride` elements apart, in tiles of the given rows and columns.
    /// Tiles with rows of 32, 64 or 128 bytes are swizzled.
    ///
    /// # Errors
    /// The copy engine does not take
    /// - addresses and strides that are no multiples of 16 bytes;
    /// - an empty matrix;
    /// - tiles of more than 256 rows, or with rows of more than 128 bytes or no multiple of 16.
    pub fn matrix(
        address: device_ptr,
        element: Element,
        shape: (u32, u32, u32),
        tile: (u32, u32),
    ) -> Result<Self> {
        let swizzle = match tile.1 * element.bytes() {
            32 => Swizzle::Bytes32,
            64 => Swizzle::Bytes64,
            128 => Swizzle::Bytes128,
            _ => Swizzle::None,
        };
        Self::of_matrix((address, element), shape, tile, swizzle)
    }

    /// The same as they lie: rows one after the other.
    ///
    /// # Errors
    /// As [`Self::matrix`], but that rows of a tile may be longer.
    pub fn unswizzled(
        address: device_ptr,
        element: Element,
        shape: (u32, u32, u32),
        tile: (u32, u32),
    ) -> Result<Self> {
        Self::of_matrix((address, element), shape, tile, Swizzle::None)
    }

    fn of_matrix(
        tensor: (device_ptr, Element),
        (rows, cols, stride): (u32, u32, u32),
        (tile_rows, tile_cols): (u32, u32),
        swizzle: Swizzle,
    ) -> Result<Self> {
        let stride = u64::from(stride) * u64::from(tensor.1.bytes());
        Self::new(tensor, &[cols, rows], &[stride], &[tile_cols, tile_rows], swizzle)
    }

    /// # Errors
    /// On what the copy engine does not take.
    pub fn check(&self) -> Result<()> {
        let (Self { address, element, swizzle, .. }, dims) = (self, self.dims());
        let (strides, tile) = (self.strides(), self.tile());
        let row = tile[0] * element.bytes();
        let tiles = tile.iter().all(|n| (1..=256).contains(n)) && row % 16 == 0;
        let swizzled = *swizzle == Swizzle::None || row == swizzle.bytes();
        if !tiles || !swizzled || dims.contains(&0) {
            bail!("a tensor map of {dims:?} in tiles of {tile:?}, {swizzle:?}: not what bulk copies take")
        }
        if let Some(size) = dims.iter().find(|size| **size as usize > LONGEST) {
            bail!(
                "a tensor map of {dims:?}: bulk copies take dimensions up to {LONGEST}, got {size}"
            )
        }
        if address % 16 != 0 || strides.iter().any(|s| s % 16 != 0 || *s == 0 || *s >= 1 << 40) {
            bail!("a tensor map at {address:#x} with strides of {strides:?} bytes: bulk copies want multiples of 16")
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_is_swizzled_by_the_width_of_its_tiles() -> Result<()> {
        let map = TensorMap::matrix(256, Element::Bits16, (70, 40, 48), (128, 64))?;
        assert_eq!(
            (map.dims(), map.strides(), map.tile()),
            (&[40, 70][..], &[96][..], &[64, 128][..])
        );
        assert_eq!(map.swizzle, Swizzle::Bytes128);
        let map = TensorMap::matrix(256, Element::Tf32, (70, 40, 48), (16, 16))?;
        assert_eq!((map.swizzle, map.strides()), (Swizzle::Bytes64, &[192][..]));
        Ok(())
    }

    #[test]
    fn what_bulk_copies_do_not_take_is_refused() {
        let matrix = |address, stride, tile| {
            TensorMap::matrix(address, Element::Bits16, (70, 40, stride), tile).is_ok()
        };
        assert!(matrix(256, 40, (64, 64)));
        assert!(!matrix(250, 40, (64, 64)), "address");
        assert!(!matrix(256, 42, (64, 64)), "stride");
        assert!(!matrix(256, 40, (257, 64)) && !matrix(256, 40, (64, 4)), "tile");
        let long = |rows| TensorMap::matrix(256, Element::Bits16, (rows, 40, 40), (64, 64));
        assert!(long((1 << 31) - 1).is_ok());
        let message = long(1 << 31).unwrap_err().to_string();
        assert!(message.contains("2147483647, got 2147483648"), "{message}");
    }
}
