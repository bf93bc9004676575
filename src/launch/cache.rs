//! A bounded cache of what is made again and again from the same description.

use candle_core::Result;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::sync::{Mutex, PoisonError};

/// A map whose keys this crate makes. Nobody chooses them so that they collide, so a quick hash does.
pub type QuickMap<K, V> = HashMap<K, V, BuildHasherDefault<Quick>>;

/// As [`QuickMap`], keys alone.
pub type QuickSet<K> = HashSet<K, BuildHasherDefault<Quick>>;

/// Words multiplied and added, one after the other.
#[derive(Debug, Default)]
pub struct Quick(u64);

impl Hasher for Quick {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks();
        for word in words {
            self.write_u64(u64::from_ne_bytes(*word));
        }
        for byte in rest {
            self.write_u8(*byte);
        }
    }

    fn write_u8(&mut self, n: u8) {
        self.write_u64(n.into());
    }

    fn write_u32(&mut self, n: u32) {
        self.write_u64(n.into());
    }

    fn write_u64(&mut self, n: u64) {
        // 2^64 / pi.
        self.0 = (self.0.rotate_left(5) ^ n).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    fn write_usize(&mut self, n: usize) {
        self.write_u64(n as u64);
    }

    /// A map looks at both ends of it, and the product's low bits know low bits alone.
    fn finish(&self) -> u64 {
        self.0.rotate_left(26)
    }
}

/// At most two generations of `GENERATION` values, by what they are made of. When the young generation is full it
/// becomes the old one, which is forgotten; a value that is used again in time stays.
#[derive(Debug)]
pub struct Cache<K, V, const GENERATION: usize>(Mutex<[QuickMap<K, V>; 2]>);

/// As many plans as an encoder's passes have, several times.
pub(super) type Plans<K> = Cache<K, std::sync::Arc<super::plan::Plan>, 256>;

impl<K, V, const GENERATION: usize> Default for Cache<K, V, GENERATION> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Clone + Eq + Hash, V: Clone, const GENERATION: usize> Cache<K, V, GENERATION> {
    /// The value, made now or before.
    ///
    /// # Errors
    /// - `make` fails; nothing is kept then.
    pub fn get_or(&self, key: &K, make: impl FnOnce(&K) -> Result<V>) -> Result<V> {
        let mut generations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let [young, old] = &mut *generations;
        if let Some(value) = young.get(key) {
            return Ok(value.clone());
        }
        let value = match old.get(key) {
            Some(value) => value.clone(),
            None => make(key)?,
        };
        if young.len() == GENERATION {
            *old = std::mem::take(young);
        }
        young.insert(key.clone(), value.clone());
        Ok(value)
    }

    /// Number of values in each generation.
    #[cfg(test)]
    pub(crate) fn len(&self) -> [usize; 2] {
        let generations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        generations.each_ref().map(HashMap::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::hash::BuildHasher;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn addresses_have_many_hashes() {
        for step in [16, 256, 1 << 16, 1 << 21] {
            let hash = |index: u64| BuildHasherDefault::<Quick>::default().hash_one(index * step);
            // The bits that a map of 8192 places looks at; by chance 3223 would be found.
            let places: HashSet<_> = (0..4096).map(|index| hash(index) % 8192).collect();
            let tags: HashSet<_> = (0..4096).map(|index| hash(index) >> 57).collect();
            assert!(
                places.len() > 2500 && tags.len() > 100,
                "{step}: {} {}",
                places.len(),
                tags.len()
            );
        }
    }

    #[test]
    fn a_value_is_made_once_while_it_is_in_use() -> Result<()> {
        let (cache, made) = (Cache::<u32, u32, 4>::default(), Cell::new(0));
        let get = |key| {
            cache.get_or(&key, |key| {
                made.set(made.get() + 1);
                Ok(10 * key)
            })
        };
        for other in 0..20 {
            assert_eq!((get(other)?, get(99)?), (10 * other, 990));
            assert!(cache.len().into_iter().all(|len| len <= 4), "{:?}", cache.len());
        }
        assert_eq!(made.get(), 21, "each once");
        // Unused for two generations.
        get(0)?;
        assert_eq!(made.get(), 22);
        Ok(())
    }

    #[test]
    fn a_failure_is_not_kept() -> Result<()> {
        let cache = Cache::<u32, u32, 4>::default();
        assert!(cache.get_or(&1, |_| candle_core::bail!("no")).is_err());
        assert_eq!(cache.get_or(&1, |_| Ok(2))?, 2);
        Ok(())
    }

    #[test]
    fn threads_share_one_value() {
        let (cache, made) = (Cache::<u32, u32, 4>::default(), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    cache.get_or(&1, |_| Ok(made.fetch_add(1, Ordering::Relaxed) as u32))
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }
}
