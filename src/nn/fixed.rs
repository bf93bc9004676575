//! Parameters that are held fixed, and those that share another's value.
//!
//! A constant may be a parameter in PyTorch, and two parameters may be one tensor there, as SAM's position features
//! are. Checkpoints and counts leave no trace of either, but an adapter can: PEFT trains a copy of every parameter of a
//! module in `modules_to_save`.

use super::{Fixed, ModuleTree, Node, NodeMut};
use crate::Result;

impl ModuleTree for Fixed {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        f(path, Node::Fixed);
        match self.0.track_op() {
            true => f(path, Node::Parameter(&self.0)),
            false => f(path, Node::Buffer(&self.0)),
        }
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        match self.0.track_op() {
            true => f(path, NodeMut::Parameter(&mut self.0)),
            false => f(path, NodeMut::Buffer(&mut self.0)),
        }
    }
}

/// A [`Fixed`] parameter that has the value of another until it gets its own.
///
/// [Example](crate::nn::ModuleTree)
#[derive(Clone, Debug)]
pub struct Tied {
    /// Its own value; none while it is tied.
    pub own: Option<Fixed>,
    to: &'static str,
}

impl Tied {
    /// Tied to the tensor called `to`, below the nearest module around both.
    pub fn to(to: &'static str) -> Self {
        Self { own: None, to }
    }
}

impl ModuleTree for Tied {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        match &self.own {
            Some(own) => own.visit(path, f),
            None => f(path, Node::Tied(self.to)),
        }
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        match &mut self.own {
            Some(own) => own.visit_mut(path, f),
            None => f(path, NodeMut::Tied(&mut self.own)),
        }
    }
}
