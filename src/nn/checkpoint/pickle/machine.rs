//! The stack machine that a pickle is a program for.
//!
//! Source: CPython, `Lib/pickletools.py`, protocols 0 to 5.

use super::objects::{Id, Instance, Object};
use std::collections::HashMap;

/// The state of reading.
pub(super) struct Machine<'a> {
    rest: &'a [u8],
    objects: Vec<Object>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

type Step<T = ()> = Result<T, String>;

impl<'a> Machine<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, objects: vec![], stack: vec![], marks: vec![], memo: HashMap::new() }
    }

    /// Runs to the end of the pickle.
    ///
    /// # Errors
    /// - as [`Pickle::parse`](super::Pickle::parse).
    pub fn run(mut self) -> Step<(Vec<Object>, Id)> {
        loop {
            let opcode = self.take(1)?[0];
            if opcode == b'.' {
                let root = self.pop()?;
                return Ok((self.objects, root));
            }
            self.step(opcode)?;
        }
    }

    fn step(&mut self, opcode: u8) -> Step {
        match opcode {
            0x80 => drop(self.take(1)?), // PROTO
            0x95 => drop(self.take(8)?), // FRAME
            b'(' => self.marks.push(self.stack.len()),
            b'0' => match self.marks.last() {
                Some(mark) if *mark == self.stack.len() => drop(self.marks.pop()),
                _ => drop(self.pop()?),
            },
            b'1' => drop(self.pop_to_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'N' | 0x88 | 0x89 => self.push(Object::Other),
            b'G' => {
                self.take(8)?;
                self.push(Object::Other);
            }
            b'F' => {
                self.line()?;
                self.push(Object::Other);
            }
            b'K' | b'M' | b'J' | 0x8a | 0x8b => self.integer(opcode)?,
            b'I' | b'L' => {
                let text = self.line()?;
                let value = std::str::from_utf8(text)
                    .ok()
                    .and_then(|t| t.trim_end_matches('L').parse().ok());
                self.push(value.map_or(Object::Other, Object::Int));
            }
            b'X' | 0x8c | 0x8d | b'U' | b'T' | b'S' | b'V' => self.string(opcode)?,
            b'B' | b'C' | 0x8e | 0x96 => {
                let width = [(b'B', 4), (b'C', 1)].iter().find(|(code, _)| *code == opcode);
                self.counted(width.map_or(8, |(_, width)| *width))?;
                self.push(Object::Other);
            }
            b')' | b']' | 0x8f => self.push(Object::Sequence(vec![])),
            b't' | b'l' | 0x91 => {
                let items = self.pop_to_mark()?;
                self.push(Object::Sequence(items));
            }
            0x85..=0x87 => {
                let start = self.stack.len().checked_sub(usize::from(opcode - 0x84));
                let start =
                    start.filter(|start| *start >= self.floor()).ok_or("the stack is empty")?;
                let items = self.stack.split_off(start);
                self.push(Object::Sequence(items));
            }
            b'}' => self.push(Object::Dict(vec![])),
            b'd' => {
                let items = pairs(self.pop_to_mark()?)?;
                self.push(Object::Dict(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(vec![(key, value)])?;
            }
            b'u' => {
                let items = pairs(self.pop_to_mark()?)?;
                self.set_items(items)?;
            }
            b'c' | b'i' | b'o' | b'R' | 0x81 | 0x92 | 0x93 | b'b' => self.call(opcode)?,
            b'Q' => {
                let id = self.pop()?;
                self.push(Object::Persistent(id));
            }
            b'P' => {
                let text = Object::Text(self.utf8_line()?);
                let id = self.add(text);
                self.push(Object::Persistent(id));
            }
            b'q' | b'r' | b'p' | 0x94 => {
                let key = match opcode {
                    0x94 => self.memo.len() as u64,
                    _ => self.key(opcode == b'p', opcode == b'r')?,
                };
                let top = self.top()?;
                self.memo.insert(key, top);
            }
            b'h' | b'j' | b'g' => {
                let key = self.key(opcode == b'g', opcode == b'j')?;
                let id = *self.memo.get(&key).ok_or("a reference leads nowhere")?;
                self.stack.push(id);
            }
            other => return Err(format!("the opcode {other:#04x} is not one that is known here")),
        }
        Ok(())
    }

    fn integer(&mut self, opcode: u8) -> Step {
        let bytes = match opcode {
            b'K' => self.take(1)?,
            b'M' => self.take(2)?,
            b'J' => self.take(4)?,
            0x8a => self.counted(1)?,
            _ => self.counted(4)?,
        };
        let signed = !matches!(opcode, b'K' | b'M');
        let fill = if signed && bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
        let mut value = [fill; 8];
        self.push(match value.get_mut(..bytes.len()) {
            Some(low) => {
                low.copy_from_slice(bytes);
                Object::Int(i64::from_le_bytes(value))
            }
            None => Object::Other,
        });
        Ok(())
    }

    fn string(&mut self, opcode: u8) -> Step {
        let bytes = match opcode {
            b'X' | b'T' => self.counted(4)?,
            0x8c | b'U' => self.counted(1)?,
            0x8d => self.counted(8)?,
            b'S' => self.line()?.trim_ascii(),
            _ => self.line()?,
        };
        let quoted = [b"'", b"\""].iter().find_map(|quote| {
            let rest = bytes.strip_prefix(quote.as_slice())?;
            rest.strip_suffix(quote.as_slice()).filter(|_| opcode == b'S')
        });
        // Names are ASCII; what is not UTF-8 is the bytes of another thing.
        let text = std::str::from_utf8(quoted.unwrap_or(bytes));
        self.push(text.map_or(Object::Other, |text| Object::Text(text.into())));
        Ok(())
    }

    fn call(&mut self, opcode: u8) -> Step {
        let (function, arguments) = match opcode {
            b'c' => {
                let (module, name) = (self.utf8_line()?, self.utf8_line()?);
                self.push(Object::Global(format!("{module}.{name}").into()));
                return Ok(());
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Object::Text(module), Object::Text(name)) =
                    (self.object(module), self.object(name))
                else {
                    return Err("a class whose name is no text".into());
                };
                let name = format!("{module}.{name}");
                self.push(Object::Global(name.into()));
                return Ok(());
            }
            b'b' => {
                let (state, object) = (self.pop()?, self.top()?);
                // The attributes of an OrderedDict are no tensors of the model.
                if let Some(Object::Instance(instance)) = self.objects.get_mut(object as usize) {
                    instance.state = Some(state);
                }
                return Ok(());
            }
            b'i' => {
                let (module, name) = (self.utf8_line()?, self.utf8_line()?);
                let arguments = self.pop_to_mark()?;
                let function = self.add(Object::Global(format!("{module}.{name}").into()));
                (function, self.add(Object::Sequence(arguments)))
            }
            b'o' => {
                let mut arguments = self.pop_to_mark()?.into_iter();
                let function = arguments.next().ok_or("a call without a class")?;
                (function, self.add(Object::Sequence(arguments.collect())))
            }
            _ => {
                if opcode == 0x92 {
                    self.pop()?; // the arguments with names
                }
                let (arguments, function) = (self.pop()?, self.pop()?);
                (function, arguments)
            }
        };
        let is_dict = matches!(
            self.object(function),
            Object::Global(name) if &**name == "collections.OrderedDict" || &**name == "builtins.dict"
        );
        self.push(match is_dict {
            true => Object::Dict(vec![]),
            false => Object::Instance(Box::new(Instance {
                function,
                arguments,
                state: None,
                items: vec![],
            })),
        });
        Ok(())
    }

    fn append(&mut self, mut items: Vec<Id>) -> Step {
        let list = self.top()?;
        match self.objects.get_mut(list as usize) {
            Some(Object::Sequence(list)) => list.append(&mut items),
            Some(Object::Instance(_)) => {}
            _ => return Err("elements for what is no list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, mut items: Vec<(Id, Id)>) -> Step {
        let dict = self.top()?;
        match self.objects.get_mut(dict as usize) {
            Some(Object::Dict(dict)) => dict.append(&mut items),
            Some(Object::Instance(instance)) => instance.items.append(&mut items),
            _ => return Err("items for what is no dict".into()),
        }
        Ok(())
    }

    /// The key of a reference.
    fn key(&mut self, is_line: bool, is_long: bool) -> Step<u64> {
        if is_line {
            let text = self.utf8_line()?;
            return text.parse().map_err(|_| format!("{text:?} is no number of a reference"));
        }
        let bytes = self.take(if is_long { 4 } else { 1 })?;
        Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn object(&self, id: Id) -> &Object {
        self.objects.get(id as usize).unwrap_or(&Object::Other)
    }

    fn add(&mut self, object: Object) -> Id {
        self.objects.push(object);
        (self.objects.len() - 1) as Id
    }

    fn push(&mut self, object: Object) {
        let id = self.add(object);
        self.stack.push(id);
    }

    /// The height of the stack at the last mark.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Step<Id> {
        let above = self.stack.len() > self.floor();
        self.stack.last().copied().filter(|_| above).ok_or_else(|| "the stack is empty".into())
    }

    fn pop(&mut self) -> Step<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_to_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        Ok(self.stack.split_off(mark))
    }

    fn take(&mut self, count: usize) -> Step<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or("it ends too early")?;
        self.rest = rest;
        Ok(taken)
    }

    /// Bytes behind their number, which has `width` bytes itself.
    fn counted(&mut self, width: usize) -> Step<&'a [u8]> {
        let count = self.take(width)?.iter().rev().try_fold(0usize, |count, byte| {
            count.checked_mul(256).map(|count| count | usize::from(*byte))
        });
        self.take(count.ok_or("it ends too early")?)
    }

    fn line(&mut self) -> Step<&'a [u8]> {
        let end = self.rest.iter().position(|byte| *byte == b'\n').ok_or("it ends too early")?;
        let line = self.take(end + 1)?;
        let line = &line[..end];
        Ok(line.strip_suffix(b"\r").unwrap_or(line))
    }

    fn utf8_line(&mut self) -> Step<Box<str>> {
        Ok(String::from_utf8_lossy(self.line()?).into())
    }
}

fn pairs(items: Vec<Id>) -> Step<Vec<(Id, Id)>> {
    match items.len() % 2 {
        0 => Ok(items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()),
        _ => Err("a key without a value".into()),
    }
}
