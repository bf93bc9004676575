//! Tensors as PyTorch keeps them: views of storages, with strides.

use super::archive::Entry;

/// A tensor as a view of a storage; offset and strides count elements.
#[derive(Debug)]
pub(super) struct View {
    pub storage: Entry,
    pub offset: usize,
    pub strides: Vec<usize>,
    /// The number of the dict that holds the tensor.
    pub container: u32,
}

/// Elements of the storage from the first that a view uses to the last.
pub(super) fn span(shape: &[usize], strides: &[usize]) -> usize {
    match shape.contains(&0) {
        true => 0,
        false => {
            1 + shape.iter().zip(strides).map(|(side, stride)| (side - 1) * stride).sum::<usize>()
        }
    }
}

pub(super) fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(side, stride)| {
        let fits = *side <= 1 || *stride == expected;
        expected *= side;
        fits
    })
}

/// The elements of a view one after the other.
pub(super) fn gather(bytes: &[u8], shape: &[usize], strides: &[usize], width: usize) -> Vec<u8> {
    let count: usize = shape.iter().product();
    let mut gathered = Vec::with_capacity(count * width);
    let mut index = vec![0; shape.len()];
    let mut offset = 0;
    for _ in 0..count {
        gathered
            .extend_from_slice(bytes.get(offset * width..(offset + 1) * width).unwrap_or_default());
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            offset += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            offset -= index[axis] * strides[axis];
            index[axis] = 0;
        }
    }
    gathered
}
