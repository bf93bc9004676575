//! The examples run.

#[path = "../../examples/any_model.rs"]
pub mod any_model;
#[path = "../../examples/encode.rs"]
mod encode;
#[path = "../../examples/hack_gated_attention.rs"]
mod hack_gated_attention;
#[path = "../../examples/masks.rs"]
mod masks;
#[path = "../../examples/segment.rs"]
mod segment;
#[path = "../../examples/train.rs"]
mod train;

#[test]
fn lora_adapts_a_model_that_is_not_sam() -> anyhow::Result<()> {
    any_model::main()
}

#[test]
fn encode_gives_an_embedding() -> anyhow::Result<()> {
    encode::main()
}

#[test]
fn a_gate_around_the_attention_trains() -> anyhow::Result<()> {
    hack_gated_attention::main()
}

#[test]
fn masks_finds_everything() -> anyhow::Result<()> {
    masks::main()
}

#[test]
fn segment_cuts_objects_out() -> anyhow::Result<()> {
    segment::main()
}

#[test]
fn train_makes_steps() -> anyhow::Result<()> {
    train::main()
}
