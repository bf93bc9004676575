//! The objects that a pickle makes.

/// The number of an object.
pub(in super::super) type Id = u32;

/// An object, as far as tensors need it.
#[derive(Debug)]
pub(in super::super) enum Object {
    /// None, a boolean, a float, bytes, an integer of more than 64 bits.
    Other,
    Int(i64),
    Text(Box<str>),
    /// A class or a function by its module and name, joined by a dot.
    Global(Box<str>),
    /// A tuple, list or set.
    Sequence(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// The result of a call.
    Instance(Box<Instance>),
    /// A reference to what is stored beside the pickle.
    Persistent(Id),
}

/// An object of a pickle that a call makes.
#[derive(Debug)]
pub(in super::super) struct Instance {
    pub function: Id,
    pub arguments: Id,
    /// The argument of `__setstate__`: usually a dict of the attributes.
    pub state: Option<Id>,
    /// The items of a class derived from `dict`.
    pub items: Vec<(Id, Id)>,
}
