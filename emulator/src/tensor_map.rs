//! Tensor maps as the emulator reads them: the fields of `emulator::TensorMap` in include/emulator/async.h.

/// A tensor in memory and the tile of it that is copied at once. Dimensions are innermost first.
#[derive(Clone, Debug)]
pub struct TensorMap<'a> {
    /// Address of the first element.
    pub address: u64,
    /// Sizes, at most five.
    pub dims: &'a [u32],
    /// Bytes from one index to the next of each dimension but the first, whose elements lie side by side.
    pub strides: &'a [u64],
    /// Sizes of the tile.
    pub tile: &'a [u32],
    /// Bytes of an element: 2 or 4.
    pub element_bytes: u32,
    /// Whether elements are f32 that are rounded to tf32 on their way.
    pub round_tf32: bool,
    /// Bytes of a row within which shared memory is swizzled: 0, 32, 64 or 128.
    pub swizzle: u32,
}

impl TensorMap<'_> {
    const MAGIC: u64 = 0x7061_6D72_6F73_6E65;

    /// The bytes that stand for it in a params struct, where the driver's encoding stands on a GPU.
    ///
    /// # Errors
    /// On what the driver would refuse; on rows of a tile that are shorter or longer than what is swizzled, too.
    pub fn encode(&self) -> Result<[u8; 128], String> {
        let rank = self.dims.len();
        let row_bytes = self.tile.first().map_or(0, |n| n * self.element_bytes);
        let right = (1..=5).contains(&rank)
            && self.strides.len() + 1 == rank
            && self.tile.len() == rank
            && [2, 4].contains(&self.element_bytes)
            && self.address != 0
            && self.address.is_multiple_of(16)
            && self.dims.iter().all(|&n| n > 0)
            && self.strides.iter().all(|&s| s > 0 && s % 16 == 0 && s < 1 << 40)
            && self.tile.iter().all(|&n| (1..=256).contains(&n))
            && row_bytes.is_multiple_of(16)
            && [0, 32, 64, 128].contains(&self.swizzle)
            && (self.swizzle == 0 || row_bytes == self.swizzle);
        if !right {
            return Err(format!("the driver or the emulator takes no such tensor map: {self:?}"));
        }
        let padded = |values: &[u32]| -> Vec<u8> {
            (0..5).flat_map(|i| values.get(i).copied().unwrap_or(1).to_ne_bytes()).collect()
        };
        let mut bytes = Self::MAGIC.to_ne_bytes().to_vec();
        bytes.extend(self.address.to_ne_bytes());
        bytes.extend((0..4).flat_map(|i| self.strides.get(i).copied().unwrap_or(0).to_ne_bytes()));
        bytes.extend(padded(self.dims));
        bytes.extend(padded(self.tile));
        for value in [rank as u32, self.element_bytes, self.round_tf32.into(), self.swizzle] {
            bytes.extend(value.to_ne_bytes());
        }
        let mut encoded = [0; 128];
        encoded[..bytes.len()].copy_from_slice(&bytes);
        Ok(encoded)
    }
}
