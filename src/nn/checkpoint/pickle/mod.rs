//! Python's pickles, read as data: no class is looked up and no function called.
//!
//! Objects lie in one list and refer to each other by number. So an object that is referred to twice is there once, and
//! nothing here is recursive. The list has at most one object for each byte of the pickle. `candle_core::pickle` is no
//! choice for files of unknown origin. It copies an object at each reference (30 bytes ask for 2^30 objects), allocates
//! by a mere claim of length, and panics on short tuples.
//!
//! Source: CPython, `Lib/pickle.py` and `Lib/pickletools.py`, protocols 0 to 5.

mod machine;
mod objects;

use machine::Machine;
pub(super) use objects::{Id, Object};

/// The objects of a pickle.
#[derive(Debug)]
pub(super) struct Pickle {
    objects: Vec<Object>,
    pub root: Id,
}

impl Pickle {
    /// Reads the pickle at the start of `bytes`.
    ///
    /// # Errors
    /// - the bytes end within it;
    /// - an opcode is unknown or finds other operands than it needs.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let (objects, root) = Machine::new(bytes).run()?;
        Ok(Self { objects, root })
    }

    pub fn object(&self, id: Id) -> &Object {
        self.objects.get(id as usize).unwrap_or(&Object::Other)
    }

    /// The elements of a tuple or list.
    pub fn sequence(&self, id: Id) -> Option<&[Id]> {
        match self.object(id) {
            Object::Sequence(items) => Some(items),
            _ => None,
        }
    }

    pub fn text(&self, id: Id) -> Option<&str> {
        match self.object(id) {
            Object::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn global(&self, id: Id) -> Option<&str> {
        match self.object(id) {
            Object::Global(name) => Some(name),
            _ => None,
        }
    }

    /// A number that is not negative.
    pub fn size(&self, id: Id) -> Option<usize> {
        match self.object(id) {
            Object::Int(value) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    /// A tuple of numbers that are not negative.
    pub fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        self.sequence(id)?.iter().map(|id| self.size(*id)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{Object, Pickle};

    #[test]
    fn one_object_is_there_once_however_often_it_is_meant() {
        // [], memoized, then 64 times: a list of it and itself.
        let mut bytes = b"\x80\x02]q\x00".to_vec();
        for level in 0..64u8 {
            bytes.extend([b'h', level, b'h', level, 0x86, b'q', level + 1]);
        }
        bytes.push(b'.');
        let pickle = Pickle::parse(&bytes).unwrap();
        assert_eq!(pickle.objects.len(), 65);
    }

    #[test]
    fn claims_beyond_the_end_are_errors() {
        for bytes in [
            &b"X\xff\xff\xff\x7f"[..],
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x8e\x00\x00\x00\x00\x00\x00\x00\x80",
            b"",
            b"(t",
            b"t.",
            b"h\x00.",
            b"0.",
            b"\x87.",
            b"cos\nsystem",
        ] {
            assert!(Pickle::parse(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn integers_have_their_signs() {
        for (bytes, expected) in [
            (&b"K\xff."[..], 255),
            (b"M\xff\xff.", 65535),
            (b"J\xff\xff\xff\xff.", -1),
            (b"\x8a\x00.", 0),
            (b"\x8a\x02\x00\xff.", -256),
            (b"I-7\n.", -7),
            (b"L12L\n.", 12),
        ] {
            let pickle = Pickle::parse(bytes).unwrap();
            assert!(matches!(pickle.object(pickle.root), Object::Int(value) if *value == expected));
        }
    }
}
