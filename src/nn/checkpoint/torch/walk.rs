//! The tensors in a pickle's dicts, lists and modules.

use super::super::pickle::{Id, Object, Pickle};
use super::archive::Entry;
use super::view::View;
use safetensors::tensor::TensorInfo;
use safetensors::Dtype;
use std::collections::{BTreeMap, HashMap};

/// The value of a pickle, or its fault.
type Checked<T> = std::result::Result<T, String>;

/// The most bytes of names that are made of a pickle, in which a dict may be held by many others.
const MAX_NAMES: usize = 64 << 20;
/// The most dicts and lists within each other.
const MAX_DEPTH: usize = 64;

/// The tensors of a pickle. A tensor's name is the path to it, joined by dots.
#[derive(Default)]
pub(super) struct Found {
    pub tensors: BTreeMap<String, TensorInfo>,
    pub views: HashMap<String, View>,
    /// Tensors of kinds that are not read, each with its kind.
    pub unread: BTreeMap<String, String>,
}

impl Found {
    /// Goes through dicts, lists and the attributes of objects.
    ///
    /// # Errors
    /// - there are more names or more dicts within each other than any model has;
    /// - a tensor is larger than its storage, or two have one name.
    pub fn of(pickle: &Pickle, storage: &dyn Fn(&str) -> Option<Entry>) -> Checked<Self> {
        let mut found = Self::default();
        let mut budget = MAX_NAMES;
        // Object, the path to it, the dicts around it, the number of the innermost one.
        let mut open = vec![(pickle.root, String::new(), 0, 0u32)];
        let mut containers = 0;
        while let Some((id, path, depth, container)) = open.pop() {
            budget = budget.checked_sub(path.len() + 16).ok_or_else(|| {
                format!("its data.pkl makes more than {MAX_NAMES} bytes of names of tensors")
            })?;
            if depth > MAX_DEPTH {
                return Err(format!(
                    "its data.pkl has more than {MAX_DEPTH} dicts within each other"
                ));
            }
            if let Some(call) = rebuilt(pickle, id) {
                found.add(path, call, container, storage)?;
                continue;
            }
            containers += 1;
            for (name, child) in children(pickle, id) {
                // Only what has children, or is a tensor, goes on the list.
                if matches!(
                    pickle.object(child),
                    Object::Dict(_) | Object::Sequence(_) | Object::Instance(_)
                ) {
                    let path = match (path.is_empty(), name.is_empty()) {
                        (true, _) => name,
                        (_, true) => path.clone(),
                        _ => format!("{path}.{name}"),
                    };
                    budget = budget.saturating_sub(path.len() + 16);
                    if budget == 0 {
                        continue; // told when the next one is taken
                    }
                    open.push((child, path, depth + 1, containers));
                }
            }
        }
        Ok(found)
    }

    fn add(
        &mut self,
        path: String,
        tensor: Rebuilt,
        container: u32,
        storage: &dyn Fn(&str) -> Option<Entry>,
    ) -> Checked<()> {
        let found = match tensor {
            Rebuilt::Plain(stored) => match stored.dtype() {
                Some(dtype) => Ok(stored.view(&path, dtype, container, storage)?),
                None => Err(stored.kind),
            },
            Rebuilt::Unread(kind) => Err(kind),
        };
        let is_new = match found {
            Ok((info, view)) => {
                self.views.insert(path.clone(), view);
                self.tensors.insert(path.clone(), info).is_none()
            }
            Err(kind) => self.unread.insert(path.clone(), kind).is_none(),
        };
        match is_new {
            true => Ok(()),
            false => Err(format!("holds two tensors called {path}")),
        }
    }
}

/// The objects inside another, with the names that lead to them.
fn children(pickle: &Pickle, id: Id) -> Vec<(String, Id)> {
    let mut children = Vec::new();
    let mut items = |items: &[(Id, Id)]| {
        children.extend(items.iter().filter_map(|&(key, value)| {
            let key = match pickle.object(key) {
                Object::Text(text) => text.to_string(),
                Object::Int(number) => number.to_string(),
                _ => return None,
            };
            // A module keeps its tensors and its modules in dicts of its own.
            let inner = ["_parameters", "_buffers", "_modules"].contains(&key.as_str());
            Some((if inner { String::new() } else { key }, value))
        }));
    };
    match pickle.object(id) {
        Object::Dict(pairs) => items(pairs),
        Object::Instance(instance) => {
            items(&instance.items);
            match instance.state.map(|state| pickle.object(state)) {
                Some(Object::Dict(pairs)) => items(pairs),
                Some(Object::Instance(state)) => items(&state.items),
                _ => {}
            }
        }
        Object::Sequence(elements) => {
            children.extend(elements.iter().enumerate().map(|(i, id)| (i.to_string(), *id)));
        }
        _ => {}
    }
    children
}

/// The tensor that a call makes.
enum Rebuilt {
    Plain(Stored),
    /// A tensor of this kind, which is not stored as a view of one storage.
    Unread(String),
}

/// Prefix of PyTorch's functions that rebuild a tensor.
const REBUILD: &str = "torch._utils._rebuild_";

/// The tensor that an object is, if it is one.
fn rebuilt(pickle: &Pickle, mut id: Id) -> Option<Rebuilt> {
    // A parameter around a tensor, and a subclass around either.
    for _ in 0..4 {
        let Object::Instance(call) = pickle.object(id) else { return None };
        let mut function = pickle.global(call.function)?;
        let mut arguments = pickle.sequence(call.arguments)?;
        if function == "torch._tensor._rebuild_from_type_v2" {
            function = pickle.global(*arguments.first()?)?;
            arguments = pickle.sequence(*arguments.get(2)?)?;
        }
        match function.strip_prefix(REBUILD)? {
            "parameter" | "parameter_with_state" => id = *arguments.first()?,
            kind @ ("tensor" | "tensor_v2" | "tensor_v3") => {
                return Stored::of(pickle, arguments, kind == "tensor_v3").map(Rebuilt::Plain)
            }
            "qtensor" => return Some(Rebuilt::Unread("quantised".into())),
            other => return Some(Rebuilt::Unread(other.into())),
        }
    }
    None
}

/// A tensor as a pickle describes it.
struct Stored {
    /// The storage's class, or the dtype.
    kind: String,
    key: String,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl Stored {
    /// From the arguments of the function that rebuilds it.
    fn of(pickle: &Pickle, arguments: &[Id], has_dtype: bool) -> Option<Self> {
        let dtype = arguments.get(6).filter(|_| has_dtype).and_then(|id| pickle.global(*id));
        let [storage, offset, shape, strides, ..] = *arguments else { return None };
        let Object::Persistent(storage) = *pickle.object(storage) else { return None };
        let [_, class, key, ..] = *pickle.sequence(storage)? else { return None };
        let kind = dtype.or_else(|| pickle.global(class))?;
        Some(Self {
            kind: kind.rsplit('.').next().unwrap_or_default().to_string(),
            key: pickle.text(key)?.to_string(),
            offset: pickle.size(offset)?,
            shape: pickle.sizes(shape)?,
            strides: pickle.sizes(strides)?,
        })
    }

    /// Its dtype, if tensors of it are read.
    fn dtype(&self) -> Option<Dtype> {
        Some(match self.kind.as_str() {
            "FloatStorage" | "float32" => Dtype::F32,
            "DoubleStorage" | "float64" => Dtype::F64,
            "HalfStorage" | "float16" => Dtype::F16,
            "BFloat16Storage" | "bfloat16" => Dtype::BF16,
            "ByteStorage" | "uint8" => Dtype::U8,
            "CharStorage" | "int8" => Dtype::I8,
            "ShortStorage" | "int16" => Dtype::I16,
            "IntStorage" | "int32" => Dtype::I32,
            "LongStorage" | "int64" => Dtype::I64,
            "BoolStorage" | "bool" => Dtype::BOOL,
            "uint16" => Dtype::U16,
            "uint32" => Dtype::U32,
            "uint64" => Dtype::U64,
            "float8_e4m3fn" => Dtype::F8_E4M3,
            "float8_e5m2" => Dtype::F8_E5M2,
            _ => return None,
        })
    }

    /// The tensor in its storage.
    fn view(
        &self,
        name: &str,
        dtype: Dtype,
        container: u32,
        storage: &dyn Fn(&str) -> Option<Entry>,
    ) -> Checked<(TensorInfo, View)> {
        let Self { key, shape, strides, offset, .. } = self;
        let (shape, strides) = (shape.clone(), strides.clone());
        let storage = storage(key).ok_or_else(|| {
            format!("tensor {name} has its values in data/{key}, which is not in the archive")
        })?;
        let width = dtype.bitsize() / 8;
        let too_large = || {
            format!(
                "tensor {name} of shape {shape:?} reaches beyond its storage data/{key} of {} bytes",
                storage.size
            )
        };
        let count = shape.iter().try_fold(1usize, |n, side| n.checked_mul((*side).max(1)));
        let count = if shape.contains(&0) { count.and(Some(0)) } else { count };
        let last = shape.iter().zip(&strides).try_fold(*offset, |last, (side, stride)| {
            last.checked_add(side.saturating_sub(1).checked_mul(*stride)?)
        });
        let end = last.and_then(|last| last.checked_add(1)?.checked_mul(width));
        let bytes = count.and_then(|count| count.checked_mul(width)).ok_or_else(too_large)?;
        let fits = bytes == 0 || end.is_some_and(|end| end as u64 <= storage.size);
        if !fits || shape.len() != strides.len() {
            return Err(too_large());
        }
        let info = TensorInfo { dtype, shape, data_offsets: (0, bytes) };
        let offset = if bytes == 0 { 0 } else { *offset };
        Ok((info, View { storage, offset, strides, container }))
    }
}
