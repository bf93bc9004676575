//! LoRA of SAMed's and micro-sam's: any bytes, and well-formed files under the names theirs have or nearly have.
#![no_main]

use arbitrary::Arbitrary;
use candle_core::{DType, Device, Tensor};
use candle_sam_lora::lora::{read_samed_adapter, load_adapter, load_adapter_tensors, write_adapter};
use candle_sam_lora::{module_tree, nn, write_tensors};
use candle_sam_lora_fuzz::{bits, file, folder};
use std::collections::BTreeMap;

const LEAVES: [&str; 14] = [
    "attn.qkv.linear_a_q.weight",
    "attn.qkv.linear_b_q.weight",
    "attn.qkv.linear_a_v.weight",
    "attn.qkv.linear_b_v.weight",
    "attn.qkv.w_a_linear_q.weight",
    "attn.qkv.w_b_linear_q.weight",
    "attn.qkv.w_a_linear_k.weight",
    "attn.qkv.w_b_linear_k.weight",
    "mlp.w_a_linear_1.weight",
    "mlp.w_b_linear_1.weight",
    "mlp.w_a_linear_2.weight",
    "mlp.w_b_linear_2.weight",
    "attn.qkv.weight",
    "mlp.lin1.weight",
];

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    /// Whether the names are those of SAMed's own files, which count the layers.
    counted: bool,
    /// Both matrices of some layers, as they have to be.
    layers: Vec<Layer>,
    /// In their place or beside them.
    tensors: Vec<Entry<'a>>,
    blocks: Option<Vec<u8>>,
    bytes: &'a [u8],
}

#[derive(Arbitrary, Debug)]
struct Layer {
    block: bool,
    place: u8,
    rank: u8,
    values: [f32; 2],
}

#[derive(Arbitrary, Debug)]
struct Entry<'a> {
    name: Name<'a>,
    shape: [u8; 2],
    rank: u8,
    f16: bool,
    value: f32,
}

#[derive(Arbitrary, Debug)]
enum Name<'a> {
    Counted { is_a: bool, number: u8 },
    Numbered { prefix: Option<&'a str>, block: u8, leaf: u8 },
    Any(&'a str),
}

impl Name<'_> {
    fn text(&self) -> String {
        match self {
            Self::Counted { is_a, number } => {
                format!("w_{}_{:03}", if *is_a { 'a' } else { 'b' }, number % 9)
            }
            Self::Numbered { prefix, block, leaf } => format!(
                "{}blocks.{}.{}",
                prefix.unwrap_or("image_encoder."),
                block % 5,
                LEAVES[*leaf as usize % LEAVES.len()]
            ),
            Self::Any(name) => name.to_string(),
        }
    }
}

struct Model {
    layers: Vec<Block>,
}
struct Block {
    q: nn::Linear,
    k: nn::Linear,
    v: nn::Linear,
    lin1: nn::Linear,
    lin2: nn::Linear,
}
module_tree!(Block { q => "attn.q", k => "attn.k", v => "attn.v", lin1 => "mlp.lin1", lin2 => "mlp.lin2" });
module_tree!(Model { layers });

impl Model {
    fn new() -> Self {
        let linear =
            |(input, out)| nn::Linear::load(input, out, candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu)).unwrap();
        let block = || {
            let [q, k, v] = [(4, 4); 3].map(linear);
            Block { q, k, v, lin1: linear((4, 6)), lin2: linear((6, 4)) }
        };
        Self { layers: vec![block(), block()] }
    }
}

/// The two matrices of a layer, under the names of the leaves from 2 `place` on, or counted.
fn matrices(layer: &Layer, counted: Option<usize>) -> [(String, Tensor); 2] {
    let place = layer.place as usize % 6;
    let (input, out) = if counted.is_some() {
        (4, 4)
    } else {
        [(4, 4), (4, 4), (4, 4), (4, 4), (4, 6), (6, 4)][place]
    };
    let rank = layer.rank as usize % 3 + 1;
    let name = |i: usize| match counted {
        Some(number) => format!("w_{}_{number:03}", ['a', 'b'][i]),
        None => format!("image_encoder.blocks.{}.{}", u8::from(layer.block), LEAVES[2 * place + i]),
    };
    let full = |i: usize, shape| Tensor::full(layer.values[i], shape, &Device::Cpu).unwrap();
    [(name(0), full(0, (rank, input))), (name(1), full(1, (out, rank)))]
}

fn tensor(entry: &Entry) -> Tensor {
    let shape: Vec<usize> =
        entry.shape.iter().take(3 - entry.rank as usize % 3).map(|d| *d as usize % 7).collect();
    let dtype = if entry.f16 { DType::F16 } else { DType::F32 };
    Tensor::full(entry.value, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn not_zero(mut bits: Vec<u32>) -> Vec<u32> {
    bits.retain(|bits| f32::from_bits(*bits) != 0.0);
    bits.sort_unstable();
    bits
}

libfuzzer_sys::fuzz_target!(|input: Input| {
    let blocks =
        input.blocks.map(|blocks| blocks.iter().map(|b| *b as usize % 4).collect::<Vec<_>>());
    let any = file("any.safetensors", input.bytes);
    let _ = read_samed_adapter(&Model::new(), &any, blocks.as_deref());

    let numbers = input.layers.iter().enumerate();
    let layers = numbers.flat_map(|(n, layer)| matrices(layer, input.counted.then_some(n)));
    let mut tensors: BTreeMap<String, Tensor> = layers.collect();
    tensors.extend(input.tensors.iter().map(|entry| (entry.name.text(), tensor(entry))));
    // The format's own name for the strings beside the tensors.
    if tensors.contains_key("__metadata__") {
        return;
    }
    let path = folder().join("lora.safetensors");
    write_tensors(&path, &tensors).unwrap();
    let mut model = Model::new();
    let before = bits(&model);
    let Ok((config, imported)) = read_samed_adapter(&model, &path, blocks.as_deref()) else { return };
    // A matrix without its other half, or of another layer's shape, is found here.
    if load_adapter_tensors(&mut model, "default", &config, imported.clone()).is_err() {
        assert_eq!(bits(&model), before);
        return;
    }
    let adapter = folder().join("adapter");
    write_adapter(&config, &imported, &adapter).unwrap();
    let mut again = Model::new();
    load_adapter(&mut again, &adapter).unwrap();
    assert_eq!(bits(&again), bits(&model));
    // Every matrix went into the model, with the values that the file has; the model's own are zero.
    let given = imported.values().flat_map(|t| {
        t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    });
    assert_eq!(not_zero(bits(&model)), not_zero(given.map(f32::to_bits).collect()));
});
