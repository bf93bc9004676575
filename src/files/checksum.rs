//! 64-bit FNV-1a over named byte strings: tells data that changed, not data that was forged.

/// A checksum in the making.
pub(crate) struct Checksum(pub u64);

impl Checksum {
    pub fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Adds a name and its data; the lengths too, so that no two sequences of them run together.
    pub fn add(&mut self, name: &str, data: &[u8]) {
        let lengths = [name.len() as u64, data.len() as u64].map(u64::to_le_bytes);
        for byte in lengths.iter().flatten().chain(name.as_bytes()).chain(data) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

impl std::fmt::Display for Checksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
